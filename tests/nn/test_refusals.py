"""What `CompactConv2d` must refuse: it would compute something else than torch, silently."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import ops, optimize_for_inference
from lightning_prune.nn import CompactConv2d, MaskedConv2d

BACKENDS = ("own", "vendor", "auto")


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_PRUNE_CACHE", "off")


@pytest.mark.parametrize("kind", [CompactConv2d, MaskedConv2d])
@pytest.mark.parametrize(
    "module", [nn.ConvTranspose2d(4, 6, 3), nn.Conv1d(4, 6, 3), nn.Conv3d(4, 6, 3), nn.Linear(4, 4)]
)
def test_other_modules_than_two_dimensional_convolutions(
    kind: type[CompactConv2d] | type[MaskedConv2d], module: nn.Module
) -> None:
    name = type(module).__name__
    with pytest.raises(ValueError, match=rf"conv must be an nn.Conv2d; got {name}; (leave|optimize)"):
        kind.from_conv(module)  # type: ignore[arg-type]


def test_other_norms() -> None:
    with pytest.raises(ValueError, match=r"norm must be an nn.BatchNorm2d or None; got GroupNorm; keep"):
        CompactConv2d.from_conv(nn.Conv2d(4, 6, 3), nn.GroupNorm(2, 6))  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_maps_of_integers(backend: str, dtype: torch.dtype) -> None:
    module = CompactConv2d.from_conv(nn.Conv2d(6, 4, 1), backend=backend)
    x = torch.ones(1, 6, 2, 2).to(dtype)
    with torch.no_grad():
        for call in (module, module._own):
            with pytest.raises(
                ValueError, match=rf"x must be float32.*got {dtype}; convert it first: x.float"
            ):
                call(x, None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_optimized_networks_do_not_take_integers(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_PRUNE_BACKEND", backend)
    network = nn.Sequential(nn.Conv2d(6, 9, 3, padding=1), nn.ReLU(), nn.Conv2d(9, 9, 3), nn.Conv2d(9, 3, 1))
    fast = optimize_for_inference(network, torch.randn(1, 6, 8, 8))
    with pytest.raises((RuntimeError, ValueError)), torch.no_grad():
        fast(torch.ones(1, 6, 8, 8, dtype=torch.int64))


def test_weights_of_integers() -> None:
    with pytest.raises(ValueError, match=r"weight must be float32.*got torch.int64; convert it first"):
        ops.pack_conv2d_weight(torch.ones(4, 6, 1, 1, dtype=torch.int64))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(6, 8, 8), (6,), (1, 6, 1, 8, 8)])
def test_maps_of_other_dimensions(backend: str, shape: tuple[int, ...]) -> None:
    conv = nn.Conv2d(6, 4, 1)
    module, x = CompactConv2d.from_conv(conv, backend=backend), torch.randn(shape)
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"x must be 4-D \(N, C, H, W\); got shape .*unsqueeze"),
    ):
        module(x)
    with pytest.raises(ValueError, match=r"x must be 4-D"):
        ops.compact_conv2d(x, module.packed, None, None, None, None, module.weight_shape)


def call(module: CompactConv2d, x: Tensor, residual: Tensor, gradient: bool) -> Tensor:
    with torch.set_grad_enabled(gradient):
        return module(x.clone().requires_grad_(gradient), residual)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_residuals_are_not_broadcast(backend: str, gradient: bool) -> None:
    module = CompactConv2d.from_conv(nn.Conv2d(6, 9, 3, padding=1), backend=backend)
    x = torch.randn(2, 6, 8, 8)
    call(module, x, torch.randn(2, 9, 8, 8), gradient)  # what is known already is looked at as well
    for shape in ((2, 9, 8, 1), (1, 9, 8, 8), (9, 8, 8), (2, 1, 8, 8)):
        with pytest.raises((RuntimeError, ValueError), match=r"residual must.* shape \(2, 9, 8, 8\).*; got"):
            call(module, x, torch.randn(shape), gradient)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_streams_are_not_broadcast(backend: str, gradient: bool) -> None:
    module = CompactConv2d.from_conv(
        nn.Conv2d(6, 2, 3, padding=1), out_index=torch.tensor([1, 4]), backend=backend
    )
    x = torch.randn(2, 6, 8, 8)
    assert call(module, x, torch.randn(2, 12, 8, 8), gradient).shape == (2, 12, 8, 8)
    for shape in ((1, 12, 8, 8), (2, 12, 8, 1)):
        with pytest.raises((RuntimeError, ValueError), match=r"residual must.* shape \(2, 12, 8, 8\).*; got"):
            call(module, x, torch.randn(shape), gradient)
