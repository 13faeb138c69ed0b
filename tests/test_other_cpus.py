"""Other CPUs: kernels and bindings compile for aarch64, kernels compute there, and nothing of x86 is taken for granted."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.test_build import CSRC, INCLUDES, OBJECTS, compile_all, needs_checkout

CHECK = Path(__file__).parent / "other_cpus" / "kernels_check.cpp"
KERNELS = [
    CSRC / "kernels/cpu" / f"{name}.cpp"
    for name in ("conv_portable", "cpu_level", "dispatch", "masked_conv2d", "compact_conv2d", "segment")
]
WARNINGS = ["-Wall", "-Werror", "-Wno-psabi", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
AARCH64 = "aarch64-linux-gnu-g++"


def compiler(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"no {name} on PATH")
    return found


def check_program(command: list[str]) -> Path:
    """The kernels and their check as one static program, linked once for the same sources."""
    sources = [*KERNELS, CHECK]
    headers = sorted(
        path for path in (*CSRC.rglob("*.h"), *CHECK.parent.glob("*.h")) if "cuda" not in path.parts
    )
    content = b"".join(path.read_bytes() for path in [*sources, *headers]) + " ".join(command).encode()
    program = OBJECTS / f"kernels-check-{hashlib.sha256(content).hexdigest()[:16]}"
    if program.exists():
        return program
    OBJECTS.mkdir(parents=True, exist_ok=True)
    partial = program.with_suffix(f".{os.getpid()}.tmp")

    def compiled(source: Path) -> str:
        target = OBJECTS / f"{source.stem}.{os.getpid()}.check.o"
        subprocess.run([*command, "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    subprocess.run([*command, "-static", *objects, "-o", str(partial)], check=True)
    for path in objects:
        Path(path).unlink()
    return partial.replace(program)


@needs_checkout
def test_kernels_and_bindings_compile_for_aarch64() -> None:
    command = [compiler(AARCH64), "-fsyntax-only", *WARNINGS, *INCLUDES]
    compile_all(command, [*KERNELS, *sorted((CSRC / "ops").glob("*.cpp"))])


@needs_checkout
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_kernels_compute_on_aarch64() -> None:
    """Every algorithm against plain loops in float64, natively on such a machine, elsewhere emulated."""
    native = platform.machine() == "aarch64"
    emulator = None if native else shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    command = [
        compiler("g++" if native else AARCH64),
        "-O1",
        "-std=c++17",
        "-pthread",
        *WARNINGS,
        f"-I{CSRC}",
    ]
    program = check_program(command)
    if not native and emulator is None:
        pytest.skip("compiled and linked, but no qemu-aarch64 on PATH to run it")
    prefix = [] if emulator is None else [emulator]
    done = subprocess.run([*prefix, str(program), "3"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " 0 wrong" in done.stdout


@needs_checkout
def test_sources_take_neither_x86_nor_linux_for_granted() -> None:
    """As another CPU's compiler reads them on another system: the standard's headers know where they are, ours do not."""
    text = {path: path.read_text() for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp")}
    ours = [content for path, content in text.items() if "cuda" not in path.parts]
    builtins = sorted({name for content in ours for name in re.findall(r"__builtin_ia32_\w+", content)})
    system = {"immintrin.h", "sys/mman.h", "pthread.h"}
    sources = [*KERNELS, CSRC / "ops" / "map_memory.cpp"]
    wrappers = []
    for source in sources:
        folders = {source.parent, CSRC / "include"}
        of_torch = {"binding.h", "launch.h"} if source in KERNELS else set()
        used = [text[path] for path in text if path.parent in folders and path.name not in of_torch]
        headers = sorted(
            {name for content in used for name in re.findall(r"#include <(.+)>", content)} - system
        )
        lines = [
            *(f"#include <{name}>" for name in headers),
            *(f"#undef {name}" for name in ("__x86_64__", "__linux__")),
            *([f"#pragma GCC poison {' '.join(builtins)}"] if builtins else []),
            f'#include "{source}"  // {hashlib.sha256(text[source].encode()).hexdigest()}',
        ]
        wrapper = OBJECTS / f"elsewhere_{source.name}"
        OBJECTS.mkdir(parents=True, exist_ok=True)
        partial = wrapper.with_suffix(f".{os.getpid()}.tmp")
        partial.write_text("\n".join(lines) + "\n")
        wrappers.append(partial.replace(wrapper))
    compile_all([compiler("g++"), "-fsyntax-only", *WARNINGS, *INCLUDES], wrappers)
