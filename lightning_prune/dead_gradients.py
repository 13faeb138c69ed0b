"""Whether weights of dead channels have gradients, which whoever looks at all gradients together would miss."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from .channels.groups import ChannelGraph
from .channels.trace import tensors_in, undisturbed
from .compaction import CompactionPlan, mask_channels
from .compaction.apply import zeroed_slices
from .inputs import ExampleInputs, call_model


def dead_weights_matter(
    model: nn.Module, graph: ChannelGraph, inputs: ExampleInputs, optimizers: Iterable[torch.optim.Optimizer]
) -> bool:
    """Whether a step would end elsewhere without its dead channels, if it depends on all gradients together.

    LBFGS moves dead weights by what it remembers of them, and computes the loss again within the step.
    """
    repeating = any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in optimizers)
    return repeating or dead_weights_have_gradients(model, graph, inputs)


def dead_weights_have_gradients(model: nn.Module, graph: ChannelGraph, inputs: ExampleInputs) -> bool:
    """Try it on a copy, every other channel of which is dead; True as well where that fails.

    A dead channel's weights are zero, but behind a function with f(0) != 0 its readers see a constant, and a norm over channels
    sees its zeros.
    """
    mask = np.ones(graph.num_channels, dtype=bool)
    for group in graph.groups:
        mask[group.start + 1 : group.start + group.size : 2] = False
    plan = CompactionPlan.from_mask(graph, mask)
    generator = torch.Generator().manual_seed(0)
    try:
        masked = mask_channels(model, inputs, plan)
        masked.zero_grad()
        with undisturbed(masked), torch.enable_grad():
            outputs = [t for t in tensors_in(call_model(masked, inputs)) if t.requires_grad]
            directions = [torch.randn(t.shape, generator=generator).to(t) for t in outputs]
            torch.autograd.backward(outputs, directions)
    except Exception:  # whatever the user's code makes of a copy
        return True
    parameters = dict(masked.named_parameters())
    for piece in zeroed_slices(plan):
        gradient = parameters[piece.tensor].grad if piece.tensor in parameters else None
        if gradient is not None:
            removed = torch.tensor(piece.removed, device=gradient.device)
            if bool(gradient.index_select(piece.dim, removed).any()):
                return True
    return False
