"""Try a thinned copy of the model for real, op by op, and freeze what a size hard-coded in Python breaks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import CompactionError
from ..inputs import ExampleInputs, call_model
from .flow import Flow, Step
from .groups import ChannelGraph, Mask
from .labels import Vector
from .trace import undisturbed

_REASON = "a size is hard-coded in Python behind these channels"


class _DivergedError(Exception):
    """The thinned copy left the traced path at ``index``."""

    def __init__(self, index: int) -> None:
        self.index = index


class _ExpectedShapes(TorchDispatchMode):
    """Compares every op's output shapes with what the labels predict."""

    def __init__(self, steps: list[Step], dead: Mask) -> None:
        super().__init__()
        self.steps, self.dead, self.index = steps, dead, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from .rules import tensors_of

        if self.index >= len(self.steps) or str(func.overloadpacket) != self.steps[self.index].name:
            raise _DivergedError(self.index)
        out = func(*args, **(kwargs or {}))
        step = self.steps[self.index]
        for tensor, labels, shape in zip(tensors_of(out), step.outputs, step.shapes, strict=True):
            if tuple(tensor.shape) != self._predict(labels, shape):
                raise _DivergedError(self.index)
        self.index += 1
        return out

    def _predict(self, labels: tuple[Vector | None, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(
            n if v is None else n - int(self.dead[np.maximum(v, 0)].sum())
            for n, v in zip(shape, labels, strict=True)
        )


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
    from ..compaction import CompactionPlan, apply_plan, mask_channels
    from ..compaction.verify import check_equal

    graph = build()
    while graph.groups:
        plan = CompactionPlan.from_mask(graph, random_mask(graph))
        thinned = apply_plan(model, plan)
        mode = _ExpectedShapes(flow.steps, _dead_labels(flow, plan))
        try:
            with undisturbed(thinned), mode:
                call_model(thinned, inputs)
        except _DivergedError as stop:
            culprits = _labels_at(flow.steps, stop.index)
        except Exception:
            culprits = _labels_at(flow.steps, mode.index)
        else:
            try:
                check_equal(model, mask_channels(model, inputs, plan), thinned, inputs, plan)
                return graph
            except CompactionError as error:
                culprits = _labels_in(flow.steps, error.module)
        before = graph.num_channels
        _freeze(flow, culprits)
        graph = build()
        if (
            graph.num_channels >= before
        ):  # nothing to blame: give up on all rather than return something wrong
            _freeze(flow, [(v, "") for step in flow.steps for v in _vectors(step)])
            graph = build()
    return graph


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


def _vectors(step: Step) -> list[Vector]:
    return [v for labels in (*step.inputs, *step.outputs) for v in labels if v is not None]


def _labels_at(steps: list[Step], index: int) -> list[tuple[Vector, str]]:
    """Labels around the op where the copy left the path: the op itself, or the last one that had any."""
    for step in [*steps[index : index + 1], *reversed(steps[: min(index, len(steps))])]:
        if _vectors(step):
            return [(v, step.where) for v in _vectors(step)]
    return []


def _labels_in(steps: list[Step], module: str | None) -> list[tuple[Vector, str]]:
    return [
        (v, step.where)
        for step in steps
        if module and (step.module == module or step.module.startswith(f"{module}."))
        for v in _vectors(step)
    ]


def _freeze(flow: Flow, culprits: list[tuple[Vector, str]]) -> None:
    for vector, where in culprits:
        flow.space.freeze(vector, _REASON, where)
