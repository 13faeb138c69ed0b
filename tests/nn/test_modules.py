"""CompactConv2d and MaskedConv2d: drop-ins for nn.Conv2d."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from lightning_prune import ops
from lightning_prune.nn import CompactConv2d, MaskedConv2d

ACTIVATION_MODULES = [
    nn.ReLU(),
    nn.ReLU6(),
    nn.SiLU(),
    nn.Hardswish(),
    nn.GELU(),
    nn.Sigmoid(),
    nn.Identity(),
]


def trained_norm(channels: int, **kwargs: bool) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, **kwargs)
    norm.running_mean = torch.randn(channels)
    norm.running_var = torch.rand(channels) + 0.5
    if norm.affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return norm.eval()


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(7, 11, 3, padding=1),
        nn.Conv2d(6, 9, (3, 1), stride=(2, 1), groups=3, bias=False),
        nn.Conv2d(13, 13, 3, groups=13, padding="same", dilation=2),
        nn.Conv2d(5, 37, 1, padding="valid"),
    ],
    ids=["plain", "grouped", "depthwise", "pointwise"],
)
@pytest.mark.parametrize("affine", [True, False, None], ids=["affine", "plain-norm", "no-norm"])
def test_compact_folds_conv_norm_activation(
    device: torch.device, conv: nn.Conv2d, affine: bool | None
) -> None:
    conv = copy.deepcopy(conv).to(device)
    norm = None if affine is None else trained_norm(conv.out_channels, affine=affine).to(device)
    x = torch.randn(3, conv.in_channels, 9, 8, device=device)
    for activation in ACTIVATION_MODULES:
        fused = CompactConv2d.from_conv(conv, norm, activation)
        assert not list(fused.parameters())
        with torch.no_grad():
            expected = activation(conv(x) if norm is None else norm(conv(x)))
            torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-4)


def test_compact_survives_state_dict_deepcopy_and_dtype(device: torch.device) -> None:
    conv = nn.Conv2d(5, 9, 3, padding=1).to(device)
    index = torch.tensor([6, 0, 3, 3, 1], device=device)
    fused = CompactConv2d.from_conv(conv, trained_norm(9).to(device), "silu", in_index=index)
    x = torch.randn(2, 7, 6, 6, device=device)
    expected = fused(x)
    buffer = io.BytesIO()
    torch.save(fused.state_dict(), buffer)
    buffer.seek(0)
    empty_index = torch.zeros(5, dtype=torch.int64)
    fresh = CompactConv2d([9, 5, 3, 3], padding=1, activation="silu", in_index=empty_index).to(device)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(fresh(x), expected)
    assert torch.equal(copy.deepcopy(fused)(x), expected)
    assert torch.equal(fused.weight, ops.unpack_conv2d_weight(fused.packed, [9, 5, 3, 3]))
    for dtype, tolerance in ((torch.bfloat16, 3e-2), (torch.float16, 3e-3), (torch.float64, 1e-5)):
        other = copy.deepcopy(fused).to(dtype)
        y = other(x.to(dtype))
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), expected, rtol=tolerance, atol=tolerance)


def test_compact_residual_stream_subset(device: torch.device) -> None:
    conv = nn.Conv2d(3, 2, 1).to(device)
    out_index = torch.tensor([4, 1], device=device)
    fused = CompactConv2d.from_conv(conv, activation="relu", out_index=out_index)
    x, stream = torch.randn(2, 3, 4, 4, device=device), torch.randn(2, 6, 4, 4, device=device)
    with torch.no_grad():
        expected = stream.clone()
        expected[:, out_index] += conv(x)
        torch.testing.assert_close(fused(x, stream), expected.relu())


def test_compact_compiles_and_exports(device: torch.device) -> None:
    if not ops.extension_available():
        pytest.skip("no compiled extension")
    model = nn.Sequential(
        CompactConv2d.from_conv(nn.Conv2d(3, 5, 3, padding=1), activation="relu"),
        CompactConv2d.from_conv(nn.Conv2d(5, 4, 3, stride=2), activation=None),
    ).to(device)
    x = torch.randn(2, 3, 9, 9, device=device)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
        assert "lightning_prune.compact_conv2d" in program.graph_module.code
        torch.testing.assert_close(program.module()(x), expected)
        assert program.module()(torch.randn(5, 3, 9, 9, device=device)).shape[0] == 5


def test_compact_input_that_requires_grad_uses_the_reference(device: torch.device) -> None:
    conv = nn.Conv2d(3, 5, 3).to(device)
    x = torch.randn(1, 3, 5, 5, device=device, requires_grad=True)
    (own,) = torch.autograd.grad(CompactConv2d.from_conv(conv)(x).square().sum(), x)
    (expected,) = torch.autograd.grad(conv(x).square().sum(), x)
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [CompactConv2d, MaskedConv2d])
def test_what_cannot_be_converted_says_why(kind: type[CompactConv2d] | type[MaskedConv2d]) -> None:
    with pytest.raises(ValueError, match="padding_mode must be 'zeros', got 'circular'"):
        kind.from_conv(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"))
    with pytest.raises(ValueError, match="not symmetric"):
        kind.from_conv(nn.Conv2d(2, 2, 2, padding="same"))
    with pytest.raises(ValueError, match="no fused form"):
        kind.from_conv(nn.Conv2d(2, 2, 3), activation=nn.GELU(approximate="tanh"))
    with pytest.raises(ValueError, match="activation must be one of none, relu"):
        kind.from_conv(nn.Conv2d(2, 2, 3), activation="relu7")


def test_compact_checks_norm_and_indices() -> None:
    conv = nn.Conv2d(2, 3, 3)
    with pytest.raises(ValueError, match="must have 3 features"):
        CompactConv2d.from_conv(conv, nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match="running statistics"):
        CompactConv2d.from_conv(conv, nn.BatchNorm2d(3, track_running_stats=False))
    with pytest.raises(ValueError, match="in_index must have 2 entries"):
        CompactConv2d.from_conv(conv, in_index=torch.tensor([0]))
    with pytest.raises(ValueError, match="out_index must be unique"):
        CompactConv2d.from_conv(conv, out_index=torch.tensor([0, 1, 1]))


def test_masked_equals_conv_when_everything_lives(device: torch.device) -> None:
    conv = nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2).to(device)
    masked = MaskedConv2d.from_conv(conv)
    assert masked.weight is conv.weight
    assert list(masked.state_dict()) == list(conv.state_dict())
    x = torch.randn(2, 6, 9, 9, device=device)
    torch.testing.assert_close(masked(x), conv(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(masked(x[0]), conv(x[0]), rtol=1e-4, atol=1e-5)
    fresh = MaskedConv2d(6, 8, 3, stride=2, padding=1, groups=2, device=device)
    fresh.load_state_dict(conv.state_dict())
    assert torch.equal(fresh(x), masked(x))


def test_masked_trains_live_channels_and_gate_only(device: torch.device) -> None:
    masked = MaskedConv2d(5, 7, 3, padding=1, activation=nn.ReLU(), device=device)
    gate = torch.rand(7, device=device).add(0.5).requires_grad_()
    masked.set_gate(gate)
    live_in, live_out = torch.tensor([0, 3]), torch.tensor([2, 5, 6])
    masked.set_live(live_in, live_out)
    y = masked(torch.randn(2, 5, 6, 6, device=device))
    y.sum().backward()
    dead = torch.ones(7, dtype=torch.bool)
    dead[live_out] = False
    for grad in (masked.weight.grad, masked.bias.grad, gate.grad):
        assert grad is not None
        assert grad[live_out.to(device)].any()
        assert not grad[dead.to(device)].any()
    assert not masked.weight.grad[:, [1, 2, 4]].any()  # type: ignore[index]
    assert not y[:, dead.to(device)].any()
    assert "live_in=2" in repr(masked)
    assert "live_out=3" in repr(masked)


def test_masked_rejects_bad_indices_and_gates() -> None:
    masked = MaskedConv2d(4, 4, 3)
    with pytest.raises(ValueError, match="live_in must be sorted and unique"):
        masked.set_live(torch.tensor([2, 1]), None)
    with pytest.raises(ValueError, match=r"live_out must hold channels in \[0, 4\)"):
        masked.set_live(None, torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="1-D int64"):
        masked.set_live(torch.tensor([True, False]), None)
    with pytest.raises(ValueError, match=r"gate must have shape \(4,\), got \(3,\)"):
        masked.set_gate(torch.ones(3))
