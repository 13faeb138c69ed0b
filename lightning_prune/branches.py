"""Which groups may lose all their channels: those whose branch can vanish while the network goes on working."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from .channels.groups import ChannelGraph, Mask
from .channels.trace import tensors_in, undisturbed
from .compaction import CompactionPlan, apply_plan, mask_channels
from .compaction.verify import check_equal
from .errors import CompactionError
from .inputs import ExampleInputs, call_model, map_inputs, to_model

#: outputs that move less than this, relative to the dense network, do not depend on the input any more
_SENSITIVITY = 1e-3


def removable_branches(model: nn.Module, example_inputs: ExampleInputs, graph: ChannelGraph) -> Mask:
    """Channels of groups that may be emptied, as a bool mask of shape [graph.num_channels].

    Decided by trying: with all channels of the group at zero every output must still follow the input (so there is
    another path, as around a residual branch), and the network without the group's layers must equal the masked one.
    Groups are tried one by one; emptying several at once is checked again when compacting.
    """
    inputs = to_model(example_inputs, model)
    other = map_inputs(inputs, lambda t: t.flip(0) + torch.randn_like(t) if t.is_floating_point() else t)
    dense = _movement(model, inputs, other)
    mask = np.zeros(graph.num_channels, dtype=bool)
    for group in graph.groups:
        if group.is_stream:
            continue
        live = np.ones(graph.num_channels, dtype=bool)
        live[group.ids] = False
        plan = CompactionPlan.from_mask(graph, live, remove_branches=True)
        masked = mask_channels(model, inputs, plan)
        moved = _movement(masked, inputs, other)
        if all(a > _SENSITIVITY * b for a, b in zip(moved, dense, strict=True)):
            try:
                check_equal(model, masked, apply_plan(model, plan), inputs, plan)
            except CompactionError:
                continue
            mask[group.ids] = True
    return mask


def _movement(model: nn.Module, a: ExampleInputs, b: ExampleInputs) -> list[float]:
    """How much each output moves between two inputs."""
    with undisturbed(model):
        first: list[Tensor] = [t.detach().clone() for t in tensors_in(call_model(model, a))]
        second = list(tensors_in(call_model(model, b)))
    return [float((x.double() - y.double()).abs().mean()) for x, y in zip(first, second, strict=True)]
