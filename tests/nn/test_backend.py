"""Which implementation a CompactConv2d runs: asked for or measured, always the same numbers."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import pickle
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import ops
from lightning_prune.inference import choice
from lightning_prune.nn import CompactConv2d, _backend

needs_kernels = pytest.mark.skipif(not ops.extension_available(), reason="no compiled extension")
FORMATS = (torch.contiguous_format, torch.channels_last)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIGHTNING_PRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LIGHTNING_PRUNE_BACKEND", raising=False)
    return tmp_path / "cache"


def stored(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.json"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Made-up times per implementation; counts the measurements and still runs every candidate once."""
    state: dict[str, Any] = {"seconds": {"own": 1.0, "vendor": 2.0, "prepacked": 3.0}, "runs": 0}

    def timed(calls: dict[str, Any], device: torch.device) -> dict[str, float]:
        state["runs"] += 1
        state["results"] = {name: call().clone() for name, call in calls.items()}
        return {name: state["seconds"][name] for name in calls}

    monkeypatch.setattr(choice, "_interleaved", timed)
    return state


def make(activation: str = "relu", groups: int = 1, **indices: Tensor) -> tuple[CompactConv2d, nn.Conv2d]:
    conv = nn.Conv2d(6, 6 if groups > 1 else 9, 3, padding=1, groups=groups).eval()
    return CompactConv2d.from_conv(conv, None, activation, **indices), conv


@needs_kernels
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("activation", ["none", "relu", "relu6", "silu", "gelu"])
@pytest.mark.parametrize("form", ["plain", "residual", "depthwise", "gather and scatter"])
def test_all_candidates_compute_the_same(
    form: str, activation: str, memory_format: torch.memory_format, clock: dict[str, Any], cache: Path
) -> None:
    stream = torch.randn(2, 12, 8, 7).contiguous(memory_format=memory_format)
    if form == "gather and scatter":
        index = torch.tensor([1, 2, 4, 7, 9, 11])
        module, conv = make(activation, in_index=index, out_index=torch.arange(9) + 2)
        x, residual = stream, torch.randn(2, 12, 8, 7)
        sums = residual.double().index_add(1, torch.arange(9) + 2, conv.double()(x[:, index].double()))
    else:
        module, conv = make(activation, 6 if form == "depthwise" else 1)
        x = stream[:, :6].contiguous(memory_format=memory_format)
        sums = conv.double()(x.double())
        residual = torch.randn_like(sums, dtype=torch.float32) if form == "residual" else None
        sums = sums if residual is None else sums + residual
    before = None if residual is None else residual.clone()
    expected = ops.ACTIVATIONS[activation](sums).float()
    with torch.no_grad():
        for name in ("own", "vendor", "prepacked"):
            clock["seconds"] = {"own": 2.0, "vendor": 2.0, "prepacked": 2.0, name: 1.0}
            module._chooser = None
            for path in stored(cache):
                path.unlink()
            torch.testing.assert_close(module(x, residual), expected, rtol=1e-4, atol=1e-4)
            if residual is not None:
                assert torch.equal(residual, before)
    assert set(clock["results"]) >= {"own", "vendor"}
    assert ("prepacked" in clock["results"]) == (memory_format is torch.channels_last)
    for result in clock["results"].values():
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


@needs_kernels
def test_measured_once_per_shape_and_kept_on_disk(clock: dict[str, Any], cache: Path) -> None:
    module, _ = make()
    x = torch.randn(1, 6, 8, 8)
    with torch.no_grad():
        for _ in range(3):
            module(x)
        assert (clock["runs"], len(stored(cache))) == (1, 1)
        copy.deepcopy(module)(x)  # another module of the same shape: from disk
        pickle.loads(pickle.dumps(module))(x)
        assert clock["runs"] == 1
        module(torch.randn(2, 6, 8, 8))
        module(x.contiguous(memory_format=torch.channels_last))
        assert clock["runs"] == 3
    record = json.loads(stored(cache)[0].read_text())
    assert {"device", "torch", "extension", "threads", "input", "weight"} <= set(record["key"])


@needs_kernels
def test_every_algorithm_is_measured_by_itself(
    clock: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    conv, x = nn.Conv2d(12, 12, 3, padding=1).eval(), torch.randn(1, 12, 8, 8)
    with torch.no_grad():
        for settings in ({}, {"exact": True}, {"algorithm": "winograd2"}):
            CompactConv2d.from_conv(conv, **settings)(x)  # type: ignore[arg-type]
        assert clock["runs"] == 3
        CompactConv2d.from_conv(conv, algorithm="direct")(x)  # what exact=True runs as well
        assert clock["runs"] == 3
        # another version of this package packs something else for the same settings
        monkeypatch.setattr(CompactConv2d, "_algorithm", lambda self, weight: "winograd2")
        CompactConv2d.from_conv(conv, exact=True)(x)
        assert clock["runs"] == 3
        monkeypatch.setattr(CompactConv2d, "_algorithm", lambda self, weight: "winograd4")
        CompactConv2d.from_conv(nn.Conv2d(12, 12, 3, stride=2, padding=1))(x)
        monkeypatch.setattr(CompactConv2d, "_algorithm", lambda self, weight: "direct")
        CompactConv2d.from_conv(nn.Conv2d(12, 12, 3, stride=2, padding=1))(x)
        assert clock["runs"] == 5


@needs_kernels
@pytest.mark.parametrize(("own", "taken"), [(0.969, True), (0.975, False), (1.5, False)])
def test_ours_must_win_by_three_percent(own: float, taken: bool, clock: dict[str, Any]) -> None:
    clock["seconds"] = {"own": own, "vendor": 1.0, "prepacked": 9.0}
    module, _ = make()
    x = torch.randn(1, 6, 8, 8)
    with torch.no_grad():
        module(x)
    assert module._chooser is not None
    (run,) = module._chooser._chosen.values()
    assert (run == module._compiled) == taken


@needs_kernels
@pytest.mark.parametrize("how", ["argument", "environment"])
def test_what_is_asked_for_is_not_measured(
    how: str, clock: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(1, 6, 8, 8)
    for name in ("own", "vendor"):
        conv = nn.Conv2d(6, 9, 3).eval()
        if how == "environment":
            monkeypatch.setenv("LIGHTNING_PRUNE_BACKEND", name)
        module = CompactConv2d.from_conv(conv, backend=name if how == "argument" else None)
        with torch.no_grad():
            torch.testing.assert_close(module(x), conv(x), rtol=1e-5, atol=1e-5)
    assert clock["runs"] == 0


def test_misspelt() -> None:
    with pytest.raises(ValueError, match="backend must be auto, own, vendor or None; got 'fast'"):
        CompactConv2d.from_conv(nn.Conv2d(6, 9, 3), backend="fast")


def test_misspelt_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_PRUNE_BACKEND", "fast")
    with pytest.raises(ValueError, match="must be one of auto, own, vendor; got 'fast'"):
        make()[0](torch.randn(1, 6, 8, 8))


@needs_kernels
def test_not_while_something_must_be_reproducible_or_needs_a_gradient(clock: dict[str, Any]) -> None:
    module, _ = make()
    module(torch.randn(1, 6, 8, 8, requires_grad=True)).sum().backward()
    torch.use_deterministic_algorithms(True)
    try:
        module(torch.randn(1, 6, 8, 8))
    finally:
        torch.use_deterministic_algorithms(False)
    assert clock["runs"] == 0


@needs_kernels
def test_other_weights_are_used_after_loading_and_converting(clock: dict[str, Any]) -> None:
    clock["seconds"] = {"own": 5.0, "vendor": 1.0, "prepacked": 2.0}
    module, _ = make()
    other, conv = make()
    x = torch.randn(1, 6, 8, 8)
    with torch.no_grad():
        module(x)
        module.load_state_dict(other.state_dict())
        torch.testing.assert_close(module(x), conv(x).relu(), rtol=1e-5, atol=1e-5)
        wide = module.double()(x.double())
    torch.testing.assert_close(wide, conv.double()(x.double()).relu(), rtol=1e-5, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("kept", [True, False])
def test_first_calls_at_once_measure_in_turns(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kept:
        monkeypatch.setenv("LIGHTNING_PRUNE_CACHE", "off")
    running, most, runs = [0], [0], [0]
    real = choice._interleaved

    def timed(calls: dict[str, Any], device: torch.device) -> dict[str, float]:
        running[0] += 1
        runs[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.02)
        try:
            return real(calls, device)
        finally:
            running[0] -= 1

    monkeypatch.setattr(choice, "_interleaved", timed)
    conv, x = nn.Conv2d(6, 9, 3, padding=1).eval(), torch.randn(1, 6, 8, 8)
    modules = [CompactConv2d.from_conv(conv) for _ in range(2)]
    expected, wrong = conv(x).detach(), []

    def call(module: CompactConv2d) -> None:
        with torch.no_grad():
            wrong.extend([1] if not torch.allclose(module(x), expected, rtol=1e-4, atol=1e-5) else [])

    threads = [threading.Thread(target=call, args=(module,)) for module in modules * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (wrong, most[0]) == ([], 1)
    assert runs[0] == (1 if kept else 2)  # once for each module, or once for both where it is kept on disk


@needs_kernels
def test_measuring_within_a_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that is timed may hold modules that have not measured yet."""
    module, conv = make()
    x = torch.randn(1, 6, 8, 8)
    with choice.one_at_a_time(), torch.no_grad():
        torch.testing.assert_close(module(x), conv(x).relu(), rtol=1e-4, atol=1e-5)


@needs_kernels
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_may_measure_while_its_parent_does() -> None:
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with choice.one_at_a_time():
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            os._exit(0 if choice._lock.acquire(timeout=5) else 1)
        os._exit(2)
    done.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@needs_kernels
def test_many_shapes_are_not_all_measured(clock: dict[str, Any]) -> None:
    module, conv = make()
    with torch.no_grad():
        for size in range(4, 4 + _backend.LIMIT + 5):
            x = torch.randn(1, 6, size, size)
            torch.testing.assert_close(module(x), conv(x).relu(), rtol=1e-5, atol=1e-5)
    assert clock["runs"] == _backend.LIMIT


@needs_kernels
def test_real_times_never_choose_a_kernel_that_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    real = CompactConv2d._compiled

    def slow(self: CompactConv2d, x: Tensor, residual: Tensor | None) -> Tensor:
        time.sleep(0.002)
        return real(self, x, residual)

    monkeypatch.setattr(CompactConv2d, "_compiled", slow)
    module, _ = make()
    with torch.no_grad():
        module(torch.randn(1, 6, 8, 8))
    assert module._chooser is not None
    (run,) = module._chooser._chosen.values()
    assert run != module._compiled
