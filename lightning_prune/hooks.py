"""Hooks, marks and exchanged calls that stay with their module: copies and pickles of it go without."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as internals
from torch.utils._python_dispatch import _get_current_dispatch_mode

#: where ``nn.Module`` looks for an exchanged call, which copies and pickles leave out
SLOT = "_compiled_call_impl"
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _nothing(*unused: Any, **unused_too: Any) -> None:
    """What a copied or unpickled module has in place of the hook."""


def _make_nothing() -> Callable[..., None]:
    return _nothing


class PrivateHook:
    """A hook that does not go along when its module is copied or pickled."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _nothing

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return _make_nothing, ()


def is_private(hook: Any) -> bool:
    """Whether a hook is ours, or what a copy has in place of one."""
    return isinstance(hook, PrivateHook) or hook is _nothing


class Marker:
    """A mark on a module, with a value; a copy of the module has None in its place."""

    def __init__(self, value: Any = None) -> None:
        self.value = value

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return type(None), ()


class ExchangedCall:
    """What is called in place of a module; the plain call is ``module._call_impl``."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module


def compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` runs a module."""
    call = module.__dict__.get(SLOT)
    by_itself = call is not None and not isinstance(call, ExchangedCall)
    # Of a LightningModule that was compiled as a whole the trainer has this left.
    return (
        by_itself
        or module.__dict__.get("_compiler_ctx") is not None
        or hasattr(module, "_torchdynamo_orig_callable")
    )


def forget_compiled() -> None:
    """Have ``torch.compile`` look anew at whatever it runs: hooks that are in the graph have been added or removed.

    It does not notice by itself that a module which had no hooks has some by now: guards on hooks are off by default
    (``skip_nnmodule_hook_guards``), and turning them on adds none to code that has been compiled already, perhaps for another
    network of the same class. Nor would looking for compiled modules find a compiled function that calls them.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def hooked(module: nn.Module) -> bool:
    """Whether a module has hooks of any kind."""
    own = module.__dict__
    if (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    ):
        return True
    return bool(internals._has_any_global_hook())


def only_plain_calls(device: str, *, cast: bool = True) -> bool:
    """Whether modules have to compute as the user wrote them, whatever would be faster.

    Under autocast on ``device`` (a type, as in ``"cpu"``) if that ``cast``s what the module takes, with
    ``torch.use_deterministic_algorithms`` (choices depend on the clock, and rounding on choices), while ``torch.jit`` traces,
    and under a dispatch mode: somebody watches the operators.
    """
    if (cast and torch.is_autocast_enabled(device)) or torch.are_deterministic_algorithms_enabled():
        return True
    return bool(torch.jit.is_tracing()) or _get_current_dispatch_mode() is not None
