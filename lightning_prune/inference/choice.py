"""Which module computes a convolution fastest here: measured once per layer, kept on disk."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable
from statistics import median
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..ops.availability import can_run_compact_conv2d
from ..ops.tensor_cores import with_room
from . import cache
from .cuda_graph import seconds_per_call
from .sites import ConvSite

Backend = Literal["auto", "own", "vendor"]
BACKENDS = ("auto", "own", "vendor")
#: our kernel must be so much faster to be taken
MARGIN = 1.03
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
#: on a GPU
_ROUNDS = 9
#: turns of each candidate at least, seconds that are measured per candidate and that one turn takes, calls of a turn
_TURNS, _SECONDS, _TURN, _FEW, _MOST = 3, 0.015, 2e-3, 2, 16
#: seconds of a call from which a turn is a single one
_LONG = 0.02
#: slower than the fastest by so much after a few calls: not measured any further
_HOPELESS = 1.5
#: as good as the fastest: by how much the margin and noise could decide
_CLOSE = MARGIN**2


_lock = threading.RLock()  # a network that is measured may hold modules that measure


def one_at_a_time() -> contextlib.AbstractContextManager[bool]:
    """The lock under which this process measures: two measurements at once would disturb each other."""
    return _lock


def _new_lock() -> None:
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):  # a thread that held it does not live on in the child
    os.register_at_fork(after_in_child=_new_lock)


def backend() -> Backend:
    """The value of ``LIGHTNING_PRUNE_BACKEND``: auto (measure, the default), own or vendor.

    Raises:
        ValueError: another value.
    """
    value = os.environ.get("LIGHTNING_PRUNE_BACKEND", "auto").strip().lower() or "auto"
    if value not in BACKENDS:
        raise ValueError(f"LIGHTNING_PRUNE_BACKEND must be one of {', '.join(BACKENDS)}; got {value!r}")
    return cast(Backend, value)


def can_run_own(site: ConvSite, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the compiled kernel takes the site's input."""
    with torch.no_grad():
        empty = torch.empty((0, *site.shape[1:]), dtype=dtype, device=device)
        return can_run_compact_conv2d(empty).ok and site.packed_elements(dtype) is not None


def seconds(site: ConvSite, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Median time of one call: ``"own/channels_last"``, ``"vendor/contiguous"`` and so on, from the cache or measured."""
    conv = site.conv
    layer = {
        "dtype": str(dtype), "input": list(site.shape), "weight": list(conv.weight.shape), "stride": list(conv.stride),
        "padding": str(conv.padding), "dilation": list(conv.dilation), "groups": conv.groups, "mode": conv.padding_mode,
        "bias": conv.bias is not None or site.norm is not None, "activation": site.activation, "residual": site.residual,
        "packed": site.packed_elements(dtype),
    }  # fmt: skip
    key: dict[str, Any] = {**cache.environment(device), **layer}
    wanted = {f"{kind}/{name}" for kind in ("vendor", "own") for name in FORMATS}
    wanted |= {f"{kind}/channels_last" for kind in further_kinds(site, dtype, device)}
    with one_at_a_time():
        found = cache.load(key)
        if found is None or set(found) != wanted:
            found = _measure(site, dtype, device)
            cache.store(key, found)
    return found


def further_kinds(site: ConvSite, dtype: torch.dtype, device: torch.device) -> list[str]:
    """Other ways to run the vendor's convolution on channels_last maps, "vendor" aside.

    "padded", to multiples of 8 channels, on a GPU, where there are others; "prepacked", in oneDNN's layout, on a CPU.
    """
    if device.type == "cuda":
        return ["padded"] if site.padded() is not None else []
    able = device.type == "cpu" and dtype is torch.float32 and torch.backends.mkldnn.is_available()
    return ["prepacked"] if able and site.prepackable else []


def fastest_kind(site: ConvSite, dtype: torch.dtype, device: torch.device, memory_format: str) -> str:
    """Ours, "own", where it beats all others by the margin on maps of this memory format, else the fastest of the others.

    Within one format: a network runs in one, and which one is decided by timing whole networks.
    """
    times = seconds(site, dtype, device)
    by_kind = {
        name.split("/")[0]: value for name, value in times.items() if name.endswith(f"/{memory_format}")
    }
    own = by_kind.pop("own")
    best = min(by_kind, key=by_kind.__getitem__)
    return "own" if own * MARGIN <= by_kind[best] else best


def _measure(site: ConvSite, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(site.shape, generator=generator).to(device, dtype)
    own = site.own()
    assert own is not None
    calls: dict[str, Callable[[], Tensor]] = {}
    with torch.inference_mode():
        for name, memory_format in FORMATS.items():
            modules: dict[str, nn.Module | None] = {"vendor": site.vendor(), "own": own}
            if name == "channels_last":
                modules |= {kind: getattr(site, kind)() for kind in further_kinds(site, dtype, device)}
            for kind, module in modules.items():
                ready = cast(nn.Module, module).to(device, dtype)
                if kind != "own":
                    ready = ready.to(memory_format=memory_format)  # type: ignore[call-overload]
                arguments = [x]
                if site.residual:
                    arguments.append(torch.randn_like(site.vendor().to(device, dtype)(x)))
                calls[f"{kind}/{name}"] = _bound(ready, [_laid_out(a, name, kind) for a in arguments])
        return _interleaved(calls, device)


def _laid_out(x: Tensor, memory_format: str, kind: str) -> Tensor:
    """As the layer finds its inputs in a network of one kind: on a GPU with room behind the channels, if kernels leave it."""
    if x.is_cuda and kind != "vendor" and memory_format == "channels_last":
        return with_room(x)
    return x.contiguous(memory_format=FORMATS[memory_format])


def _bound(module: nn.Module, arguments: list[Tensor]) -> Callable[[], Tensor]:
    return lambda: cast(Tensor, module(*arguments))


def _interleaved(calls: dict[str, Callable[[], Tensor]], device: torch.device) -> dict[str, float]:
    """Median seconds of each call, in turns.

    On a GPU device time alone: a network is captured as one graph, so what Python and the launches cost does not count.
    """
    if device.type != "cuda":
        return _by_the_clock(calls)
    for call in calls.values():
        call()
    return seconds_per_call(calls, rounds=_ROUNDS)


def _by_the_clock(calls: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Medians; candidates take turns, so that whatever else the machine does hits all of them alike.

    Those that are as good as equally fast are measured once more: there a little noise would decide.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    _take_turns(calls, taken, _TURNS, _SECONDS)
    best = min(map(median, taken.values()))
    close = {name: call for name, call in calls.items() if median(taken[name]) <= _CLOSE * best}
    if len(close) > 1 and best < _LONG:
        _take_turns(close, taken, _TURNS - 1, _SECONDS)
    return {name: median(values) for name, values in taken.items()}


def _take_turns(
    calls: dict[str, Callable[[], Tensor]], taken: dict[str, list[float]], least: int, seconds: float
) -> None:
    """Time each call, several in a row, behind one that is not counted.

    The caches then hold what the candidate itself leaves there, and not what the one before it did. Long calls leave little of
    that: they are timed one by one.
    """
    for call in calls.values():
        call()
    spent, turns, running = 0.0, 0, dict(calls)
    while spent < seconds * len(running) or turns < least:
        for name, call in running.items():
            first = _seconds_of(call)
            short = 0 if first > _LONG else max(_FEW, min(_MOST, math.ceil(_TURN / max(first, 1e-9))))
            more = [_seconds_of(call) for _ in range(short)]
            taken[name] += more or [first]
            spent += first + sum(more)
        turns += 1
        if min(map(len, taken.values())) >= _FEW:
            limit = _HOPELESS * min(map(min, taken.values()))
            running = {name: call for name, call in running.items() if min(taken[name]) <= limit}


def _seconds_of(call: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
