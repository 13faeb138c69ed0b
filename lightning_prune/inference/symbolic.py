"""Convolution sites by ``torch.fx``: functional activations and residual adds are seen as well."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..inputs import ExampleInputs
from ..nn import CompactConv2d
from ..nn._convert import activation_name
from .functions import ACTIVATION_FUNCTIONS, ACTIVATION_METHODS, SUM_FUNCTIONS, SUM_METHODS
from .lines import rows_of_lines
from .rewrite import Rewrite, attribute
from .sites import ConvSite, foldable, fusable, plain

_DROPOUTS = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout)


class _Tracer(fx.Tracer):
    """Does not look into this package's modules."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = type(m).__module__.startswith("lightning_prune.nn")
        own |= isinstance(m, CompactConv2d)
        return own or super().is_leaf_module(m, module_qualified_name)


class _Shapes(fx.Interpreter):
    """Runs a graph and keeps the shape and dtype of every tensor."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        n.meta["seen"] = (tuple(result.shape), result.dtype) if isinstance(result, Tensor) else None
        return result


class SymbolicBlueprint:
    """A traced network.

    Args:
        model: in evaluation mode and a copy of the user's: tracing may run code that changes it.
        inputs: what its forward takes.

    Raises:
        Exception: whatever tracing raises on code that depends on values; the caller looks for another way.
    """

    def __init__(self, model: nn.Module, inputs: ExampleInputs) -> None:
        arguments, missing = _bind(model, inputs)
        tracer = _Tracer()
        with torch.no_grad():
            graph = tracer.trace(model, missing)
            placeholders = [n for n in graph.nodes if n.op == "placeholder"]
            for node, name in zip(placeholders, inspect.signature(model.forward).parameters, strict=True):
                node.target = name  # arguments that are held constant get a number otherwise
                node.type = None  # annotations as text could not be pickled
            self._module = fx.GraphModule(tracer.root, graph, type(model).__name__)
            self._modules = dict(self._module.named_modules())
            self._skip_identities()
            values = {**missing, **arguments}
            given = [values[str(n.target)] for n in placeholders]
            _Shapes(self._module).run(*given)
            if rows_of_lines(self._module):
                self._modules = dict(self._module.named_modules())
                _Shapes(self._module).run(*given)
        self._module.recompile()
        self.sites: list[ConvSite] = []
        self._spans: list[tuple[list[fx.Node], fx.Node | None]] = []
        self._taken: set[fx.Node] = set()
        for node in graph.nodes:
            self._inspect(node)

    def _skip_identities(self) -> None:
        """What does nothing in evaluation mode stands in nobody's way."""
        for node in list(self._module.graph.nodes):
            if node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
                module = self._modules[str(node.target)]
                if type(module) in _DROPOUTS and plain(module) and not module.training:
                    node.replace_all_uses_with(node.args[0])
                    self._module.graph.erase_node(node)
            elif node.op == "call_method" and node.target == "view":
                node.target = "reshape"  # the same values, also of channels_last tensors

    # ---- finding ---------------------------------------------------------------------------------------------------

    def _inspect(self, node: fx.Node) -> None:
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            return
        conv = self._modules[str(node.target)]
        seen = node.args[0].meta.get("seen") if isinstance(node.args[0], fx.Node) else None
        if not fusable(conv) or seen is None or len(seen[0]) != 4:
            return
        assert isinstance(conv, nn.Conv2d)
        site = ConvSite(node.meta.get("name", str(node.target)), conv, None, "none", False, seen[0])
        span, residual = [node], None
        norm_node = _only_reader(node)
        norm = None if norm_node is None else self._norm(norm_node)
        if norm_node is not None and norm is not None and not _disturbed(node, norm_node):
            site, span = replace(site, norm=norm), [node, norm_node]
        follower = _only_reader(span[-1])
        other = None if follower is None else _added(follower, span[-1])
        if follower is not None and other is not None and follower not in self._taken:
            if not _disturbed(node, follower):
                site, residual = replace(site, residual=True), other
                self._taken.add(follower)
                span.append(follower)
                follower = _only_reader(follower)
            else:
                follower = None
        name = self._activation(follower)
        if follower is not None and name is not None and not _disturbed(node, follower):
            site = replace(site, activation=name)
            span.append(follower)
        self.sites.append(site)
        self._spans.append((span, residual))

    def _norm(self, node: fx.Node) -> nn.BatchNorm2d | None:
        """The batch norm that a node applies, as a module or as ``F.batch_norm`` in evaluation mode."""
        if node.op == "call_module":
            module = self._modules[str(node.target)]
            return module if foldable(module) and isinstance(module, nn.BatchNorm2d) else None
        if node.op != "call_function" or node.target is not F.batch_norm:
            return None
        names = list(inspect.signature(F.batch_norm).parameters)
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        parts = {name: self._tensor(given.get(name)) for name in names[1:5]}
        mean, var = parts["running_mean"], parts["running_var"]
        if given.get("training", False) is not False or mean is None or var is None:
            return None
        if any(given.get(name) is not None and parts[name] is None for name in ("weight", "bias")):
            return None
        norm = nn.BatchNorm2d(len(mean), eps=float(given.get("eps", 1e-5)), affine=False, device=mean.device)  # type: ignore[arg-type]
        norm.running_mean, norm.running_var = mean, var
        for name in ("weight", "bias"):
            tensor = parts[name]
            setattr(
                norm, name, None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False)
            )
        return norm.eval()

    def _tensor(self, node: Any) -> Tensor | None:
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        value = attribute(self._module, str(node.target))
        return value if isinstance(value, Tensor) else None

    def _activation(self, node: fx.Node | None) -> str | None:
        """The name of the activation that a node applies to its only tensor, or None."""
        if node is None:
            return None
        if node.op == "call_module":
            module = self._modules[str(node.target)]
            try:
                name = activation_name(module)
            except ValueError:
                return None
            return name if plain(module) else None
        options = {**node.kwargs}
        options.pop("inplace", None)
        options.pop("input", None)
        if node.op == "call_function" and node.target in ACTIVATION_FUNCTIONS:
            if options.pop("approximate", "none") != "none" or options:
                return None
            positional = node.args[1:]
            return ACTIVATION_FUNCTIONS[node.target] if all(isinstance(a, bool) for a in positional) else None
        method = node.op == "call_method" and not options
        return ACTIVATION_METHODS.get(str(node.target)) if method else None

    # ---- building --------------------------------------------------------------------------------------------------

    def build(self, modules: list[nn.Module]) -> nn.Module:
        """See :class:`lightning_prune.inference.sites.Blueprint`."""
        rewrite = Rewrite(self._module)
        for number, (module, (span, residual)) in enumerate(zip(modules, self._spans, strict=True)):
            source = span[0].args[0]
            assert isinstance(source, fx.Node)
            name = f"fused_{number}_" + str(span[0].target).replace(".", "_")
            rewrite.replace(span, [source] if residual is None else [source, residual], name, module)
        return rewrite.module()


def _bind(model: nn.Module, inputs: ExampleInputs) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of forward by name: those given, and the defaults of those that are not.

    Raises:
        TypeError: forward takes ``*args`` or ``**kwargs``, whose number tracing would fix.
    """
    signature = inspect.signature(model.forward)
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if any(parameter.kind in kinds for parameter in signature.parameters.values()):
        raise TypeError("forward takes any number of arguments")
    if isinstance(inputs, Mapping):
        given = signature.bind(**inputs).arguments
    else:
        given = signature.bind(*(inputs if isinstance(inputs, (tuple, list)) else (inputs,))).arguments
    constants = {
        name: value for name, value in given.items() if not isinstance(value, (Tensor, tuple, list, dict))
    }
    defaults = {n: p.default for n, p in signature.parameters.items() if n not in given}
    return dict(given), {**defaults, **constants}


def _only_reader(node: fx.Node) -> fx.Node | None:
    """The one node that reads ``node``, once; None if there are several."""
    if len(node.users) != 1:
        return None
    reader = next(iter(node.users))
    return reader if reader.op != "output" and sum(n is node for n in reader.all_input_nodes) == 1 else None


def _added(node: fx.Node, ours: fx.Node) -> fx.Node | None:
    """The tensor that ``node`` adds to ``ours``, if both have the same shape and dtype.

    At another batch size they may not: the batch of one of them may be a constant. What takes the site's place then makes an
    ordinary sum, see ``sums.py``.
    """
    known = node.op == "call_function" and node.target in SUM_FUNCTIONS
    known |= node.op == "call_method" and node.target in SUM_METHODS
    if not known or node.kwargs or len(node.args) != 2 or node.args[0] is node.args[1]:
        return None
    other = node.args[1] if node.args[0] is ours else node.args[0]
    if not isinstance(other, fx.Node) or ours not in node.args:
        return None
    if node.args[0] is not ours and (node.target is operator.iadd or node.target == "add_"):
        return None  # writes into the other tensor, which may have readers
    mine, theirs = ours.meta.get("seen"), other.meta.get("seen")
    # a map of one pixel may be broadcast at another resolution
    return other if mine is not None and mine == theirs and mine[0][2] * mine[0][3] > 1 else None


def _disturbed(first: fx.Node, last: fx.Node) -> bool:
    """Whether something between two nodes may write into a tensor: then the convolution cannot move down."""
    node = first.next
    while node is not last:
        if _writes(node) and not _chained(first, node):
            return True
        node = node.next
    return False


def _writes(node: fx.Node) -> bool:
    if node.op == "call_module" and node.graph.owning_module is not None:
        return bool(getattr(node.graph.owning_module.get_submodule(str(node.target)), "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_") or bool(node.kwargs.get("inplace"))
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        in_place = bool(node.kwargs.get("inplace")) or True in node.args[1:]
        return in_place or name.endswith("_") or name in ("iadd", "imul", "isub", "itruediv", "setitem")
    return False


def _chained(first: fx.Node, writer: fx.Node) -> bool:
    """Whether the writer only touches a fresh tensor that nobody but it reads (an activation behind a layer)."""
    source = writer.args[0] if writer.args else None
    if not isinstance(source, fx.Node) or len(source.users) != 1 or source is first.args[0]:
        return False
    return source.op == "call_module"


__all__ = ["SymbolicBlueprint"]
