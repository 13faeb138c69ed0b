"""What nvcc makes of the CUDA convolutions: the accesses of 16 bytes that the source asks for. Needs no GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable

import pytest

from tests.test_build import CSRC, needs_checkout

Code = dict[str, list[str]]


def functions(dump: str) -> Code:
    """The instructions of every function of a disassembly, predicates left out."""
    code = {}
    for text in re.split(r"\n\s+Function : ", dump)[1:]:
        name, _, body = text.partition("\n")
        found = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+ +)?([^;]*?) *;", body)
        code[name.strip()] = found
    return code


@pytest.fixture(scope="module")
def sass(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Code]:
    """The disassembly of one source with one tile of each kind."""
    nvcc, cuobjdump = shutil.which("nvcc"), shutil.which("cuobjdump")
    if nvcc is None or cuobjdump is None:
        pytest.skip("no nvcc or no cuobjdump on PATH")

    def dump(source: str) -> Code:
        target = tmp_path_factory.mktemp("sass") / "kernels.o"
        command = [nvcc, "-gencode=arch=compute_90a,code=sm_90a", "-DLP_FEW_TILES", "-O3", "-c"]
        path = CSRC / "kernels/cuda" / source
        run = subprocess.run([*command, str(path), "-o", str(target)], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-4000:]
        shown = subprocess.run([cuobjdump, "-sass", str(target)], capture_output=True, text=True)
        assert shown.returncode == 0, shown.stderr[-4000:]
        return functions(shown.stdout)

    return dump


def accesses(code: Code, name: str) -> list[list[str]]:
    """The names of the global accesses of every function whose mangled name contains ``name``."""
    found = [
        [instruction.split()[0] for instruction in body if re.match(r"(LDG|STG)\.", instruction)]
        for function, body in code.items()
        if name in function
    ]
    assert found, f"no {name}"
    return found


@needs_checkout
@pytest.mark.slow
@pytest.mark.parametrize("source", ["tensor_bf16.cu", "tensor_tf32.cu"])
def test_vectors_are_moved_in_one_access(sass: Callable[[str], Code], source: str) -> None:
    code = sass(source)
    half = source != "tensor_tf32.cu"
    pieces = 1 if half else 2  # of eight values
    for used in accesses(
        code, "depthwise_kernelINS0_4Bf16ELi3ELi1E" if half else "depthwise_kernelINS0_4Tf32ELi3ELi1E"
    ):
        # Three weights and six inputs; residuals of four outputs, biases.
        assert used.count("LDG.E.128") >= (3 + 6 + 4) * pieces
        assert used.count("STG.E.128") == pieces
    for used in accesses(code, "tensor_conv_kernel"):
        assert used.count("LDG.E.128") >= 2 * pieces  # residual and bias
        assert used.count("STG.E.128") >= pieces
    for used in accesses(code, "stage_kernel"):
        assert used.count("STG.E.128") == pieces
        assert not {"STG.E", "STG.E.64"} & set(used)
