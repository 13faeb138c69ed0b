"""The vendor's convolution at multiples of 8 channels: the same numbers, and maps that need no copy."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_prune import ops, optimize_for_inference
from lightning_prune.inference import choice, optimize
from lightning_prune.inference.folded import FoldedConv2d
from lightning_prune.inference.padded import PaddedConv2d
from lightning_prune.inference.sites import ConvSite
from lightning_prune.ops.tensor_cores import padded_output, room_of, with_room
from tests.inference.networks import network


@given(
    inputs=st.sampled_from([1, 3, 8, 13, 37]),
    outputs=st.sampled_from([1, 5, 8, 19]),
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    batch=st.integers(1, 3),
    kernel=st.sampled_from([1, 3]),
    stride=st.integers(1, 2),
    activation=st.sampled_from(sorted(ops.ACTIVATIONS)),
    bias=st.booleans(),
    residual=st.booleans(),
    room=st.sampled_from(["none", "zeros", "contiguous"]),
)
@settings(max_examples=60, deadline=None)
def test_numbers_are_those_of_the_convolution(
    inputs: int, outputs: int, size: tuple[int, int], batch: int, kernel: int, stride: int, activation: str,
    bias: bool, residual: bool, room: str,
) -> None:  # fmt: skip
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=bias).double().requires_grad_(False)
    x = torch.randn(batch, inputs, *size, dtype=torch.float64)
    x = with_room(x) if room == "zeros" else x
    x = x.contiguous(memory_format=torch.channels_last) if room == "none" else x
    add = torch.randn_like(conv(x)) if residual else None
    expected = FoldedConv2d(conv, activation)(x, add)
    y = PaddedConv2d(conv, activation)(x, add)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    behind = room_of(y)
    assert behind.shape[1] % 8 == 0
    assert behind.isfinite().all()
    torch.testing.assert_close(behind[:, :outputs], expected, rtol=1e-10, atol=1e-10)


def test_a_chain_copies_nothing_between_its_layers() -> None:
    first, second = (
        PaddedConv2d(nn.Conv2d(a, b, 3, padding=1).requires_grad_(False), "sigmoid")
        for a, b in ((5, 13), (13, 9))
    )
    seen: list[Tensor] = []
    second.conv.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = torch.randn(2, 5, 6, 6).contiguous(memory_format=torch.channels_last)
    middle = first(x, torch.randn(2, 13, 6, 6))
    second(middle)
    assert middle.shape[1] == 13
    assert seen[0].shape[1] == 16
    assert seen[0].data_ptr() == middle.data_ptr()
    assert (seen[0][:, 13:] == 0.5).all()  # sigmoid(0)


def test_room_is_read_where_it_is_and_nowhere_else() -> None:
    x = with_room(torch.randn(2, 5, 4, 4))
    assert room_of(x).data_ptr() == x.data_ptr()
    assert (room_of(x)[:, 5:] == 0).all()
    aligned = torch.randn(2, 16, 4, 4)
    assert room_of(aligned) is aligned
    # The last pixel's room would lie outside of the storage.
    short = torch.randn(2 * 16 * 8 - 3).as_strided((2, 5, 4, 4), (128, 1, 32, 8))
    for other in (
        short,
        torch.randn(2, 5, 4, 4),
        torch.randn(2, 5, 4, 4).contiguous(memory_format=torch.channels_last),
        torch.randn(2, 24, 4, 4).contiguous(memory_format=torch.channels_last)[:, :5],
        with_room(torch.randn(2, 5, 4, 4)).requires_grad_(),
    ):
        wide = room_of(other)
        assert wide.data_ptr() != other.data_ptr()
        assert torch.equal(wide[:, :5], other)
        assert (wide[:, 5:] == 0).all()


def test_gradients_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    conv = nn.Conv2d(3, 5, 3).double().requires_grad_(False)
    x = torch.randn(1, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(PaddedConv2d(conv, "silu"), (x,))


def test_who_is_padded() -> None:
    def padded(**changes: Any) -> bool:
        options = {"in_channels": 8, "out_channels": 12, "kernel_size": 3, **changes}
        return ConvSite("conv", nn.Conv2d(**options), None, "relu", False, (1, 8, 8, 8)).padded() is not None

    assert padded()
    assert padded(in_channels=5, out_channels=8)
    assert not padded(out_channels=16)
    assert not padded(groups=4)
    assert not padded(padding=1, padding_mode="reflect")


@pytest.mark.parametrize("name", ["plain", "residual"])
def test_a_network_of_padded_convolutions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: padded wins every layer that can be padded, or the network of these as a whole."""
    if not ops.extension_available():
        pytest.skip("no compiled extension")
    model, x = network(name).eval(), torch.randn(2, 3, 16, 16)
    for module in (choice, optimize):
        monkeypatch.setattr(module, "further_kinds", lambda site, *_: ["padded"] if site.padded() else [])
    monkeypatch.setattr(optimize, "_segmented", lambda *arguments: [])
    for wins in ("whole", "each"):
        times = {"vendor/contiguous": 3.0, "own/contiguous": 3.0, "vendor/channels_last": 3.0}
        times |= {"own/channels_last": 1.0 if wins == "whole" else 3.0, "padded/channels_last": 2.0}
        monkeypatch.setattr(
            choice,
            "seconds",
            lambda site, *_, t=times: {k: v for k, v in t.items() if "padded" not in k or site.padded()},
        )
        monkeypatch.setattr(
            optimize,
            "_fastest",
            lambda found, inputs: next(c for c in found if "padded" in c.layers.values()),
        )
        fast = optimize_for_inference(copy.deepcopy(model), x)
        assert "padded" in fast.layers.values()
        assert any(type(m) is PaddedConv2d for m in fast.modules())
        with torch.no_grad():
            torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


def test_padded_outputs_have_the_layout_of_the_kernels() -> None:
    x = torch.randn(2, 5, 4, 4).contiguous(memory_format=torch.channels_last)
    y = PaddedConv2d(nn.Conv2d(5, 5, 1).requires_grad_(False), "relu")(x)
    assert y.stride() == padded_output(x, (2, 5, 4, 4)).stride()
