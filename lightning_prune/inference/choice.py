"""Which module computes a convolution fastest here: measured once per layer, kept on disk."""

from __future__ import annotations

import contextlib
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
_ROUNDS, _SECONDS, _WARMUP = 9, 0.02, 1
#: seconds per candidate after which a few rounds are enough: long calls vary little
_LONG = 0.1
#: slower than the fastest by so much after a few rounds: not measured any further
_HOPELESS, _FEW = 1.5, 3


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
    if pads(site, device):
        wanted.add("padded/channels_last")
    with one_at_a_time():
        found = cache.load(key)
        if found is None or set(found) != wanted:
            found = _measure(site, dtype, device)
            cache.store(key, found)
    return found


def pads(site: ConvSite, device: torch.device) -> bool:
    """Whether torch's convolution is also tried at multiples of 8 channels: on a GPU, where there are others."""
    return device.type == "cuda" and site.padded() is not None


def fastest_kind(site: ConvSite, dtype: torch.dtype, device: torch.device, memory_format: str) -> str:
    """Ours, "own", where it beats all others by the margin on maps of this memory format, else "vendor" or "padded".

    Within one format: a network runs in one, and which one is decided by timing whole networks.
    """
    times = seconds(site, dtype, device)
    rivals = [kind for kind in ("vendor", "padded") if f"{kind}/{memory_format}" in times]
    best = min(rivals, key=lambda kind: times[f"{kind}/{memory_format}"])
    return "own" if times[f"own/{memory_format}"] * MARGIN <= times[f"{best}/{memory_format}"] else best


def _measure(site: ConvSite, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(site.shape, generator=generator).to(device, dtype)
    own = site.own()
    assert own is not None
    calls: dict[str, Callable[[], Tensor]] = {}
    with torch.inference_mode():
        for name, memory_format in FORMATS.items():
            modules: dict[str, nn.Module | None] = {"vendor": site.vendor(), "own": own}
            if name == "channels_last" and pads(site, device):
                modules["padded"] = site.padded()
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
    """Medians; candidates take turns, so that whatever else the machine does hits all of them alike."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(_WARMUP):
        for call in calls.values():
            call()
    total, rounds, running = 0.0, 0, dict(calls)
    while rounds < (_FEW if total > _LONG * len(calls) else _ROUNDS) or total < _SECONDS * len(running):
        for name, call in running.items():
            start = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - start)
            total += taken[name][-1]
        rounds += 1
        if rounds == _FEW:
            limit = _HOPELESS * min(map(min, taken.values()))
            running = {name: call for name, call in calls.items() if min(taken[name]) <= limit}
    return {name: median(values) for name, values in taken.items()}
