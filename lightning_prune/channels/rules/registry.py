"""The table of rules and the description of one executed op."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

from ..flow import Flow


@dataclass(frozen=True)
class Call:
    """One executed op: what was called, with what, and what came out."""

    func: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any

    @property
    def name(self) -> str:
        """Overload packet name with namespace, e.g. ``"aten.cat"``."""
        return str(self.func.overloadpacket)

    def arg(self, name: str, default: Any = None) -> Any:
        """Argument by its schema name, whether it was passed by position, by keyword or left at its default."""
        for i, argument in enumerate(self.func._schema.arguments):
            if argument.name == name:
                if i < len(self.args):
                    return self.args[i]
                if name in self.kwargs:
                    return self.kwargs[name]
                return argument.default_value if argument.has_default_value() else default
        return default

    def outputs(self) -> list[Tensor]:
        """Tensor outputs in order."""
        return list(tensors_of(self.out))


Rule = Callable[[Flow, Call], None]
_RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for aten ops: packet names without the namespace, separated by spaces."""

    def add(function: Rule) -> Rule:
        for name in " ".join(names).split():
            _RULES[f"aten.{name}"] = function
        return function

    return add


def lookup(name: str) -> Rule | None:
    """The rule registered for ``name``, if any; an in-place op has that of its plain twin."""
    return _RULES.get(name) or _RULES.get(name.removesuffix("_"))


def tensors_of(tree: Any) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
