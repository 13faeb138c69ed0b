"""Optimizer steps over live channels only.

Dead weights are zero and stay zero, so stepping them is work for nothing, and most of the work once a weight has lost most of
its rows and columns: an optimizer goes through every parameter, gradient and moment several times. While it steps, what lives
of them stands in their place, copied side by side, and is copied back behind it. The user's parameters keep their size, their
memory and their place in the optimizer; only the call of ``optimizer.step`` is exchanged.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import optimizer as internals

from .ops.availability import extension_available
from .reused_memory import ReusedMemory, same_indices

#: optimizers of torch whose steps go element by element
ELEMENTWISE = ("SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad", "Adadelta")
#: elements of a weight below which copying takes longer than it saves
_LEAST = 30_000
#: and the share of them that lives above which it does, unless the optimizer has one in SHARES
_MOST_LIVE = 0.5
#: SGD does little more with an element than copy it
SHARES = {"SGD": 0.2}
#: rows and columns that live, sorted int64, None for all
Lists = tuple[Tensor | None, Tensor | None]


def steps_elementwise(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is one of torch's own that step each element of a parameter by itself."""
    return type(optimizer) in (getattr(torch.optim, name) for name in ELEMENTWISE)


@dataclass
class _Block:
    """What lives of a parameter.

    Attributes:
        parameter: of full size.
        lists: its rows and columns that live.
        share: of its elements that live.
        shadow: stands in its place during a step.
        grad: memory for the live part of its gradient.
        memory: name of a state tensor -> its live part, and the tensor and version that it is known to be the live part of.
    """

    parameter: Tensor
    lists: Lists
    share: float
    shadow: nn.Parameter
    grad: Tensor | None = None
    memory: dict[str, tuple[Tensor, Tensor | None, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, parameter: Tensor, lists: Lists) -> _Block:
        return cls(parameter, lists, _share(parameter, lists), nn.Parameter(_live_part(parameter, lists)))

    def is_for(self, parameter: Tensor, lists: Lists) -> bool:
        """Whether it is what lives of a parameter that has these rows and columns."""
        same = self.parameter is parameter and self.shadow.dtype == parameter.dtype
        return same and all(map(same_indices, self.lists, lists))

    def enter(self, state: dict[Tensor, Any]) -> nn.Parameter | None:
        """Copy the live parts of parameter, gradient and state; None where the gradient is not one that can be."""
        whole, shadow = self.parameter, self.shadow
        grad = whole.grad
        if not _fits(whole, whole) or not _fits(grad, whole):
            return None
        assert grad is not None
        wholes, blocks, own = [whole], [shadow.detach()], {}
        part = ReusedMemory.live_part(grad, *self.lists) if grad.dim() == 4 else None
        if part is None or part.stride() != shadow.stride():
            part = self.grad = torch.empty_like(blocks[0]) if self.grad is None else self.grad
            wholes.append(grad)
            blocks.append(part)
        shadow.grad = part
        for name, value in state.get(whole, {}).items():
            own[name] = value
            if isinstance(value, Tensor) and value.shape == whole.shape:
                if not _fits(value, whole):
                    return None
                part, known, version = self.memory.get(name) or (torch.empty_like(shadow.detach()), None, 0)
                if value is not known or value._version != version:
                    wholes.append(value)
                    blocks.append(part)
                own[name] = part
        with torch._C._AutoDispatchBelowAutograd():
            _GATHER(_as_weights(wholes), _as_weights(blocks), *self.lists)
        if own:
            state[shadow] = own
        return shadow

    def leave(self, state: dict[Tensor, Any]) -> None:
        """Copy back what was stepped; state that is new gets its full size, zero where nothing lives."""
        whole, shadow = self.parameter, self.shadow
        wholes, blocks = [whole], [shadow.detach()]
        found = state.pop(shadow, {})
        if found:
            own = state[whole]
            for name, value in found.items():
                if not isinstance(value, Tensor) or value.shape != shadow.shape:
                    own[name] = value
                    continue
                if name not in own or own[name].shape != whole.shape:
                    own[name] = torch.zeros_like(whole, dtype=value.dtype)
                self.memory[name] = value, own[name], own[name]._version
                wholes.append(own[name])
                blocks.append(value)
        with torch._C._AutoDispatchBelowAutograd():
            _SPREAD(_as_weights(blocks), _as_weights(wholes), *self.lists)
        torch.autograd.graph.increment_version(whole)


class LiveSteps:
    """Exchanges ``step`` of the optimizers of a network for one over live channels only.

    Steps as usual: optimizers that are not torch's own elementwise ones, that somebody has hooks on or has exchanged the step
    of, that are ``differentiable`` or ``capturable``; parameters on a GPU, of other dtypes than float32 and float64, without a
    gradient, small, or largely alive; everything without the compiled extension. The state of dead channels is not stepped: it
    stays as it was, or zero where it shares a row with what lives.

    Args:
        optimizers: gives the optimizers that step the network.
    """

    def __init__(self, optimizers: Callable[[], Iterable[torch.optim.Optimizer]]) -> None:
        self._optimizers = optimizers
        self._blocks: dict[int, _Block] = {}
        self._stepped: set[int] = set()  # parameters that were stepped here
        # parameter -> version as of which its dead weights are known to be zero
        self._zero: dict[int, int] = {}
        self._exchanged: list[tuple[torch.optim.Optimizer, Any, Any]] = []

    def set_lists(self, lists: Mapping[Tensor, Lists]) -> None:
        """What lives of each parameter from now on; empty: step everything."""
        self._zero, self._stepped = {}, set()
        before, self._blocks = self._blocks, {}
        for parameter, own in lists.items():
            if _worthwhile(parameter, own):
                known = before.get(id(parameter))
                if known is None or not known.is_for(parameter, own):
                    known = _Block.of(parameter, own)
                self._blocks[id(parameter)] = known
        if self._blocks and not self._exchanged:
            self._exchange()
        elif not self._blocks:
            self.detach()

    def zeroed(self) -> None:
        """All dead weights have just been set to zero."""
        # Nobody else may step the parameter: fused steps leave its version as it is.
        self._zero = {key: self._blocks[key].parameter._version for key in self._stepped}

    def still_zero(self) -> set[int]:
        """``id`` of the parameters whose dead weights nothing has written to since :meth:`zeroed`."""
        return {key for key, version in self._zero.items() if self._blocks[key].parameter._version == version}

    def detach(self) -> None:
        """The optimizers step as before."""
        for optimizer, step, before in self._exchanged:
            # Else somebody has exchanged ours, which does nothing any more.
            if optimizer.__dict__.get("step") is step:
                del optimizer.__dict__["step"]
                if before is not None:
                    optimizer.__dict__["step"] = before
        self._exchanged, self._blocks, self._zero, self._stepped = [], {}, {}, set()

    def _exchange(self) -> None:
        for optimizer in self._optimizers():
            before = optimizer.__dict__.get("step")
            # Schedulers exchange it too, to see that it has been called.
            if before is None or hasattr(before, "_wrapped_by_lr_sched"):
                step = _bound(self, optimizer, optimizer.step)
                optimizer.__dict__["step"] = step
                self._exchanged.append((optimizer, step, before))

    @contextlib.contextmanager
    def narrow(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """In here the parameters of ``optimizer`` are what lives of them."""
        entered: list[_Block] = []
        whole = [group["params"] for group in optimizer.param_groups]
        allowed = _allowed(optimizer)
        try:
            with torch.no_grad():
                for group in optimizer.param_groups:
                    group["params"] = [self._enter(p, optimizer, entered, allowed) for p in group["params"]]
            yield
        finally:
            for group, params in zip(optimizer.param_groups, whole, strict=True):
                group["params"] = params
            with torch.no_grad():
                for block in entered:
                    key, version = id(block.parameter), block.parameter._version
                    block.leave(optimizer.state)
                    if self._zero.get(key) == version:
                        self._zero[key] = block.parameter._version

    def _enter(
        self, parameter: Tensor, optimizer: torch.optim.Optimizer, entered: list[_Block], allowed: bool
    ) -> Tensor:
        block = self._blocks.get(id(parameter))
        if block is None:
            return parameter
        limit = SHARES.get(type(optimizer).__name__, _MOST_LIVE)
        shadow = block.enter(optimizer.state) if allowed and block.share <= limit else None
        if shadow is None:
            self._zero.pop(id(parameter), None)
            self._stepped.discard(id(parameter))
            block.memory.clear()  # a fused step moves the state without a new version
            return parameter
        self._stepped.add(id(parameter))
        entered.append(block)
        return shadow


def _bound(steps: LiveSteps, optimizer: torch.optim.Optimizer, plain: Callable[..., Any]) -> Any:
    """The exchanged method; schedulers look for its function."""

    @wraps(plain)
    def step(
        self: torch.optim.Optimizer, closure: Callable[[], Any] | None = None, *args: Any, **options: Any
    ) -> Any:
        if closure is None:
            with steps.narrow(self):
                return plain(*args, **options)
        with contextlib.ExitStack() as narrow:

            def then() -> Any:
                loss = closure()  # computes the gradients of the whole parameters
                narrow.enter_context(steps.narrow(self))
                return loss

            return plain(then, *args, **options)

    return types.MethodType(step, optimizer)


def _allowed(optimizer: torch.optim.Optimizer) -> bool:
    hooked = (
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or internals._global_optimizer_pre_hooks
        or internals._global_optimizer_post_hooks
    )
    if hooked or not steps_elementwise(optimizer):
        return False
    groups: Sequence[dict[str, Any]] = optimizer.param_groups
    return not any(group.get("differentiable") or group.get("capturable") for group in groups)


def _worthwhile(parameter: Tensor, lists: Lists) -> bool:
    if not extension_available() or not _fits(parameter, parameter) or parameter.numel() < _LEAST:
        return False
    return 0 < _share(parameter, lists) <= _MOST_LIVE


def _share(parameter: Tensor, lists: Lists) -> float:
    """Of the elements that live."""
    live = 1.0
    for index, size in zip(lists, parameter.shape, strict=False):
        live *= 1.0 if index is None else len(index) / size
    return live


def _fits(tensor: Tensor | None, like: Tensor) -> bool:
    """Whether the compiled kernels copy parts of it, and the same ones as of ``like``."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor is None or not 2 <= tensor.dim() <= 4:
        return False
    dense = tensor.is_contiguous() or (
        tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    )
    kinds = (torch.float32, torch.float64)
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and dense
    return plain and tensor.dtype in kinds and tensor.dtype == like.dtype and tensor.shape == like.shape


def _as_weights(tensors: list[Tensor]) -> list[Tensor]:
    """Matrices and weights of 1-D convolutions as weights of 2-D ones."""
    missing = 4 - tensors[0].dim()
    return tensors if missing == 0 else [t.view(*t.shape, *(1,) * missing) for t in tensors]


def _live_part(whole: Tensor, lists: Lists) -> Tensor:
    last = whole.dim() == 4 and whole.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        for dim, index in enumerate(lists):
            if index is not None:
                whole = whole.index_select(dim, index)
        return whole.clone(memory_format=torch.channels_last if last else torch.contiguous_format)


_GATHER: Any = torch.ops.lightning_prune.gather_blocks.default if extension_available() else None
_SPREAD: Any = torch.ops.lightning_prune.spread_blocks.default if extension_available() else None
