"""oneDNN with prepacked weights: the vendor's numbers, and a module like any other."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import ops, optimize_for_inference
from lightning_prune.inference import choice, optimize
from lightning_prune.inference.folded import FoldedConv2d
from lightning_prune.inference.prepacked import PrepackedConv2d
from lightning_prune.inference.sites import ConvSite

from .networks import network

LAST = torch.channels_last
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
needs_kernels = pytest.mark.skipif(not ops.extension_available(), reason="no compiled extension")


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_PRUNE_CACHE", str(tmp_path))
    monkeypatch.delenv("LIGHTNING_PRUNE_BACKEND", raising=False)


def conv(**options: Any) -> nn.Conv2d:
    settings = {"in_channels": 6, "out_channels": 10, "kernel_size": 3, "padding": 1, **options}
    return nn.Conv2d(**settings).eval().requires_grad_(False)


def packed(module: PrepackedConv2d) -> bool:
    return module._run is not None


@needs_onednn
@pytest.mark.parametrize("activation", ["none", "relu", "relu6", "silu", "gelu"])
@pytest.mark.parametrize(
    "options",
    [{}, {"kernel_size": 1, "padding": 0, "bias": False}, {"stride": 2}, {"dilation": 2, "padding": "same"},
     {"groups": 2}, {"out_channels": 6, "groups": 6}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("sum_with", ["nothing", "the same shape", "one value per channel"])
def test_it_computes_what_torch_computes(options: dict[str, Any], activation: str, sum_with: str) -> None:
    layer = conv(**options)
    module, expected = (
        PrepackedConv2d(layer, activation),
        FoldedConv2d(copy.deepcopy(layer).double(), activation),
    )
    for images, size in ((2, 9), (1, 9), (3, 5)):  # packed for the first shape, used for all
        x = torch.randn(images, 6, size, size + 1).contiguous(memory_format=LAST)
        y = expected.conv(x.double())
        residual = {
            "nothing": None, "the same shape": torch.randn(y.shape), "one value per channel": torch.randn(y.shape[1], 1, 1),
        }[sum_with]  # fmt: skip
        before = None if residual is None else residual.clone()
        found = module(x, residual)
        assert packed(module) == (sum_with != "one value per channel")
        reference = expected(x.double(), None if residual is None else residual.double())
        torch.testing.assert_close(found.double(), reference, rtol=1e-5, atol=1e-5)
        assert found.is_contiguous(memory_format=LAST)
        if residual is not None:
            assert torch.equal(residual, before)  # type: ignore[arg-type]


@needs_onednn
def test_other_inputs_take_the_ordinary_way() -> None:
    module = PrepackedConv2d(conv(), "relu")
    x = torch.randn(2, 6, 8, 8)
    module(x)  # contiguous
    module(x.contiguous(memory_format=LAST).requires_grad_()).sum().backward()
    module.double()(x.double().contiguous(memory_format=LAST))
    module.float()(x[:0])
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x.contiguous(memory_format=LAST)), module(x))
    assert not packed(module)
    with pytest.raises(RuntimeError, match="channels"):
        module(torch.randn(2, 5, 8, 8).contiguous(memory_format=LAST))
    with pytest.raises(ValueError, match="padding_mode must be 'zeros'"):
        PrepackedConv2d(conv(padding_mode="reflect"))


@needs_onednn
def test_it_copies_pickles_saves_loads_and_converts() -> None:
    module, x = PrepackedConv2d(conv(), "relu"), torch.randn(2, 6, 8, 8).contiguous(memory_format=LAST)
    y = module(x)
    assert packed(module)
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    for twin in (
        copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(stream, weights_only=False),
    ):  # fmt: skip
        assert not packed(twin)
        assert torch.equal(twin(x), y)
    other = PrepackedConv2d(conv(), "relu")
    assert not torch.equal(other(x), y)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), y)
    torch.testing.assert_close(module.double()(x.double()).float(), y, rtol=1e-5, atol=1e-5)
    assert torch.equal(module.float()(x), y)


@needs_onednn
def test_many_threads_may_call_a_module_that_nobody_has_called() -> None:
    module, x = PrepackedConv2d(conv(), "relu"), torch.randn(2, 6, 8, 8).contiguous(memory_format=LAST)
    found: list[Tensor] = []
    barrier = threading.Barrier(8)

    def call() -> None:
        barrier.wait()
        with torch.inference_mode():
            found.append(module(x))

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(torch.equal(y, found[0]) for y in found)


def test_where_it_is_tried() -> None:
    cpu = torch.device("cpu")

    def kinds(dtype: torch.dtype = torch.float32, **options: Any) -> list[str]:
        return choice.further_kinds(
            ConvSite("conv", conv(**options), None, "relu", False, (1, 6, 8, 8)), dtype, cpu
        )

    assert kinds() == (["prepacked"] if torch.backends.mkldnn.is_available() else [])
    assert kinds(torch.float64) == kinds(padding_mode="reflect") == kinds(kernel_size=2, padding="same") == []


@needs_onednn
@needs_kernels
@pytest.mark.parametrize("name", ["plain", "residual", "depthwise", "concat"])
@pytest.mark.parametrize("wins", ["each", "whole"])
def test_a_network_of_prepacked_convolutions(name: str, wins: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it wins every layer, and where ours does but the whole network does not."""
    times = {f"{kind}/{form}": 3.0 for kind in ("vendor", "own") for form in choice.FORMATS}
    times |= {"prepacked/channels_last": 2.0}
    if wins == "whole":
        times["own/channels_last"] = 1.0
    monkeypatch.setattr(
        choice,
        "seconds",
        lambda site, *_: {k: v for k, v in times.items() if "pre" not in k or site.prepacked()},
    )
    monkeypatch.setattr(
        optimize, "_fastest", lambda found, inputs: next(c for c in found if "prepacked" in c.layers.values())
    )
    model, x = network(name).eval(), torch.randn(2, 3, 16, 16)
    fast = optimize_for_inference(model, x)
    ran = [m for m in fast.modules() if type(m) is PrepackedConv2d]
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    assert ran
    assert any(map(packed, ran))
    assert sum(kind == "prepacked" for kind in fast.layers.values()) == len(ran)


@pytest.mark.parametrize(("ours", "taken"), [(0.98, "vendor"), (0.96, "own")])
def test_as_a_whole_too_ours_must_win_by_three_percent(
    ours: float, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [
        optimize.OptimizedModule(nn.Identity(), layers={"conv": kind}) for kind in ("vendor", "own", "own")
    ]
    seconds = {"0": 1.0, "1": ours, "2": 1.05}

    def compare(named: dict[str, nn.Module], *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {name: SimpleNamespace(median=seconds[name], p10=seconds[name]) for name in named}

    monkeypatch.setattr(optimize, "compare_latency", compare)
    best = optimize._fastest(made, torch.zeros(1))
    assert best.layers == {"conv": taken}
    assert best is made[0 if taken == "vendor" else 1]
