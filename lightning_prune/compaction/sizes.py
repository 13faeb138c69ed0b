"""Sizes that Python code spells out, replaced at run time in the modules that spell them out.

A module whose ``forward`` says ``reshape(b, n, 3, 12, 64)`` keeps its code; a subclass of its class, made on the fly,
runs that ``forward`` under a mode that puts the compact sizes into the calls the plan names. Everything else about the
module (parameters, training, hooks, ``isinstance``) stays as it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from ..channels.calls import function_name, write


@dataclass(frozen=True)
class SizeFix:
    """The sizes to use in the ``ordinal``-th call of ``function`` within the ``forward`` of ``module``."""

    module: str
    function: str
    ordinal: int
    sizes: tuple[tuple[str, int], ...]


class _Replace(TorchFunctionMode):
    def __init__(self, fixes: dict[tuple[str, int], dict[str, int]]) -> None:
        super().__init__()
        self.fixes = fixes
        self.functions = {name for name, _ in fixes}
        self.count: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function_name(func)
        if name in self.functions:
            sizes = self.fixes.get((name, self.count[name]))
            self.count[name] += 1
            if sizes is not None:
                func, args, kwargs = write(func, name, args, kwargs, sizes)
        return func(*args, **kwargs)


class CompactSizes(nn.Module):
    """Mixin of the classes that :func:`install` makes."""

    _size_fixes: tuple[SizeFix, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original ``forward`` with the compact sizes."""
        with _Replace({(f.function, f.ordinal): dict(f.sizes) for f in self._size_fixes}):
            plain = self.__dict__.get("_plain_forward")
            return (plain or super().forward)(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles name the original class; the subclass is made again."""
        return _restore, (type(self).__mro__[2],), self.__dict__


_CLASSES: dict[type, type] = {}


def _restore(original: type) -> Any:
    cls = _compact_class(original)
    return cls.__new__(cls)  # type: ignore[call-overload]


def _compact_class(original: type) -> type:
    if original not in _CLASSES:
        _CLASSES[original] = type(
            original.__name__, (CompactSizes, original), {"__module__": original.__module__}
        )
    return _CLASSES[original]


def install(model: nn.Module, fixes: Iterable[SizeFix]) -> list[nn.Module]:
    """Make the modules that ``fixes`` name use the sizes given there; returns these modules."""
    by_module: dict[str, list[SizeFix]] = {}
    for fix in fixes:
        by_module.setdefault(fix.module, []).append(fix)
    changed = []
    for name, own in by_module.items():
        module = model.get_submodule(name)
        module.__class__ = _compact_class(type(module))
        if "forward" in module.__dict__:  # some modules choose among several forwards when they are made
            module.__dict__["_plain_forward"] = module.__dict__.pop("forward")
        module._size_fixes = tuple(own)  # type: ignore[assignment]
        changed.append(module)
    return changed


def uninstall(modules: Iterable[nn.Module]) -> None:
    """Undo :func:`install` on what it returned."""
    for module in modules:
        module.__class__ = type(module).__mro__[2]
        module.__dict__.pop("_size_fixes")
        if "_plain_forward" in module.__dict__:
            module.__dict__["forward"] = module.__dict__.pop("_plain_forward")
