"""What the callback does to the model's own weights: hold dead channels at zero, fold gates, penalise, constrain."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .channels.groups import ChannelGraph, Mask
from .channels.trace import named_tensors
from .compaction import CompactionPlan, zeroed_slices
from .gates.attach import consumer_sites
from .live_steps import LiveSteps
from .ops.availability import extension_available

#: integers by bytes
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
#: of so many steps one sets all dead weights to zero, whether anything is known to have written to them or not
_THOROUGH = 50


class WeightKeeper:
    """Acts on the tensors that the groups of ``graph`` control, in place and without gradients.

    Args:
        model: the network.
        graph: its traced channels.
        optimizers: gives those that step it; from the first dead channel on until :meth:`detach` they leave dead weights out.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        optimizers: Callable[[], Iterable[torch.optim.Optimizer]] = tuple,
    ) -> None:
        self._graph = graph
        self._steps, self._calls = LiveSteps(optimizers), 0
        self._tensors = named_tensors(model)
        self._dead: list[tuple[Tensor, Tensor]] = []  # tensor; all bits of what stays, broadcast against it
        self._radii: list[tuple[str, int, Tensor]] = []
        names = {m.tensor for g in graph.groups for m in g.members if m.role != "vector"}
        self._penalised = {id(self._tensors[name]) for name in names}

    def weight(self, module: str) -> Tensor:
        """The weight of a module."""
        return self._tensors[f"{module}.weight" if module else "weight"]

    def follow(self, graph: ChannelGraph) -> None:
        """The tensors have been cut, or are whole again; :meth:`set_mask` has to follow."""
        self._graph, self._dead = graph, []
        self._steps.set_lists({})

    def set_mask(self, mask: Mask) -> None:
        """Choose which channels :meth:`zero_dead` holds at zero."""
        plan = CompactionPlan.from_mask(self._graph, mask, remove_branches=True)
        kept: dict[str, dict[int, Tensor]] = {}  # tensor -> dimension -> which of its slices stay
        for piece in zeroed_slices(plan):
            size = self._tensors[piece.tensor].shape[piece.dim]
            here = self._graph.here(piece.tensor, piece.dim, piece.removed)
            if len(here):
                own = kept.setdefault(piece.tensor, {})
                own.setdefault(piece.dim, torch.ones(size, dtype=torch.bool))[torch.from_numpy(here)] = False
        live, self._dead = {}, []
        for name, slices in kept.items():
            tensor = self._tensors[name]
            lists = {dim: stays.nonzero()[:, 0] for dim, stays in slices.items()}
            live[tensor] = lists.get(0), lists.get(1)
            bits = torch.full((1,) * tensor.dim(), -1, dtype=_BITS[tensor.element_size()])
            for dim, stays in slices.items():
                bits = bits & -stays.to(bits.dtype).view([-1 if d == dim else 1 for d in range(tensor.dim())])
            if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
                bits = bits.contiguous(memory_format=torch.channels_last)
            self._dead.append((tensor, bits.to(tensor.device)))
        self._steps.set_lists(live)

    @torch.no_grad()
    def zero_dead(self) -> None:
        """Set everything that belongs to dead channels to zero: momentum must not bring them back."""
        self._calls += 1
        # Writing through ``tensor.data`` goes unnoticed.
        still_zero = self._steps.still_zero() if self._calls % _THOROUGH else ()
        self._zero([(tensor, keep) for tensor, keep in self._dead if id(tensor) not in still_zero])
        self._steps.zeroed()

    def detach(self) -> None:
        """Optimizers step all weights again."""
        self._steps.detach()

    @staticmethod
    def _zero(dead: list[tuple[Tensor, Tensor]]) -> None:
        # As bits, which takes a fifth of the time of filling by index, and infinities with it.
        if dead and extension_available() and all(t.device.type == "cpu" for t, _ in dead):
            tensors = [tensor for tensor, _ in dead]
            with torch._C._AutoDispatchBelowAutograd():
                torch.ops.lightning_prune.keep_bits.default(tensors, [keep for _, keep in dead])
            torch.autograd.graph.increment_version(tensors)
            return
        for tensor, keep in dead:
            tensor.view(keep.dtype).bitwise_and_(keep)

    @torch.no_grad()
    def fold(self, multipliers: Tensor) -> None:
        """Multiply the consumers' columns by the gates: the plain network then computes what the gated one did."""
        for site in consumer_sites(self._graph):
            weight = self._tensors[site.tensor]
            weight.mul_(site.scale(multipliers.detach().to(weight.device), weight.dim()).to(weight.dtype))

    @torch.no_grad()
    def penalise(self, optimizer: torch.optim.Optimizer, l1: float, l2: float) -> None:
        """Add the gradient of ``l1 * sum|w| + l2/2 * sum w^2`` over the weights of pruned layers.

        Without it weights grow to make up for shrinking gates. Only parameters of ``optimizer`` that have a gradient.
        """
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in self._penalised and parameter.grad is not None:
                    if l2:
                        parameter.grad.add_(parameter, alpha=l2)
                    if l1:
                        parameter.grad.add_(parameter.sign(), alpha=l1)

    @torch.no_grad()
    def remember_radii(self, radii: Sequence[Tensor] = ()) -> None:
        """Take the present norm of every producing filter as the radius of its sphere, or ``radii`` from a checkpoint.

        All filters are there: nothing has been cut.
        """
        members = [member for group in self._graph.groups for member in group.by_role("out")]
        norms = [_filter_norms(self._tensors[member.tensor], member.dim) for member in members]
        if radii:
            norms = [radius.to(norm) for norm, radius in zip(norms, radii, strict=True)]
        self._radii = [(member.tensor, member.dim, norm) for member, norm in zip(members, norms, strict=True)]

    def radii(self) -> list[Tensor]:
        """The remembered radii, for a checkpoint: of all filters, whether they are left or not."""
        return [radius.cpu() for _, _, radius in self._radii]

    @torch.no_grad()
    def project_to_sphere(self) -> None:
        """Scale every producing filter back to its radius.

        He et al. 2017 constrain ``norm(W_i) = 1``; keeping the radius that each filter had when learning began is the same
        constraint with the constant left in the filter, so that it needs no homogeneous activation and changes nothing
        at its start.
        """
        for name, dim, radius in self._radii:
            weight, left = self._tensors[name], self._graph.left(name, dim)
            if not isinstance(left, slice):
                radius = radius.index_select(dim, torch.from_numpy(left).to(radius.device))
            norms = _filter_norms(weight, dim)
            weight.mul_(torch.where(norms > 0, radius / norms.clamp_min(1e-12), torch.ones_like(norms)))


def first_convolution(graph: ChannelGraph, model: nn.Module) -> str | None:
    """Name of the convolution that runs first, None without one whose filters are plain parameters."""
    names = {
        name
        for name, module in model.named_modules()
        if isinstance(module, _ConvNd) and not module.transposed and "weight" in module._parameters
    }
    tensors = named_tensors(model)
    order = (out.module for out in graph.outputs)
    return next((n for n in order if n in names and (f"{n}.weight" if n else "weight") in tensors), None)


def _filter_norms(weight: Tensor, dim: int) -> Tensor:
    others = [d for d in range(weight.dim()) if d != dim]
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    return wide.square().sum(dim=others, keepdim=True).sqrt().to(weight.dtype)
