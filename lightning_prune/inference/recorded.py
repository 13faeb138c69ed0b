"""Convolution sites by watching one run: works for any forward, sees chains of modules only."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..channels.trace import tensors_in
from ..compaction.apply import clone_model
from ..inputs import ExampleInputs, call_model
from ..nn._convert import activation_name
from .sites import ConvSite, foldable, fusable, plain

#: calls that look at a tensor without reading its values
_METADATA = {
    "size",
    "dim",
    "ndimension",
    "is_floating_point",
    "is_contiguous",
    "stride",
    "numel",
    "__len__",
    "__get__",
}


@dataclass
class _Run:
    """What was seen: calls of each module, and by which modules each tensor was read, in order."""

    calls: dict[nn.Module, list[tuple[Tensor, Tensor]]] = field(default_factory=lambda: defaultdict(list))
    readers: dict[int, list[tuple[nn.Module, ...]]] = field(default_factory=lambda: defaultdict(list))
    stack: list[nn.Module] = field(default_factory=list)
    alive: list[Tensor] = field(default_factory=list)  # so that no id is used twice


class _Watch(TorchFunctionMode):
    """Notes who reads which tensor."""

    def __init__(self, run: _Run) -> None:
        super().__init__()
        self._run = run

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") not in _METADATA:
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor):
                    self._run.alive.append(leaf)
                    self._run.readers[id(leaf)].append(tuple(self._run.stack))
        return func(*args, **kwargs)


class RecordedBlueprint:
    """A network whose modules are replaced where they stand; its class and its forward stay.

    Args:
        model: in evaluation mode and a copy of the user's.
        inputs: what its forward takes.
    """

    def __init__(self, model: nn.Module, inputs: ExampleInputs) -> None:
        self._model = model
        self._names = {module: name for name, module in model.named_modules()}
        run = _record(model, inputs)
        self.sites: list[ConvSite] = []
        self._followers: list[list[str]] = []
        for module, calls in run.calls.items():
            if not fusable(module) or len(calls) != 1 or calls[0][0].dim() != 4:
                continue
            assert isinstance(module, nn.Conv2d)
            norm = self._next(run, module)
            norm = norm if norm is not None and foldable(norm) else None
            after = self._next(run, module if norm is None else norm)
            activation = _name(after)
            followers = ([norm] if norm is not None else []) + (
                [after] if after is not None and activation is not None else []
            )
            assert norm is None or isinstance(norm, nn.BatchNorm2d)
            shape = tuple(calls[0][0].shape)
            self.sites.append(ConvSite(self._names[module], module, norm, activation or "none", False, shape))
            self._followers.append([self._names[m] for m in followers])

    def _next(self, run: _Run, module: nn.Module) -> nn.Module | None:
        """The module that alone reads the only output of ``module``, if each is called once."""
        output = run.calls[module][0][1]
        readers = run.readers[id(output)]
        if not readers or not readers[0]:
            return None
        reader = readers[0][-1]
        calls = run.calls.get(reader, [])
        if len(calls) != 1 or calls[0][0] is not output or reader is module:
            return None
        in_place = calls[0][1] is output  # then whoever reads it later reads the reader's result
        return reader if in_place or all(stack and stack[-1] is reader for stack in readers) else None

    def build(self, modules: list[nn.Module]) -> nn.Module:
        """See :class:`lightning_prune.inference.sites.Blueprint`."""
        model = clone_model(self._model)
        for site, module, followers in zip(self.sites, modules, self._followers, strict=True):
            _replace(model, site.name, module)
            for name in followers:
                _replace(model, name, nn.Identity())
        return model.eval()


def _name(module: nn.Module | None) -> str | None:
    if module is None or not plain(module):
        return None
    try:
        return activation_name(module)
    except ValueError:
        return None


def _record(model: nn.Module, inputs: ExampleInputs) -> _Run:
    run = _Run()
    handles = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        run.stack.append(module)

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        run.stack.pop()
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if len(given) == 1 and isinstance(output, Tensor):
            run.calls[module].append((given[0], output))
            run.alive += [given[0], output]
        else:
            run.calls[module] += [(torch.empty(0), torch.empty(0))] * 2  # never a link of a chain

    was_plain = {module: plain(module) for module in model.modules()}
    try:
        for module in model.modules():
            if was_plain[module]:
                handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
                handles.append(module.register_forward_hook(leave, with_kwargs=True))
        with torch.no_grad(), _Watch(run):
            output = call_model(model, inputs)
        for tensor in tensors_in(output):
            run.readers[id(tensor)].append(())  # the caller
    finally:
        for handle in handles:
            handle.remove()
    return run


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` wherever the module called ``name`` is registered."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for attribute, child in list(parent._modules.items()):
            if child is old:
                parent._modules[attribute] = module
