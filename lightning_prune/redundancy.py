"""Channels that repeat others: find them, and merge them into one by adding what the consumers read."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from .channels import ChannelGraph, ChannelGroup, trace_channels
from .channels.trace import named_tensors
from .compaction import CompactionPlan, compact, mask_channels, max_relative_error
from .errors import CompactionError
from .inputs import ExampleInputs

#: running statistics follow the filters; comparing them would call duplicates different after a single noisy update
_STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class Duplicate:
    """Channel ``drop`` repeats channel ``keep`` of the same group.

    ``distance`` is the largest difference of their filters, biases and norm parameters over the largest magnitude in the
    group: 0 for exact duplicates. Where ``cosine`` was asked for, it is 1 minus the cosine.
    """

    group: str
    keep: int
    drop: int
    distance: float


@dataclass(frozen=True)
class MergeResult:
    """The smaller network, the plan that removed the duplicates, and what was merged."""

    model: nn.Module
    plan: CompactionPlan
    merged: tuple[Duplicate, ...]


def _signatures(tensors: dict[str, Tensor], group: ChannelGroup, statistics: bool) -> Tensor:
    """Everything that makes a channel, per channel: filters, biases, norm parameters; [size, features], float64."""
    parts = []
    for member in group.members:
        if member.role == "in" or (not statistics and member.tensor.endswith(_STATISTICS)):
            continue
        tensor = tensors[member.tensor].detach().double().cpu()
        rows = tensor.transpose(0, member.dim).reshape(tensor.shape[member.dim], -1)
        part = rows[torch.from_numpy(member.index)].flatten(1)
        parts.append(
            part / part.abs().max().clamp_min(1e-30)
        )  # every member counts relative to its own scale
    return torch.cat(parts, dim=1)


def _producers(tensors: dict[str, Tensor], group: ChannelGroup) -> Tensor:
    """Filters and biases that produce each channel, in their own scale; [size, features], float64."""
    biases = {member.tensor.removesuffix("weight") + "bias" for member in group.by_role("out")}
    parts = []
    for member in group.members:
        if member.role == "out" or member.tensor in biases:
            tensor = tensors[member.tensor].detach().double().cpu()
            rows = tensor.transpose(0, member.dim).reshape(tensor.shape[member.dim], -1)
            parts.append(rows[torch.from_numpy(member.index)].flatten(1))
    return torch.cat(parts, dim=1)


def find_duplicate_channels(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    tolerance: float = 0.0,
    cosine: float | None = None,
    graph: ChannelGraph | None = None,
) -> list[Duplicate]:
    """Find channels that compute the same as another channel of their group, up to ``tolerance`` or to their length.

    Two channels are duplicates when all their producers' filters, their biases and the norms they pass agree (running
    statistics too for ``tolerance=0``). Each channel is compared with the channels that are kept; the first of a set of
    duplicates is the one to keep.

    Args:
        model: any ``nn.Module``; untouched.
        example_inputs: for tracing.
        tolerance: largest difference relative to the largest magnitude of the tensor in question.
        cosine: instead of by ``tolerance``, channels are duplicates whose producing filters and biases point the same way:
            with a cosine of at least so much, in (0, 1]. Norms do not count: they only scale and shift.
        graph: skips tracing when it is at hand.

    Returns:
        One record per redundant channel, in order of groups and channels.
    """
    if tolerance < 0:
        raise ValueError(f"tolerance must not be negative; got {tolerance!r}")
    if cosine is not None and not 0.0 < cosine <= 1.0:
        raise ValueError(f"cosine must be in (0, 1]; got {cosine!r}")
    graph = graph if graph is not None else trace_channels(model, example_inputs)
    tensors = named_tensors(model)
    limit = tolerance if cosine is None else 1.0 - cosine
    found = []
    for group in graph.groups:
        if cosine is None:
            rows = _signatures(tensors, group, statistics=tolerance == 0)
        else:
            rows = torch.nn.functional.normalize(_producers(tensors, group), dim=1)
        kept: list[int] = []
        for channel in range(group.size):
            if kept:
                if cosine is None:
                    distances = (rows[kept] - rows[channel]).abs().amax(dim=1)
                else:
                    distances = 1.0 - rows[kept] @ rows[channel]
                best = int(distances.argmin())
                if float(distances[best]) <= limit:
                    found.append(Duplicate(group.name, kept[best], channel, float(distances[best])))
                    continue
            kept.append(channel)
    return found


def merge_duplicate_channels(
    model: nn.Module, example_inputs: ExampleInputs, *, tolerance: float = 0.0, max_error: float | None = None
) -> MergeResult:
    """Remove duplicate channels and add their outgoing weights to those of the channel that is kept.

    With exact duplicates the result computes the same function up to rounding, whatever activation and norm lie between
    (both channels pass the same ones). Approximate duplicates leave an error; ``reconstruct`` can refit it on data.

    Args:
        model: any ``nn.Module``; untouched.
        example_inputs: for tracing and for measuring the error.
        tolerance: see :func:`find_duplicate_channels`.
        max_error: largest allowed relative difference of the outputs on the example input; by default 1e-5 for exact
            duplicates and unchecked otherwise.

    Raises:
        CompactionError: the merged network differs by more than ``max_error``.
    """
    graph = trace_channels(model, example_inputs)
    duplicates = find_duplicate_channels(model, example_inputs, tolerance=tolerance, graph=graph)
    # a channel that some reader takes in other ways than by weight columns cannot be merged
    duplicates = [d for d in duplicates if graph[d.group].gateable]
    mask = np.ones(graph.num_channels, dtype=bool)
    nothing = CompactionPlan.from_mask(graph, mask)
    merged = mask_channels(model, example_inputs, nothing)  # an independent copy
    tensors = named_tensors(merged)
    with torch.no_grad():
        for duplicate in duplicates:
            group = graph[duplicate.group]
            mask[group.start + duplicate.drop] = False
            for member in group.by_role("in"):
                tensor = tensors[member.tensor]
                source = tensor.index_select(
                    member.dim, torch.from_numpy(member.index[duplicate.drop]).to(tensor.device)
                )
                target = torch.from_numpy(member.index[duplicate.keep]).to(tensor.device)
                tensor.index_add_(member.dim, target, source)
    plan = CompactionPlan.from_mask(graph, mask)
    smaller = compact(merged, example_inputs, plan)
    limit = max_error if max_error is not None else 1e-5 if tolerance == 0 else float("inf")
    error = max_relative_error(model, smaller, example_inputs)
    if not error <= limit:
        raise CompactionError(
            f"merging {len(duplicates)} duplicate channels changes the outputs by {error:.2g}, allowed {limit:.0e}: "
            "the channels are read in a way that adding weights does not reproduce; lower tolerance or raise max_error"
        )
    return MergeResult(smaller, plan, tuple(duplicates))


def symmetric_groups(model: nn.Module, graph: ChannelGraph) -> dict[str, int]:
    """Groups with channels that start alike (zero or constant initialisation) and the number of such channels.

    Channels with equal filters, equal norms *and* equal outgoing weights receive equal gradients: no training tells them
    apart, and no mask can choose between them.
    """
    tensors = named_tensors(model)
    result = {}
    for group in graph.groups:
        rows = [_signatures(tensors, group, statistics=False)]
        for member in group.by_role("in"):
            tensor = tensors[member.tensor].detach().double().cpu()
            columns = tensor.transpose(0, member.dim).reshape(tensor.shape[member.dim], -1)
            rows.append(columns[torch.from_numpy(member.index)].flatten(1))
        distinct = len(torch.unique(torch.cat(rows, dim=1), dim=0))
        if distinct < group.size:
            result[group.name] = group.size - distinct + 1
    return result


def warn_if_symmetric(model: nn.Module, graph: ChannelGraph) -> None:
    """Warn about channels that are identical for ever."""
    found = symmetric_groups(model, graph)
    if found:
        names: Sequence[str] = [f"{name} ({count} channels)" for name, count in found.items()]
        warnings.warn(
            f"channels with identical filters and identical outgoing weights: {', '.join(names[:5])}. They get the same "
            "gradient and stay identical for ever, so no mask can choose between them. Initialise them at random "
            "(lightning_prune.init.reinitialise).",
            stacklevel=3,
        )
