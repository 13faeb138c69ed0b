"""Run a thinned copy for real: find the sizes that are hard-coded, and freeze what still does not come out equal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..inputs import ExampleInputs, call_model
from .calls import COUNTING, SIZED, SizedCall, function_name, read, write
from .flow import Flow, Step
from .groups import ChannelGraph, Mask
from .labels import Vector
from .rules import tensors_of
from .trace import decomposed, tensors_in, undisturbed

#: ops that only move data: a corrected call may execute others of them, so they are not compared
_MOVES = set(
    """
    view _unsafe_view reshape _reshape_alias clone contiguous alias detach split split_with_sizes chunk slice narrow
    unsafe_split unsafe_chunk tensor_split permute transpose t expand as_strided lift_fresh _to_copy unsqueeze squeeze
    select unbind copy_ new_empty empty
    """.split()  # noqa: SIM905
)
TOLERANCE = 1e-4
_MOST_RUNS = 12


class _DivergedError(Exception):
    """The thinned copy left the traced path at step ``index``."""

    def __init__(self, index: int, reason: str, call: SizedCall | None = None) -> None:
        self.index, self.reason, self.call = index, reason, call


def compared(steps: list[Step]) -> list[Step]:
    """The steps whose results are compared between the masked and the thinned network."""
    return [s for s in steps if s.name.removeprefix("aten.") not in _MOVES]


class _Steps(TorchDispatchMode):
    """Follows the compared steps: checks shapes against the labels and, given ``expected``, values."""

    def __init__(
        self, steps: list[Step], dead: Mask, expected: list[list[Tensor]] | None, record: bool = False
    ) -> None:
        super().__init__()
        self.steps, self.dead, self.expected, self.index = steps, dead, expected, 0
        self.seen: list[list[Tensor]] | None = [] if record else None
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        parts = decomposed(self, func, args, kwargs or {})
        if parts is not NotImplemented:
            return parts
        name = str(func.overloadpacket)
        if self.paused or name.removeprefix("aten.") in _MOVES:
            return func(*args, **(kwargs or {}))
        if self.index >= len(self.steps) or name != self.steps[self.index].name:
            raise _DivergedError(self.index, "the network takes another path when these channels are fewer")
        out = func(*args, **(kwargs or {}))
        step, found = self.steps[self.index], list(tensors_of(out))
        if self.seen is not None:
            self.seen.append(
                [_kept(t, v, self.dead).clone() for t, v in zip(found, step.outputs, strict=True)]
            )
        else:
            self._check(step, found)
        self.index += 1
        return out

    def _check(self, step: Step, found: list[Tensor]) -> None:
        for i, (tensor, labels, shape) in enumerate(zip(found, step.outputs, step.shapes, strict=True)):
            if tuple(tensor.shape) != _predict(labels, shape, self.dead):
                raise _DivergedError(self.index, "a size is hard-coded in Python behind these channels")
            if self.expected is not None and i == 0 and not close(self.expected[self.index][i], tensor):
                raise _DivergedError(
                    self.index, f"{step.name} computes something else when these channels are fewer"
                )


class _Sizes(TorchFunctionMode):
    """Compares the sizes in every call with what the labels say, and puts the right ones in where they differ."""

    def __init__(self, flow: Flow, dead: Mask, steps: _Steps) -> None:
        super().__init__()
        self.flow, self.dead, self.steps, self.index = flow, dead, steps, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, call = function_name(func), None
        if name in SIZED:
            calls = self.flow.calls
            if self.index >= len(calls) or calls[self.index].function != name:
                raise _DivergedError(
                    self.steps.index, "the network takes another path when these channels are fewer"
                )
            call = calls[self.index]
            if call.slots:
                right = {slot: len(v) - int(self.dead[v].sum()) for slot, v in call.slots}
                found = read(name, args, kwargs, list(right))
                wrong = {slot for slot, n in found.items() if n is not None and n != right[slot]}
                if wrong:
                    self.flow.hard[self.index] = wrong
                    other, args, kwargs = write(func, name, args, kwargs, right)
                    if other is not func and name in COUNTING:
                        return self._replaced(call, other, args, kwargs)
                    func = other
            self.index += 1
        try:
            return func(*args, **kwargs)
        except _DivergedError:
            raise
        except Exception as error:
            reason = f"{name} fails when these channels are fewer ({error})"
            raise _DivergedError(self.steps.index, reason, call) from error

    def _replaced(self, call: SizedCall, func: Any, args: Any, kwargs: Any) -> Any:
        """Run another function in place of the traced one; its ops are not those of the trace."""
        self.index += 1
        self.steps.paused = True
        try:
            out = func(*args, **kwargs)
            after = len(compared(self.flow.steps[: call.end]))
            expected = self.steps.expected
            if expected is not None and not close(expected[after - 1][0], out):
                reason = f"{call.function} counts removed channels that are not zero"
                raise _DivergedError(after - 1, reason, call)
        except _DivergedError:
            raise
        except Exception as error:
            reason = f"{call.function} fails when these channels are fewer ({error})"
            raise _DivergedError(self.steps.index, reason, call) from error
        finally:
            self.steps.paused = False
        self.steps.index = after
        return out


def _predict(labels: tuple[Vector | None, ...], shape: tuple[int, ...], dead: Mask) -> tuple[int, ...]:
    return tuple(n if v is None else n - int(dead[v].sum()) for n, v in zip(shape, labels, strict=True))


def _kept(tensor: Tensor, labels: tuple[Vector | None, ...], dead: Mask) -> Tensor:
    import torch

    for d, vector in enumerate(labels):
        if vector is not None and dead[vector].any():
            tensor = tensor.index_select(d, torch.from_numpy(np.flatnonzero(~dead[vector])).to(tensor.device))
    return tensor.detach()


def close(expected: Tensor, found: Tensor) -> bool:
    """Equal up to rounding, relative to the largest value; not-a-number and infinity must match exactly."""
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return False
    if not expected.is_floating_point():
        return bool((expected == found).all())
    if not expected.numel():
        return True
    a, b = expected.nan_to_num(), found.nan_to_num()
    return bool((a - b).abs().max() <= TOLERANCE * max(float(a.abs().max()), 1e-12))


def random_mask(graph: ChannelGraph, fraction: float = 0.3, seed: int = 0) -> Mask:
    """Remove about ``fraction`` of every group at random, at least one channel and never all."""
    rng = np.random.default_rng(seed)
    mask = np.ones(graph.num_channels, dtype=bool)
    for group in graph.groups:
        count = min(max(1, round(group.size * fraction)), group.size - 1)
        mask[group.start + rng.choice(group.size, count, replace=False)] = False
    return mask


def settle(
    model: nn.Module, inputs: ExampleInputs, flow: Flow, build: Callable[[], ChannelGraph]
) -> ChannelGraph:
    """Thin, run, freeze the labels at the op that breaks, and repeat until a thinned copy equals its masked twin."""
    blamed: Counter[tuple[str, str]] = Counter()
    steps = compared(flow.steps)
    for _ in range(_MOST_RUNS):
        flow.hard.clear()
        graph = build()
        if not graph.groups:
            return graph
        stop = _try(model, inputs, flow, graph, steps)
        if stop is None:
            conflict = _conflicting_calls(flow)
            if not conflict:
                return build()
            for vector, where in conflict:
                flow.space.freeze(vector, "one line of Python would need several sizes", where)
            continue
        before = graph.num_channels
        _blame(flow, steps, stop, blamed)
        reach = 1
        while build().num_channels == before and reach <= len(steps):  # the cause lies further back
            _freeze(flow, steps[max(0, stop.index - reach) : stop.index + 2], stop.reason)
            reach *= 2
    _freeze(flow, flow.steps, "no thinned copy came out equal")
    flow.hard.clear()
    return build()


def _blame(flow: Flow, steps: list[Step], stop: _DivergedError, blamed: Counter[tuple[str, str]]) -> None:
    """Freeze the labels at the call or op where the thinned copy stopped."""
    if stop.call is not None:
        for vector in (*stop.call.labels, *(v for _, v in stop.call.slots)):
            flow.space.freeze(vector, stop.reason, stop.call.where)
        return
    step = steps[min(stop.index, len(steps) - 1)]
    blamed[step.name, step.line] += 1
    # one op alone may be special; a line that breaks twice breaks everywhere
    alike = [s for s in steps if (s.name, s.line) == (step.name, step.line)] if step.line else []
    _freeze(flow, alike if blamed[step.name, step.line] > 1 else [step], stop.reason)


def _try(
    model: nn.Module, inputs: ExampleInputs, flow: Flow, graph: ChannelGraph, steps: list[Step]
) -> _DivergedError | None:
    """Run one thinned copy beside its masked twin; where it first fails or differs, or None."""
    from ..compaction import CompactionPlan, apply_plan, mask_channels

    plan = CompactionPlan.from_mask(graph, random_mask(graph))
    thinned, masked = apply_plan(model, plan), mask_channels(model, inputs, plan)
    dead = _dead_labels(flow, plan)

    def run(expected: list[list[Tensor]] | None) -> list[Tensor] | _DivergedError:
        mode = _Steps(steps, dead, expected)
        try:
            with undisturbed(thinned), _Sizes(flow, dead, mode), mode:
                return list(tensors_in(call_model(thinned, inputs)))
        except _DivergedError as stop:
            return stop
        except Exception as error:
            reason = f"Python code fails when these channels are fewer: {error}"
            return _DivergedError(max(0, mode.index - 1), reason)

    found = run(None)
    if isinstance(found, _DivergedError):
        return found
    with undisturbed(masked):
        expected = list(tensors_in(call_model(masked, inputs)))
    if len(expected) == len(found) and all(close(a, b) for a, b in zip(expected, found, strict=True)):
        return None
    recorder = _Steps(steps, dead, None, record=True)
    with undisturbed(masked), recorder:
        call_model(masked, inputs)
    found = run(recorder.seen)
    if isinstance(found, _DivergedError):
        return found
    return _DivergedError(len(steps) - 1, "the outputs differ when these channels are fewer")


def _conflicting_calls(flow: Flow) -> list[tuple[Vector, str]]:
    """Hard-coded calls that one place in the code makes with different labels (a module that is used several times)."""
    root, _ = flow.space.classes()
    first: dict[tuple[str, str, int], int] = {}
    wanted = {(c.module, c.function, c.ordinal) for c in (flow.calls[i] for i in flow.hard)}
    result = []
    for i, call in enumerate(flow.calls):
        key = (call.module, call.function, call.ordinal)
        if key in wanted and first.setdefault(key, i) != i:
            other = flow.calls[first[key]]
            same = [s for s, _ in call.slots] == [s for s, _ in other.slots] and all(
                np.array_equal(np.sort(root[a]), np.sort(root[b]))
                for (_, a), (_, b) in zip(call.slots, other.slots, strict=True)
            )
            if not same:
                result += [(v, call.where) for _, v in (*call.slots, *other.slots)]
    return result


def _dead_labels(flow: Flow, plan: Any) -> Mask:
    """Boolean over labels: does the plan remove it?"""
    dead = np.zeros(flow.space.size, dtype=bool)
    for piece in plan.slices:
        own = flow.own_labels(piece.tensor)[piece.dim]
        if own is not None:
            dead[own[list(piece.removed)]] = True
    root, _ = flow.space.classes()
    dead_roots = np.unique(root[dead])
    return np.isin(root, dead_roots[dead_roots > 0])


def _freeze(flow: Flow, steps: list[Step], reason: str) -> None:
    for step in steps:
        where = ", ".join(part for part in (step.module, step.line) if part)
        for labels in (*step.inputs, *step.outputs):
            for vector in labels:
                flow.space.freeze(vector, reason, where)
