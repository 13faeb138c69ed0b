"""A network that gets smaller while it trains: dead channels are cut out of the very module that is being trained.

Masks, gates, budget and plan stay in the numbering of the dense network. What touches tensors by position follows a
:class:`~lightning_prune.channels.narrow.NarrowGraph`, which says where the channels are by now.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import nn

from .channels.groups import ChannelGraph, Mask
from .channels.narrow import NarrowGraph
from .compaction import CompactionPlan
from .compaction.resize import Resizer
from .compaction.verify import TOLERANCE, relative_difference, run_quietly
from .cost import Cost
from .errors import CompactionError
from .hooks import compiled, forget_compiled
from .inputs import ExampleInputs, floating_dtype

#: share of the present cost that has to be dead for a cut that nobody has asked for while masks are learned
_LEAST_GAIN = 0.1
#: the network that the fit ends with is proven equal in float64; on the way this many times its tolerance shows a wrong size
_SLACK = 100.0
#: in tf32, which GPUs may compute float32 in, and may not for odd numbers of channels
_TF32_ALLOWED = 2e-2


class Reconfigurer:
    """Cuts dead channels out of a model in training, and puts them back as zeros.

    Before and after each cut the model runs on the example inputs and has to give the same outputs. A group all of whose
    channels are dead keeps one, at zero: its layers go when the fit is over.

    Args:
        model: full-size now, on its device.
        graph: its traced channels.
        optimizers: gives the optimizers that step it.
        rewrap: called after its parameters have changed their shapes, see :func:`~lightning_prune.distributed.rewrap_ddp`.
        follow: called with the graph of what is left, whenever that changes.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        optimizers: Callable[[], Iterable[torch.optim.Optimizer]],
        rewrap: Callable[[], None],
        follow: Callable[[ChannelGraph], None],
    ) -> None:
        self._model, self._dense, self._rewrap, self._follow = model, graph, rewrap, follow
        self._optimizers, self._checked = optimizers, False
        self._resizer = Resizer(model, optimizers)
        #: channels that are there, bool of shape [num_channels]
        self.mask: Mask = np.ones(graph.num_channels, dtype=bool)
        #: positions of the channels that are there
        self.graph = graph

    def worthwhile(self, mask: Mask, cost: Cost) -> bool:
        """Whether ``mask`` leaves much less of ``cost`` than is there, and nothing would have to be compiled anew."""
        much = cost.cost(mask) < (1 - _LEAST_GAIN) * cost.cost(self.mask)
        return much and not any(map(compiled, self._model.modules()))

    def cut(self, mask: Mask, inputs: ExampleInputs) -> bool:
        """Leave only what lives in ``mask`` (bool, shape [num_channels]); returns whether anything has changed.

        The weights of all other channels must be zero.

        Raises:
            CompactionError: the smaller network fails or differs on ``inputs``; the model is full-size then.
        """
        wanted = mask.copy()
        for group in self._dense.groups:
            if not wanted[group.ids].any():
                wanted[group.start] = True
        if np.array_equal(wanted, self.mask):
            return False
        expected = run_quietly(self._model, inputs)
        self._set(wanted)
        try:
            error = relative_difference(expected, run_quietly(self._model, inputs))
        except Exception as failure:
            self.widen()
            raise _refused(f"fails: {type(failure).__name__}: {failure}") from failure
        if not error <= (allowed := _allowed(self._model)):
            self.widen()
            raise _refused(f"differs from the masked one: relative error {error:.2g}, allowed {allowed:.0e}")
        self._rewrap()
        return True

    def widen(self) -> bool:
        """Make the model full-size again, with zeros where channels were cut; returns whether any were."""
        if self.mask.all():
            return False
        self._set(np.ones_like(self.mask))
        return True

    def full_size(self) -> contextlib.AbstractContextManager[None]:
        """The tensors at full size for a moment, for whoever reads them in dense numbering."""
        return self._resizer.full_size()

    def check_optimizers(self) -> None:
        """Raise :class:`CompactionError` if an optimizer's state cannot be cut. Looks once, when there is a state."""
        if not self._checked and any(optimizer.state for optimizer in self._optimizers()):
            self._checked = True
            self._resizer.check_optimizers(self._dense.prunable)

    def _set(self, mask: Mask) -> None:
        plan = None if mask.all() else CompactionPlan.from_mask(self._dense, mask)
        self._resizer.resize(plan)
        forget_compiled()  # graphs of old shapes hold memory; after eight of one function torch.compile gives up on it
        self.mask = mask
        slices = plan.slices if plan is not None else ()
        removed = {(piece.tensor, piece.dim): piece.removed for piece in slices}
        self.graph = NarrowGraph.of(self._dense, removed) if removed else self._dense
        self._follow(self.graph)


def _allowed(model: nn.Module) -> float:
    """Relative difference of outputs that rounding explains."""
    dtype = floating_dtype(model) or torch.float32
    if dtype == torch.float32 and any(p.is_cuda for p in model.parameters()):
        return _TF32_ALLOWED
    return _SLACK * TOLERANCE.get(dtype, 1e-5)


def _refused(why: str) -> CompactionError:
    return CompactionError(
        f"the network without its dead channels {why}. A size is probably hard-coded; exclude the layers that feed it, or use "
        "reconfigure_every_n_epochs=0."
    )
