"""Batch normalisation by the compiled kernel while a network trains, with what follows it where that is certain.

A module is called through ``nn.Module``'s own slot for an exchanged call, which copies and pickles leave out. Whenever
something is not as expected, the module's plain call runs.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .conv_norms import PAIRED, Site, Statistics, gate_of, kind_of, pair_of, together
from .derivatives import differentiable
from .fused_forwards import fused_forward
from .fused_sequences import ActivationCall, SequenceCall, fusable, steps_of
from .hooks import SLOT, ExchangedCall, hooked, only_plain_calls
from .nn._convert import activation_name
from .norm_ways import backward as _backward
from .norm_ways import forward as _forward
from .norm_ways import measure as _measure
from .norm_ways import plain as _plain
from .norm_ways import record, running_fits
from .ops import ACTIVATIONS
from .ops.availability import can_run_masked_batch_norm_act, extension_available
from .ops.batch_norm import update_running
from .ops.reference_norm import vector_dtype

#: smaller inputs (elements) are left alone
LEAST_ELEMENTS = 16_384


class FusedNorms:
    """Exchanges the calls of ``nn.BatchNorm2d`` modules in training, where the clock says that it is faster.

    Inside an ``nn.Sequential`` that is called as a whole, an activation module right behind a norm is computed with it; so
    are a residual sum and an activation where the forward method that holds the norm shows that nobody else reads its output
    (``fused_forwards``).
    The plain calls run in evaluation, under autocast on the CPU (on CUDA it does not touch norms: half maps, float32
    parameters), in ``torch.compile``, under a dispatch mode, with
    ``torch.use_deterministic_algorithms``, and for modules that anybody has put hooks on. Subclasses of the norm and norms
    whose call has been exchanged by somebody else are left alone.

    Args:
        model: its parameters and buffers stay as they are; :meth:`detach` undoes everything.
        convolutions: that carry what is needed to compute them with the norm behind them (``conv_norms``).
    """

    def __init__(self, model: nn.Module, convolutions: Set[nn.Module] = frozenset()) -> None:
        self._modules: list[nn.Module] = []
        self._norms: dict[nn.BatchNorm2d, _NormCall] = {}
        if not extension_available():
            return
        norms = {m: _NormCall(m) for m in model.modules() if type(m) is nn.BatchNorm2d and _free(m)}
        self._norms.update(norms)
        for norm_module, call in norms.items():
            self._install(norm_module, call)
        activations: dict[nn.Module, ActivationCall] = {}
        for module in model.modules():
            if type(module) is not nn.Sequential or not _free(module):
                continue
            children = list(module)
            pairs = [
                (norms[a], b)
                for a, b in pairwise(children)
                if a in norms and children.count(a) == 1 and fusable(b) and (b in activations or _free(b))
            ]
            steps = steps_of(children, norms, convolutions)
            if not pairs and len(steps) == len(children):
                continue
            sequence = SequenceCall(module, steps, _fused)
            self._install(module, sequence)
            for norm, activation in pairs:
                if activation not in activations:
                    activations[activation] = ActivationCall(activation)
                    self._install(activation, activations[activation])
                sequence.followers[norm] = activations[activation]
                norm.sequences.append(sequence)
        for module in model.modules():
            if type(module) is not nn.Sequential and _free(module):
                forward = fused_forward(module, set(norms), _fused, convolutions)
                if forward is not None:
                    self._install(module, forward)

    def _install(self, module: nn.Module, call: Any) -> None:
        object.__setattr__(module, SLOT, call)
        self._modules.append(module)

    def norms(self) -> list[nn.BatchNorm2d]:
        """The norms whose call is exchanged."""
        return list(self._norms)

    def set_live(self, norm: nn.BatchNorm2d, live: Tensor | None, wanted: Callable[[], bool]) -> None:
        """Channels of ``norm`` that live, int64, None for all; ``wanted`` says whether maps hold these alone."""
        self._norms[norm].live, self._norms[norm].wanted = live, wanted

    def detach(self) -> None:
        """Every module's call is its own again."""
        for module in self._modules:
            module.__dict__.pop(SLOT, None)
        self._modules.clear()


def _free(module: nn.Module) -> bool:
    return getattr(module, SLOT, None) is None


def _fused(
    conv: nn.Module | None, norm: nn.Module, activation: nn.Module | str, x: Any, residual: Any
) -> Any:
    """``activation(norm(conv(x)) + residual)``, at once where that is allowed and faster; without ``conv`` of ``x``."""
    call = norm.__dict__.get(SLOT)
    plain = isinstance(activation, str) or (fusable(activation) and not hooked(activation))
    site = None
    if isinstance(call, _NormCall) and plain:
        name = activation_name(activation)
        if conv is not None:
            site = call.site(conv, x, residual, name)
            if site is not None and site.pair is not None:
                return together(site.pair, call.module, name, *site.tensors)
            x, conv = conv(x), None
        if isinstance(x, Tensor):
            found = call.with_followers(x, residual, name)
            if found is not None:
                if site is not None:
                    call.remember(site, x)
                return found
    if conv is not None:
        x = conv(x)
    y = norm(x)
    if residual is not None:
        y = y + residual
    return ACTIVATIONS[activation](y) if isinstance(activation, str) else activation(y)


class _NormCall(ExchangedCall):
    """A batch norm; ``won`` has the verdict of the clock per kind of call."""

    module: nn.BatchNorm2d

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.sequences: list[SequenceCall] = []
        self.won: dict[tuple[Any, ...], bool] = {}
        self.live: Tensor | None = None
        self.wanted: Callable[[], bool] = lambda: False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        norm = self.module
        if torch.compiler.is_compiling() or kwargs or len(args) != 1:
            return norm._call_impl(*args, **kwargs)
        if self.live is not None and isinstance(args[0], Tensor) and args[0].dim() == 4:
            if args[0].shape[1] == len(self.live):
                return self._compact(args[0], self.live)
            if self.wanted():
                return self._compact(args[0].index_select(1, self.live), self.live)
        if not _allowed(norm, args[0], LEAST_ELEMENTS) or not self._wins(args[0], None, "none"):
            return norm._call_impl(*args, **kwargs)
        return self._fused(args[0], None)

    def with_followers(self, x: Tensor, residual: Any, activation: str) -> Tensor | None:
        """``activation(norm(x) + residual)`` by the kernel; None where the plain calls have to run, or are faster."""
        live = self.live if self.live is not None and x.dim() == 4 and x.shape[1] == len(self.live) else None
        if live is None and self.live is not None and self.wanted():
            return None
        if residual is not None and not (
            isinstance(residual, Tensor) and residual.shape == x.shape and residual.dtype == x.dtype
        ):
            return None
        allowed = _allowed(self.module, x, 0 if live is not None else LEAST_ELEMENTS)
        if not allowed or (live is None and not self._wins(x, residual, activation)):
            return None
        y: Tensor = _Norm.apply(x, self.module.weight, self.module.bias, residual, self, activation, live)
        return y

    def site(self, conv: nn.Module, x: Any, residual: Any, activation: str) -> Site | None:
        """What is known of ``activation(norm(conv(x)) + residual)`` as one call; None if it is not to be one.

        Whoever calls has made sure that modules need not compute as the user wrote them.
        """
        norm = self.module
        known = conv.__dict__[PAIRED].value if PAIRED in conv.__dict__ else None
        if known is None or not isinstance(x, Tensor) or x.is_cuda or not norm.training or hooked(norm):
            return None
        if residual is not None and not isinstance(residual, Tensor):
            return None
        alone, gate = gate_of(conv, known)
        if not alone:
            return None
        of_conv, own = conv._parameters, norm._parameters
        tensors = x, of_conv["weight"], of_conv["bias"], gate, own["weight"], own["bias"], residual
        kind = kind_of(known, tensors, activation)
        pair = known.pairs.get(kind)
        if pair is None:
            return None if kind in known.pairs else Site(known, kind, tensors, None)
        return Site(known, kind, tensors, pair if self._moves(pair.statistics) else None)

    def _statistics(self) -> Statistics | None:
        """The running statistics that the operator is to move, and None for those that there are not; None if it cannot."""
        norm = self.module
        own = norm._buffers
        if not norm.track_running_stats:
            return None, None, None
        found = own["running_mean"], own["running_var"], own["num_batches_tracked"]
        return None if norm.momentum is None else found

    def _moves(self, statistics: Statistics) -> bool:
        found = self._statistics()
        if found is None:
            return False
        mean, var, tracked = statistics
        return found[0] is mean and found[1] is var and found[2] is tracked

    def remember(self, site: Site, middle: Tensor) -> None:
        """Both parts have been computed, apart, by way of ``middle``: may it be one call from the next step on?"""
        x, weight, bias, gate, *_ = site.tensors
        statistics = self._statistics()
        way = site.known.one_way(x, weight, bias, gate)
        fits = statistics is not None and (statistics[0] is None or running_fits(*statistics, middle))
        if way is None or statistics is None or not fits:
            site.known.new_pairs[site.kind] = None
            return
        live = self.live if self.live is not None and middle.shape[1] == len(self.live) else None
        of = 0 if live is None else self.module.num_features
        site.known.new_pairs[site.kind] = pair_of(*way, weight, bias, gate, live, of, statistics)

    def _wins(self, x: Tensor, residual: Tensor | None, activation: str) -> bool:
        norm = self.module
        leaves = (x, norm.weight, norm.bias, residual)
        needs = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in leaves)
        key = (tuple(x.shape), x.dtype, x.stride(), needs, activation, residual is not None)
        if key not in self.won:
            other = None if residual is None else residual.detach()
            self.won[key] = _measure(x.detach(), norm.weight, norm.bias, norm.eps, needs, activation, other)
        return self.won[key]

    def _fused(self, x: Tensor, live: Tensor | None) -> Tensor:
        follower = self._follower()
        activation = "none" if follower is None else activation_name(follower.module)
        y: Tensor = _Norm.apply(x, self.module.weight, self.module.bias, None, self, activation, live)
        if follower is not None:
            follower.done = y
        return y

    def _compact(self, x: Tensor, live: Tensor) -> Tensor:
        """Of a map of live channels only; parameters and statistics keep their size."""
        norm = self.module
        if _allowed(norm, x, 0):
            return self._fused(x, live)
        weight, bias, mean, var = (
            None if t is None else t.index_select(0, live)
            for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        )
        if not norm.training and mean is not None:
            return F.batch_norm(x, mean, var, weight, bias, False, 0.0, norm.eps)
        y = F.batch_norm(x, None, None, weight, bias, True, 0.0, norm.eps)
        if norm.training:
            moments = torch.var_mean(x.detach().to(vector_dtype(x)), (0, 2, 3), correction=0)
            of_all = [m.new_zeros(norm.num_features).index_copy(0, live, m) for m in moments]
            self.record(of_all[1], of_all[0], x.numel() // x.shape[1])
        return y

    def _follower(self) -> ActivationCall | None:
        running = [sequence for sequence in self.sequences if sequence.running]
        if len(running) != 1:
            return None
        follower = running[0].followers[self]
        # The settings are read now: a module may have changed its class or gained hooks since.
        plain = fusable(follower.module) and not hooked(follower.module)
        return follower if plain and follower.module.__dict__.get(SLOT) is follower else None

    def record(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Running statistics as in ``nn.BatchNorm2d.forward``."""
        norm = self.module
        if not norm.track_running_stats:
            return
        running = norm.running_mean, norm.running_var
        if norm.momentum is not None and running_fits(*running, norm.num_batches_tracked, mean):
            record(*running, norm.num_batches_tracked, mean, var, count, norm.momentum)
            return
        momentum = 0.0 if norm.momentum is None else norm.momentum
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            if norm.momentum is None:
                momentum = 1.0 / float(norm.num_batches_tracked)
        if norm.running_mean is not None and norm.running_var is not None:
            update_running(norm.running_mean, norm.running_var, mean, var, count, momentum)


def _allowed(norm: nn.BatchNorm2d, x: Any, least: int) -> bool:
    if not norm.training or not isinstance(x, Tensor) or x.dim() != 4 or x.numel() < least:
        return False
    if x.numel() <= x.shape[1] or only_plain_calls(x.device.type, cast=not x.is_cuda) or hooked(norm):
        return False
    if any(t is not None and t.dtype != vector_dtype(x) for t in (norm.weight, norm.bias)):
        return False
    return can_run_masked_batch_norm_act(x).ok


class _Norm(torch.autograd.Function):
    """The operator; its second derivative, where one is asked for, is that of torch's functions."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        call: _NormCall,
        activation: str,
        live: Tensor | None,
    ) -> Tensor:
        eps, compact_of = call.module.eps, 0 if live is None else call.module.num_features
        y, mean, var = _forward(x, weight, bias, eps, activation, live, compact_of, residual)
        # In here, because a checkpointed forward may end when the last tensor is saved, after torch's has recorded.
        call.record(mean, var, x.numel() // x.shape[1])
        ctx.save_for_backward(x, weight, bias, residual, mean, var)
        ctx.settings = live, eps, activation, compact_of
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, residual, mean, var = ctx.saved_tensors
        needs: list[bool] = list(ctx.needs_input_grad[:4])
        live, eps, activation, compact_of = ctx.settings
        if torch.is_grad_enabled():
            compute = partial(_plain, eps=eps, activation=activation, live=live)
            return (*differentiable(compute, (x, weight, bias, residual), needs, grad), None, None, None)
        found = _backward(
            grad, x, weight, bias, mean, var, eps, activation, needs, live, compact_of, residual
        )
        return (*(g if need else None for g, need in zip(found, needs, strict=True)), None, None, None)
