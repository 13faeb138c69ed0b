"""An ``nn.Sequential`` that runs as a whole: who reads a child's output is the next child, and nobody else."""

from __future__ import annotations

from collections.abc import Callable, Collection, Set
from typing import Any

import torch
from torch import Tensor, nn

from .hooks import ExchangedCall, hooked, only_plain_calls
from .nn._convert import activation_name


def fusable(module: nn.Module) -> bool:
    """Whether this is an activation that the kernel has."""
    try:
        return activation_name(module) != "none"
    except ValueError:
        return False


def steps_of(
    children: list[nn.Module], norms: Collection[nn.Module], convolutions: Set[nn.Module]
) -> list[tuple[nn.Module, ...]]:
    """The children of a sequence; a convolution, a norm and an activation behind it, if there is one, are one step."""
    steps: list[tuple[nn.Module, ...]] = []
    while children:
        first, *behind = children
        length = 1
        if first in convolutions and behind and behind[0] in norms:
            length = 3 if len(behind) > 1 and fusable(behind[1]) else 2
        steps.append(tuple(children[:length]))
        children = children[length:]
    return steps


class SequenceCall(ExchangedCall):
    """A sequence that knows that it runs as a whole, so that each child's output goes to the next child alone.

    Args:
        module: an ``nn.Sequential``.
        steps: of :func:`steps_of`.
        fused: see ``fused_forwards.Fused``.
    """

    def __init__(
        self, module: nn.Module, steps: list[tuple[nn.Module, ...]], fused: Callable[..., Any]
    ) -> None:
        super().__init__(module)
        self.followers: dict[ExchangedCall, ActivationCall] = {}
        self.running = False
        self._fused = fused
        self._steps = [(*step, "none") if len(step) == 2 else step for step in steps]
        self._children = [child for step in steps for child in step]
        self._pairs = len(steps) < len(self._children)

    def _step_by_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether convolutions may be called with their norms: nobody watches."""
        module = self.module
        if not self._pairs or len(args) != 1 or kwargs or not module.training or hooked(module):
            return False
        if "forward" in module.__dict__ or type(module) is not nn.Sequential or only_plain_calls("cpu"):
            return False
        return not torch._C._len_torch_function_stack()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the sequence's; the plain call where it has other children by now."""
        module = self.module
        if torch.compiler.is_compiling() or self.running or list(module._modules.values()) != self._children:
            return module._call_impl(*args, **kwargs)
        if self._step_by_step(args, kwargs):
            x = args[0]
            for first, *behind in self._steps:
                x = self._fused(first, behind[0], behind[1], x, None) if behind else first(x)
            return x
        self.running = True
        try:
            return self.module._call_impl(*args, **kwargs)
        finally:
            self.running = False
            for follower in self.followers.values():
                follower.done = None


class ActivationCall(ExchangedCall):
    """An activation that passes on the one tensor to which it has been applied already."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.done: Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the activation's."""
        if not torch.compiler.is_compiling():
            done, self.done = self.done, None
            if done is not None and len(args) == 1 and args[0] is done:
                return done
        return self.module._call_impl(*args, **kwargs)
