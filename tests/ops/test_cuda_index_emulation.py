"""The CUDA kernels' index arithmetic, compiled for the host and compared with the reference: needs no GPU."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prune import ops
from lightning_prune.ops import reference
from tests.ops.conv_cases import TOLERANCE, ConvCase, conv_cases, error

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
CPU = torch.device("cpu")
ACTIVATION_NUMBER = {name: number for number, name in enumerate(ops.ACTIVATIONS)}


def compiled(source: str, *more: str) -> ctypes.CDLL:
    """The library of one emulation, compiled when it or a header of the CUDA kernels has changed."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    kernels = ROOT / "csrc" / "kernels" / "cuda"
    headers = [
        *sorted(kernels.glob("*.h")),
        *sorted(kernels.glob("*.cuh")),
        ROOT / "csrc/include/lp_params.h",
    ]
    used = [HERE / source, *(HERE / name for name in more), *headers]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in used)).hexdigest()[:16]
    library = ROOT / "build" / "test-objects" / f"{Path(source).stem}-{digest}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        partial = library.with_suffix(f".{os.getpid()}.tmp")
        flags = [
            "-O2",
            "-fsanitize=alignment",
            "-fsanitize-undefined-trap-on-error",
            "-std=c++17",
            "-Wall",
            "-Werror",
            "-Wno-unknown-pragmas",
            "-shared",
            "-fPIC",
        ]
        command = [
            compiler,
            *flags,
            f"-I{ROOT / 'csrc'}",
            f"-I{HERE}",
            str(HERE / source),
            "-o",
            str(partial),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        partial.replace(library)
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def emulator() -> ctypes.CDLL:
    return compiled("cuda_index_emulation.cpp")


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def strides(tensor: torch.Tensor) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * 4)(*tensor.stride())


def shape_of(case: ConvCase, x: torch.Tensor, y: torch.Tensor) -> ctypes.Array[ctypes.c_int64]:
    numbers = [
        *x.shape,
        case.outputs,
        *case.kernel,
        *y.shape[2:],
        *case.stride,
        *case.padding,
        *case.dilation,
        case.groups,
    ]
    numbers[1] = case.inputs
    return (ctypes.c_int64 * 17)(*numbers)


def index(values: torch.Tensor | None, count: int) -> tuple[ctypes.c_void_p, ctypes.c_int64]:
    return pointer(values), ctypes.c_int64(count if values is None else len(values))


def part(t: torch.Tensor, live: torch.Tensor | None) -> torch.Tensor:
    """Live channels of a map, in its memory format."""
    if live is None:
        return t
    last = not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last)
    small = t.index_select(1, live)
    return small.contiguous(memory_format=torch.channels_last) if last else small


@given(case=conv_cases((torch.float64,)), compact=st.booleans(), in_gated=st.booleans())
@settings(max_examples=80, deadline=None)
def test_masked_forward_and_backward(
    emulator: ctypes.CDLL, case: ConvCase, compact: bool, in_gated: bool
) -> None:
    x, weight, bias, gate, live_in, live_out = case.tensors(CPU)
    in_gate = case.randn(case.inputs) if in_gated else None
    leaves = [
        None if t is None else t.detach().clone().requires_grad_() for t in (x, weight, bias, gate, in_gate)
    ]
    entered = leaves[0] if leaves[4] is None else leaves[0] * leaves[4][:, None, None]
    expected = reference.masked_conv2d(entered, *leaves[1:4], live_in, live_out, *case.settings)
    grad_y = case.randn(*expected.shape)
    wanted = [t for t in leaves if t is not None]
    grads = iter(torch.autograd.grad(expected, wanted, grad_y, allow_unused=True))
    saved = expected.detach()
    if case.activation not in ("relu", "relu6", "sigmoid"):
        before = (*case.settings[:-1], "none")
        saved = reference.masked_conv2d(entered.detach(), weight, bias, gate, live_in, live_out, *before)
    if compact:  # maps of live channels only; lists, weight and vectors stay as they are
        x, expected = part(x, live_in), part(expected, live_out)
        grad_y, saved = part(grad_y, live_out), part(saved, live_out)
    shape, number = shape_of(case, x, expected), ctypes.c_int(ACTIVATION_NUMBER[case.activation])
    lists = (*index(live_in, case.inputs), *index(live_out, case.outputs))
    y = torch.zeros_like(expected).detach()
    x_and_w = (pointer(x), strides(x), pointer(weight), strides(weight))
    maps = (pointer(in_gate), ctypes.c_int(compact))
    emulator.emulate_forward(
        shape, *x_and_w, pointer(y), strides(y), pointer(bias), pointer(gate), *lists, number, *maps
    )
    assert error(y, expected) < TOLERANCE[torch.float64]

    # One stride argument serves both: the reference keeps a channels_last layout, the drawn gradient has none.
    saved, grad_y = saved.contiguous(), grad_y.contiguous()
    grad_x = torch.empty_strided(x.shape, x.stride(), dtype=torch.float64).zero_()
    grad_w = torch.zeros_like(weight)
    grad_b, grad_g = (torch.zeros(case.outputs).double() for _ in range(2))
    grad_ig = torch.zeros(case.inputs).double()
    emulator.emulate_backward(
        shape,
        pointer(grad_y),
        strides(grad_y),
        pointer(saved),
        *x_and_w,
        pointer(bias),
        pointer(gate),
        *lists,
        number,
        *(pointer(t) for t in (grad_x, grad_w, grad_b, grad_g)),
        *maps,
        pointer(grad_ig),
    )
    for leaf, result in zip(leaves, (grad_x, grad_w, grad_b, grad_g, grad_ig), strict=True):
        if leaf is not None:
            grad = next(grads)
            grad = torch.zeros_like(leaf) if grad is None else grad
            grad = part(grad, live_in) if compact and leaf is leaves[0] else grad
            assert error(result, grad) < TOLERANCE[torch.float64]


@given(case=conv_cases((torch.float64,)), outside=st.sampled_from([None, -1, 10**9]))
@settings(max_examples=40, deadline=None)
def test_compact(emulator: ctypes.CDLL, case: ConvCase, outside: int | None) -> None:
    x, weight, bias, _, _, _ = case.tensors(CPU)
    in_index = torch.randperm(case.inputs, generator=case.generator)
    if outside is not None:  # the kernel cannot raise: what no channel belongs to reads as zero
        x[:, in_index[0]] = 0
    packed = reference.pack_conv2d_weight(weight, case.groups)
    plain = reference.compact_conv2d(x, packed, None, None, in_index, None, case.weight_shape, *case.settings)
    width = case.outputs + 3
    residual = case.randn(plain.shape[0], width, *plain.shape[2:])
    out_index = torch.randperm(width, generator=case.generator)[: case.outputs]
    expected = reference.compact_conv2d(
        x, packed, bias, residual, in_index, out_index, case.weight_shape, *case.settings
    )
    y = reference.activation_function(case.activation)(
        residual
    ).contiguous()  # what the residual kernel writes
    if outside is not None:
        in_index[0] = outside
    emulator.emulate_compact(
        shape_of(case, x, plain),
        pointer(x),
        strides(x),
        pointer(packed),
        pointer(bias),
        pointer(residual),
        pointer(y),
        strides(y),
        *index(in_index, case.inputs),
        *index(out_index, case.outputs),
        ctypes.c_int64(case.inputs),
        ctypes.c_int64(width),
        ctypes.c_int(ACTIVATION_NUMBER[case.activation]),
    )
    assert error(y, expected) < TOLERANCE[torch.float64]
