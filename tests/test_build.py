"""The build: CUDA sources compile wherever nvcc is, installs without a compiler or without torch say so."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lightning_prune import ops

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
OBJECTS = ROOT / "build" / "test-objects"
INCLUDES = [
    "-DTORCH_TARGET_VERSION=0x020B000000000000",
    "-isystem",
    str(Path(torch.__file__).parent / "include"),
    f"-I{CSRC / 'include'}",
    f"-I{CSRC / 'kernels/cpu'}",
]
needs_checkout = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a source checkout")


def compile_once(command: list[str], source: Path) -> str | None:
    """Compile ``source`` to an object unless the same command did so for the same sources; returns the error output."""
    headers = sorted(path for path in CSRC.rglob("*") if path.suffix in (".h", ".cuh"))
    content = b"".join(path.read_bytes() for path in [source, *headers])
    key = content + " ".join(command).encode() + torch.__version__.encode()
    done = OBJECTS / f"{source.stem}-{hashlib.sha256(key).hexdigest()[:16]}.ok"
    if done.exists():
        return None
    OBJECTS.mkdir(parents=True, exist_ok=True)
    target = OBJECTS / f"{source.name}.{os.getpid()}.o"
    run = subprocess.run([*command, "-c", str(source), "-o", str(target)], capture_output=True, text=True)
    target.unlink(missing_ok=True)
    if run.returncode == 0:
        done.touch()
        return None
    return f"{source}: {run.stderr[-4000:]}"


def compile_all(command: list[str], sources: list[Path]) -> None:
    assert sources
    with ThreadPoolExecutor(2) as pool:
        errors = [error for error in pool.map(lambda source: compile_once(command, source), sources) if error]
    assert not errors, "\n".join(errors)


@needs_checkout
def test_cuda_sources_compile() -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on PATH: the CUDA kernels were not compiled")
    sources = sorted(CSRC.rglob("*.cu"))
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    # One architecture and one tile keep this short; the extension itself has all, for sm_80, sm_90a and PTX.
    command = [
        nvcc,
        "-gencode=arch=compute_90a,code=sm_90a",
        "-DLP_FEW_TILES",
        "-O1",
        "-Werror=all-warnings",
        "-Xcompiler=-fPIC",
    ]
    command.append(f"-DLP_TEST_NVCC={hashlib.sha256(version.encode()).hexdigest()[:8]}")
    compile_all(command, sources)


@needs_checkout
@pytest.mark.slow
@pytest.mark.parametrize("source", ["tensor_bf16.cu", "tensor_tf32.cu"])
def test_no_tensor_core_kernel_spills_registers(source: str, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on PATH")
    command = [nvcc, "-gencode=arch=compute_90a,code=sm_90a", "-O3", "-Xptxas", "-v", "-c"]
    target = [str(CSRC / "kernels/cuda" / source), "-o", str(tmp_path / "kernels.o")]
    run = subprocess.run([*command, *target], capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr[-4000:]
    reports = run.stderr.split("Compiling entry function")[1:]
    kernels = [report for report in reports if "tensor_conv_kernel" in report or "depthwise_kernel" in report]
    assert len(kernels) > 15
    spilling = [report for report in kernels if "0 bytes spill stores, 0 bytes spill loads" not in report]
    assert not spilling, "\n".join(spilling)


@needs_checkout
def test_bindings_compile_with_cuda_registrations() -> None:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    command = [compiler, "-O0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Werror", "-DUSE_CUDA", *INCLUDES]
    sources = sorted((CSRC / "ops").glob("*.cpp"))
    compile_all(command, sources)


@needs_checkout
def test_no_code_of_a_newer_cpu_can_be_linked_into_the_portable_path() -> None:
    # A weak (inline) function in an AVX-512 object could replace the same function everywhere else.
    nm = shutil.which("nm")
    objects = sorted((ROOT / "build").glob("ext-*/kernels_cpu_conv_avx*.o"))
    if nm is None or not objects:
        pytest.skip("no nm, or no objects of this build")
    for path in objects:
        symbols = subprocess.run(
            [nm, "-C", str(path)], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        assert any(" T lp::cpu_kernels_avx" in line for line in symbols)
        weak = [line for line in symbols if line[17:18] in ("W", "V", "w", "v", "u")]
        assert not weak, f"{path.name}: {weak}"


def run_setup(
    *arguments: str, without_torch: bool = False, **environment: str
) -> subprocess.CompletedProcess[str]:
    hide = "sys.modules['torch'] = None; " if without_torch else ""
    run = "runpy.run_path('setup.py', run_name='__main__')"
    code = f"import sys, runpy; {hide}sys.argv = ['setup.py', *{list(arguments)!r}]; {run}"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=240,
    )


def ninja_file(**environment: str) -> subprocess.CompletedProcess[str]:
    """What the build would run with an nvcc, without running it."""
    code = (
        "import sys, runpy; from pathlib import Path; sys.argv = ['setup.py', '--version']; "
        "write = runpy.run_path('setup.py')['write_ninja']; write.__globals__['find_cuda'] = lambda torch: 'nvcc'; "
        "print('\\n'.join(write(Path('none'), {'_C': 'c.so', '_build_info': 'b.so'}).lines))"
    )
    plain = {name: value for name, value in os.environ.items() if not name.startswith("LIGHTNING_PRUNE_")}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**plain, **environment}, timeout=120
    )  # fmt: skip


@needs_checkout
def test_a_build_for_a_session_with_one_gpu() -> None:
    full = ninja_file().stdout
    assert "code=sm_80 -gencode=arch=compute_90a,code=sm_90a -gencode=arch=compute_90,code=compute_90" in full
    assert '-DLP_CUDA_ARCHS=\\"sm_80,sm_90a,compute_90\\"' in full
    assert "-O0" not in full
    fast = ninja_file(LIGHTNING_PRUNE_FAST_CPU_BUILD="1", LIGHTNING_PRUNE_CUDA_ARCHS="sm_90a").stdout
    assert fast.count("-gencode") == 1
    assert "-gencode=arch=compute_90a,code=sm_90a" in fast
    assert "kernels_cpu_conv_portable.o" in fast
    assert not any(word in fast for word in ("conv_avx", "LP_HAVE_X86_LEVELS", "portable,avx2", "sm_80"))
    extra = fast.split("build kernels_cpu_conv_portable.o")[1].splitlines()[1]
    assert extra.split()[:3] == ["extra", "=", "-O0"]
    wrong = ninja_file(LIGHTNING_PRUNE_CUDA_ARCHS="sm_90a,9.0")
    assert wrong.returncode != 0
    assert "must name architectures like sm_90a or compute_90; got 9.0" in wrong.stderr


@needs_checkout
def test_without_a_compiler_the_install_is_pure_python_and_loud() -> None:
    missing = {"CXX": "no-such-compiler", "PATH": str(Path(sys.executable).parent)}
    done = run_setup("--quiet", "build_ext", "--inplace", **missing)
    assert done.returncode == 0, done.stderr
    assert "INSTALLING AS PURE PYTHON, no C++ compiler was found" in done.stderr
    forced = run_setup("--quiet", "build_ext", "--inplace", LIGHTNING_PRUNE_FORCE_EXT="1", **missing)
    assert forced.returncode != 0
    assert "no C++ compiler was found; install g++ or set CXX" in forced.stderr


@needs_checkout
def test_without_torch_the_build_stops_with_the_command_to_use() -> None:
    done = run_setup("bdist_wheel", without_torch=True)
    assert done.returncode != 0
    assert "pip install --no-build-isolation ." in done.stderr
    pure = run_setup("--version", without_torch=True, LIGHTNING_PRUNE_PURE="1")
    assert pure.returncode == 0, pure.stderr
    assert "as LIGHTNING_PRUNE_PURE=1 asks" in pure.stderr


@needs_checkout
def test_wheel_holds_the_libraries_and_works_elsewhere(tmp_path: Path) -> None:
    if not ops.extension_available():
        pytest.skip(f"no compiled extension: {ops.unavailable_reason()}")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps"]
    done = subprocess.run(
        [*command, "--no-index", "--target", str(tmp_path / "site"), str(ROOT)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    code = (
        "import lightning_prune, torch; from lightning_prune import ops; "
        "print(lightning_prune.__file__); assert ops.extension_available(), ops.unavailable_reason(); "
        "assert ops.masked_conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3)).item() == 9"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=env, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(str(tmp_path))
    assert (tmp_path / "site" / "lightning_prune" / "py.typed").exists()
