"""Builds the compiled extension: one ninja file, a persistent build directory, one object per kernel family.

Environment variables:
    LIGHTNING_PRUNE_PURE=1       install without the extension, on purpose
    LIGHTNING_PRUNE_FORCE_EXT=1  a missing or failing compiler is fatal instead of a loud pure-Python install
    LIGHTNING_PRUNE_CUDA=0       leave the CUDA kernels out although torch and nvcc could build them
    LIGHTNING_PRUNE_CUDA_ARCHS   only these of CUDA_ARCHS below or other ones, as nvcc spells them: sm_90a, or sm_80,compute_90
    LIGHTNING_PRUNE_FAST_CPU_BUILD=1  portable CPU kernels only and without optimisation: for sessions that time a GPU
    MAX_JOBS                     parallel compiler jobs
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from shlex import quote

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
STABLE_ABI_TARGET = (
    "0x020B000000000000"  # torch 2.11, the oldest supported; the library then runs on newer ones
)
CUDA_ARCHS = ["sm_80", "sm_90a", "compute_90"]  # compute_*: as PTX, for what comes later
#: from so many cores on nvcc compiles for several architectures at once; there are about ten sources
MANY_CORES = 16
# GCC's generic tuning keeps addresses in vector registers and, for want of these, weights on the stack: tiles of 8 to 12
# pixels took up to twice as long.
X86_LEVELS = {
    "conv_avx2": "-mavx2 -mfma -mf16c",
    "conv_avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mtune=skylake-avx512",
}

NO_TORCH = (
    "lightning-prune must be built against the torch that will import it, but torch cannot be imported here "
    "(pip builds in an isolated environment by default).\n"
    "  Install with:                pip install --no-build-isolation .\n"
    "  Or, without compiled kernels: LIGHTNING_PRUNE_PURE=1 pip install ."
)


def flag(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")


def cuda_archs() -> list[str]:
    wanted = os.environ.get("LIGHTNING_PRUNE_CUDA_ARCHS", "").replace(",", " ").split()
    wrong = [arch for arch in wanted if not re.fullmatch(r"(sm|compute)_\d+[af]?", arch)]
    if wrong:
        raise SystemExit(
            f"LIGHTNING_PRUNE_CUDA_ARCHS must name architectures like sm_90a or compute_90; got {', '.join(wrong)}"
        )
    return wanted or CUDA_ARCHS


def find_cuda(torch) -> str | None:
    """nvcc, when the installed torch has CUDA and the toolkit's major version is the one torch was built with."""
    homes = [
        os.environ.get("CUDA_HOME"),
        "/usr/local/cuda",
        *Path(torch.__file__).parents[1].glob("nvidia/cu*"),
    ]
    places = ["nvcc", *(f"{home}/bin/nvcc" for home in homes if home)]
    nvcc = next(filter(None, map(shutil.which, places)), None)
    if torch.version.cuda is None or nvcc is None or os.environ.get("LIGHTNING_PRUNE_CUDA") == "0":
        return None
    release = (
        subprocess.run([nvcc, "--version"], capture_output=True, text=True)
        .stdout.split("release ")[-1]
        .split(",")[0]
    )
    if release.split(".")[0] != torch.version.cuda.split(".")[0]:
        print(
            f"lightning-prune: nvcc is {release}, torch has CUDA {torch.version.cuda}: building without CUDA kernels"
        )
        return None
    return nvcc


class NinjaFile:
    """Rules and build edges; ninja itself decides what is out of date (dependency files cover headers)."""

    def __init__(self, build_dir: Path) -> None:
        self.build_dir = build_dir
        self.lines: list[str] = ["ninja_required_version = 1.3"]

    def rule(self, name: str, command: str, deps: bool) -> None:
        self.lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        self.lines += ["  depfile = $out.d", "  deps = gcc"] if deps else []

    def compile(self, rule: str, source: Path, flags: str = "") -> str:
        out = "_".join(source.relative_to(CSRC).with_suffix("").parts) + (
            ".cuda.o" if source.suffix == ".cu" else ".o"
        )
        self.lines += [f"build {out}: {rule} {str(source).replace(' ', '$ ')}", f"  extra = {flags}"]
        return out

    def link(self, rule: str, out: str, objects: list[str], libraries: str) -> None:
        self.lines += [f"build {out}: {rule} {' '.join(objects)}", f"  libraries = {libraries}"]

    def run(self) -> None:
        self.build_dir.mkdir(parents=True, exist_ok=True)
        path, text = self.build_dir / "build.ninja", "\n".join(self.lines) + "\n"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        ninja = shutil.which("ninja") or str(Path(sys.executable).with_name("ninja"))
        subprocess.run([ninja, "-C", str(self.build_dir), *jobs], check=True)


def write_ninja(build_dir: Path, outputs: dict[str, str]) -> NinjaFile:
    import pybind11
    import torch

    torch_dir = Path(torch.__file__).parent
    nvcc = find_cuda(torch)
    fast = flag("LIGHTNING_PRUNE_FAST_CPU_BUILD")
    x86 = platform.machine() in ("x86_64", "AMD64") and not fast
    defines = f"-DTORCH_TARGET_VERSION={STABLE_ABI_TARGET}" + (" -DLP_HAVE_X86_LEVELS" if x86 else "")
    torch_flags = f"-isystem {quote(f'{torch_dir}/include')} -I{quote(f'{CSRC}/include')} -I{quote(f'{CSRC}/kernels/cpu')}"
    cuda_flag = " -DUSE_CUDA" if nvcc else ""
    info = [
        f'-DLP_TORCH_VERSION=\\"{torch.__version__}\\"',
        f'-DLP_CPU_LEVELS=\\"{"portable,avx2,avx512" if x86 else "portable"}\\"',
    ]
    if nvcc:
        archs = cuda_archs()
        info += [f'-DLP_CUDA_VERSION=\\"{torch.version.cuda}\\"', f'-DLP_CUDA_ARCHS=\\"{",".join(archs)}\\"']

    ninja = NinjaFile(build_dir)
    ninja.rule(
        "cxx",
        f"{compiler()} -MMD -MF $out.d -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math "
        f"-ffp-contract=fast -Wall {defines} $extra -c $in -o $out",
        deps=True,
    )
    # -z defs: a missing symbol fails here and not at import.
    link = f"{nvcc} -shared -cudart static -Xlinker -z,defs" if nvcc else f"{compiler()} -shared -Wl,-z,defs"
    ninja.rule("link", f"{link} $in -o $out $libraries", deps=False)
    ninja.rule("link_python", f"{compiler()} -shared $in -o $out $libraries", deps=False)

    # At -O1 the templates of one object take as long as at -O3: minutes.
    plain = "-O0 -Wno-psabi" if fast else ""
    kernels = [
        ninja.compile("cxx", CSRC / "kernels/cpu" / f"{name}.cpp", plain)
        for name in ("conv_portable", "dispatch", "masked_conv2d", "compact_conv2d", "segment")
    ]
    level = ninja.compile("cxx", CSRC / "kernels/cpu/cpu_level.cpp")
    if x86:
        kernels += [
            ninja.compile("cxx", CSRC / f"kernels/cpu/{name}.cpp", flags)
            for name, flags in X86_LEVELS.items()
        ]
    bindings = [
        ninja.compile("cxx", source, torch_flags + cuda_flag)
        for source in sorted((CSRC / "ops").glob("*.cpp"))
    ]
    libraries = f"-L{quote(f'{torch_dir}/lib')} -ltorch_cpu -ltorch -lc10"
    if nvcc:
        targets = [f"-gencode=arch={arch.replace('sm_', 'compute_')},code={arch}" for arch in archs]
        threads = ["-t 0"] if len(archs) > 1 and (os.cpu_count() or 1) >= MANY_CORES else []
        ninja.rule(
            "nvcc",
            f"{nvcc} -MD -MF $out.d -O3 -Xcompiler -fPIC,-fvisibility=hidden {' '.join(targets + threads)} "
            "$extra -c $in -o $out",
            deps=True,
        )
        kernels += [ninja.compile("nvcc", source) for source in sorted((CSRC / "kernels/cuda").glob("*.cu"))]
        libraries += " -ltorch_cuda"  # for the current stream; nvcc adds its static runtime itself
    ninja.link("link", outputs["_C"], [*kernels, level, *bindings], libraries)
    python_flags = (
        f"-isystem {quote(pybind11.get_include())} -isystem {quote(sysconfig.get_paths()['include'])}"
    )
    info_object = ninja.compile("cxx", CSRC / "build_info.cpp", f"{python_flags} {' '.join(info)}")
    ninja.link("link_python", outputs["_build_info"], [info_object, level], "")
    return ninja


class NinjaBuildExt(build_ext):
    """Builds with ninja in build/ext-* (kept between runs), then puts the libraries where setuptools wants them."""

    def build_extensions(self) -> None:
        import torch

        tag = f"{sysconfig.get_config_var('SOABI')}-torch{torch.__version__}".replace("+", "-")
        # Apart, so that neither build makes the other's objects out of date.
        build_dir = ROOT / "build" / f"ext-{tag}{'-fast' if flag('LIGHTNING_PRUNE_FAST_CPU_BUILD') else ''}"
        outputs = {
            ext.name.rpartition(".")[2]: os.path.basename(self.get_ext_fullpath(ext.name))
            for ext in self.extensions
        }
        try:
            write_ninja(build_dir, outputs).run()
        except (subprocess.CalledProcessError, OSError, ImportError) as error:
            if flag("LIGHTNING_PRUNE_FORCE_EXT"):
                raise
            announce_pure(f"building the extension failed ({error})")
            self.extensions.clear()
            return
        for ext in self.extensions:
            target = Path(self.get_ext_fullpath(ext.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            # Unlink first: a running process may have the old library mapped.
            target.unlink(missing_ok=True)
            shutil.copy2(build_dir / target.name, target)

    def copy_extensions_to_source(self) -> None:
        if self.extensions:
            super().copy_extensions_to_source()


def announce_pure(reason: str) -> None:
    line = "=" * 100
    print(
        f"{line}\nlightning-prune: INSTALLING AS PURE PYTHON, {reason}.\nThe ops run as plain torch code, without "
        f"the compiled kernels' speed.\nSet LIGHTNING_PRUNE_FORCE_EXT=1 to make this an error.\n{line}",
        file=sys.stderr,
        flush=True,
    )


def extensions() -> list[Extension]:
    if flag("LIGHTNING_PRUNE_PURE"):
        announce_pure("as LIGHTNING_PRUNE_PURE=1 asks")
        return []
    if compiler() is None:
        if flag("LIGHTNING_PRUNE_FORCE_EXT"):
            raise SystemExit(
                "LIGHTNING_PRUNE_FORCE_EXT=1 but no C++ compiler was found; install g++ or set CXX"
            )
        announce_pure("no C++ compiler was found (install g++ or set CXX)")
        return []
    building = {"build_ext", "bdist_wheel", "editable_wheel", "develop", "install", "build"} & set(sys.argv)
    if building:
        try:
            import torch  # noqa: F401
        except ImportError:
            raise SystemExit(NO_TORCH) from None
    return [Extension("lightning_prune._C", sources=[]), Extension("lightning_prune._build_info", sources=[])]


setup(ext_modules=extensions(), cmdclass={"build_ext": NinjaBuildExt})
