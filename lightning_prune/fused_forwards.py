"""Forward methods whose norms take the residual sum and the activation that follow along.

Who else reads a norm's output is written in the forward method of the module that holds it. Where that method is a plain
expression of submodules, torch functions and tensor methods, ``torch.fx`` gives the same expression as a graph, and the sites
in it become one call each. Anything else (helper methods, loops, values that decide, attributes that are set) is left alone.
"""

from __future__ import annotations

import ast
import inspect
import operator
import textwrap
from collections.abc import Callable, Iterator, Set
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .hooks import ExchangedCall, hooked, only_plain_calls
from .nn._convert import activation_name

_ACTIVATIONS: dict[Any, str] = {
    F.relu: "relu", torch.relu: "relu", torch.relu_: "relu", F.relu6: "relu6", F.silu: "silu",
    F.hardswish: "hardswish", torch.sigmoid: "sigmoid", F.sigmoid: "sigmoid",
}  # fmt: skip
_ACTIVATION_METHODS = {"relu": "relu", "relu_": "relu", "sigmoid": "sigmoid", "sigmoid_": "sigmoid"}
_ADDS = (operator.add, operator.iadd, torch.add)
#: functions and tensor methods that a plain forward may call: of a tensor, without chance and without anything kept
_FUNCTIONS = (
    *_ACTIVATIONS, *_ADDS, torch.mul, torch.flatten, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d,
)  # fmt: skip
_METHODS = {
    *_ACTIVATION_METHODS, "add", "add_", "mul", "mul_", "mean", "sum", "flatten", "view", "reshape", "size", "squeeze",
}  # fmt: skip
_SYNTAX = (
    ast.Return, ast.Assign, ast.AnnAssign, ast.AugAssign, ast.If, ast.IfExp,
    ast.Expr, ast.Name, ast.Attribute, ast.Call, ast.keyword, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Constant,
    ast.Tuple, ast.expr_context, ast.operator, ast.unaryop, ast.boolop, ast.Is, ast.IsNot,
)  # fmt: skip

#: ``fused(conv, norm, activation, x, residual)``: the activation (a module, or a name) of the norm of ``x`` plus ``residual``;
#: of the convolution of ``x`` where ``conv`` is not None
Fused = Callable[..., Any]


class ForwardCall(ExchangedCall):
    """A module's forward as the graph in which norms take along what follows them.

    Args:
        module: whose forward was traced.
        run: the graph's function of the module and its inputs.
        seen: the module's attributes that the trace has read.
    """

    def __init__(self, module: nn.Module, run: Callable[..., Any], seen: dict[str, Any]) -> None:
        super().__init__(module)
        self._run = run
        own = module._modules
        self._children = tuple((name, value) for name, value in seen.items() if name in own)
        self._seen = tuple((name, value) for name, value in seen.items() if name not in own)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Shapes as the forward has them."""
        module = self.module
        if torch.compiler.is_compiling() or not self._current():
            return module._call_impl(*args, **kwargs)
        return self._run(module, *args, **kwargs)

    def _current(self) -> bool:
        """Whether the graph is still the module's forward, and nobody watches."""
        module = self.module
        if not module.training or hooked(module) or "forward" in module.__dict__ or only_plain_calls("cpu"):
            return False
        if torch._C._len_torch_function_stack():
            return False
        own, children = module.__dict__, module._modules
        for name, value in self._children:  # what getattr finds, in a fifth of its time
            if children.get(name) is not value or name in own:
                return False
        return all(getattr(module, name, None) is value for name, value in self._seen)


def fused_forward(
    module: nn.Module, norms: set[nn.Module], fused: Fused, convolutions: Set[nn.Module] = frozenset()
) -> ForwardCall | None:
    """``module``'s forward with ``fused`` in the place of its norms; None where there is nothing to fuse, or no certainty.

    Args:
        module: not changed.
        norms: the norms that may be fused.
        fused: see :data:`Fused`.
        convolutions: that may be computed with the norm behind them.
    """
    if not any(child in norms for child in module.children()):
        return None
    forward = type(module).forward
    if not isinstance(forward, FunctionType) or isinstance(module, torch.jit.ScriptModule):
        return None
    try:
        definition = ast.parse(textwrap.dedent(inspect.getsource(forward))).body[0]
        names = _read_by_plain_code(definition, module, forward)
        if names is None:
            return None
        graph = _Tracer().trace(module)
    except Exception:  # no source, or whatever tracing makes of it
        return None
    if not _rewrite(graph, dict(module.named_modules()), norms, fused, convolutions):
        return None
    code = graph.python_code("self")
    scope: dict[str, Any] = dict(code.globals)
    exec(compile(code.src, f"<fused forward of {type(module).__name__}>", "exec"), scope)
    return ForwardCall(module, scope["forward"], {name: getattr(module, name) for name in names})


class _Proxy(fx.Proxy):
    """Records that an assignment writes to its target."""

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __isub__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.isub, (self, other), {})

    def __imul__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})


class _Tracer(fx.Tracer):
    """Looks into no submodule."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


def _read_by_plain_code(definition: ast.stmt, module: nn.Module, forward: FunctionType) -> set[str] | None:
    """Attributes of ``self`` that a forward reads, None unless a graph can say all that it does.

    Whatever decides anything must be a setting of the module, and everything else an operation on what came in.
    """
    if not isinstance(definition, ast.FunctionDef) or definition.decorator_list or forward.__closure__:
        return None
    given = definition.args
    if given.vararg or given.kwarg or given.kwonlyargs or given.defaults or not given.args:
        return None
    own, local = given.args[0].arg, set(forward.__code__.co_varnames)
    names: set[str] = set()
    known: set[ast.AST] = set()  # names that may stand where they do
    for node in _below(definition):
        if not isinstance(node, _SYNTAX):
            return None
        if isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant):
            return None
        if isinstance(node, ast.AugAssign) and not isinstance(node.op, ast.Add | ast.Sub | ast.Mult):
            return None
        if isinstance(node, ast.Attribute):
            if not isinstance(node.ctx, ast.Load):
                return None
            if isinstance(node.value, ast.Name) and node.value.id == own:
                names.add(node.attr)
                known.add(node.value)
        if isinstance(node, ast.Call):
            if not _plain_call(node.func, own, module, forward, local):
                return None
            known.update(n for n in ast.walk(node.func) if isinstance(n, ast.Name))
        deciding = node.test if isinstance(node, ast.If | ast.IfExp) else node
        decides = deciding is not node or isinstance(node, ast.Compare | ast.BoolOp)
        if decides and any(isinstance(n, ast.Name) and n.id != own for n in ast.walk(deciding)):
            return None
    for node in _below(definition):
        if isinstance(node, ast.Name) and node not in known and (node.id == own or node.id not in local):
            return None
    settings = (nn.Module, bool, int, float, str, type(None))
    return names if all(isinstance(getattr(module, name), settings) for name in names) else None


def _below(definition: ast.FunctionDef) -> Iterator[ast.AST]:
    """What a function's body consists of, annotations left out."""
    waiting: list[ast.AST] = list(definition.body)
    while waiting:
        node = waiting.pop()
        yield node
        skipped = node.annotation if isinstance(node, ast.AnnAssign) else None
        waiting += [child for child in ast.iter_child_nodes(node) if child is not skipped]


def _plain_call(
    function: ast.expr, own: str, module: nn.Module, forward: FunctionType, local: set[str]
) -> bool:
    """Whether what is called is a submodule, a known function of torch, or a known method of a tensor."""
    path: list[str] = []
    while isinstance(function, ast.Attribute):
        path.insert(0, function.attr)
        function = function.value
    if not isinstance(function, ast.Name) or (function.id in local and function.id != own):
        return len(path) == 1 and path[0] in _METHODS
    found: Any = module if function.id == own else forward.__globals__.get(function.id)
    for name in path:
        found = getattr(found, name, None)
    if function.id == own:
        return found is None or (found is not module and isinstance(found, nn.Module))
    return any(found is known for known in _FUNCTIONS)


def _rewrite(
    graph: fx.Graph,
    modules: dict[str, nn.Module],
    norms: set[nn.Module],
    fused: Fused,
    convolutions: Set[nn.Module],
) -> bool:
    """Put ``fused`` in the place of norm, sum and activation wherever each is read by the next alone."""
    made: set[fx.Node] = set()
    for node in list(graph.nodes):
        if (
            node.op != "call_module"
            or modules.get(str(node.target)) not in norms
            or len(node.args) != 1
            or node.kwargs
        ):
            continue
        last, residual = node, None
        reader = _only_reader(last)
        other = None if reader is None else _added(reader, last)
        if reader is not None and other is not None:
            last, residual = reader, other
            reader = _only_reader(last)
        activation = None if reader is None else _activation(reader, modules, graph)
        if reader is None or activation is None:
            continue
        conv = node.args[0]
        assert isinstance(conv, fx.Node)
        pair = _movable(conv, (node, last, reader), modules, convolutions, made)
        with graph.inserting_before(reader):
            norm = graph.get_attr(str(node.target))
            acting = graph.get_attr(activation) if reader.op == "call_module" else activation
            own = graph.get_attr(str(conv.target)) if pair else None
            call = graph.call_function(fused, (own, norm, acting, conv.args[0] if pair else conv, residual))
        reader.replace_all_uses_with(call)
        for gone in dict.fromkeys((reader, last, node, *([conv] if pair else []))):
            graph.erase_node(gone)
        made.add(call)
    return bool(made)


def _movable(
    conv: fx.Node,
    behind: tuple[fx.Node, ...],
    modules: dict[str, nn.Module],
    convolutions: Set[nn.Module],
    made: set[fx.Node],
) -> bool:
    """Whether ``conv`` is a convolution that nobody but the first of ``behind`` reads, and may run as late as the last.

    What runs in between must not be able to write to its input: nothing does, or the input is new and has no other reader.
    """
    if conv.op != "call_module" or modules.get(str(conv.target)) not in convolutions or len(conv.users) != 1:
        return False
    if len(conv.args) != 1 or conv.kwargs or not isinstance(conv.args[0], fx.Node):
        return False
    x, node = conv.args[0], conv.next
    while node in behind[:-1] or node.op == "get_attr":
        node = node.next
    return node is behind[-1] or (x in made and len(x.users) == 1)


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _added(node: fx.Node, summand: fx.Node) -> fx.Node | None:
    """What ``node`` adds to ``summand``; None if it does anything else, or writes to something else."""
    method = node.op == "call_method" and node.target in ("add", "add_")
    if not method and not (node.op == "call_function" and node.target in _ADDS):
        return None
    if len(node.args) != 2 or node.kwargs:
        return None
    first, second = node.args
    if first is summand:
        other = second
    elif method or node.target is operator.iadd:  # may write to the other one
        return None
    else:
        other = first
    return other if isinstance(other, fx.Node) and other is not summand else None


def _activation(node: fx.Node, modules: dict[str, nn.Module], graph: fx.Graph) -> str | None:
    """The name of the activation that a node applies, or of the module that does."""
    if len(node.args) != 1 or set(node.kwargs) - {"inplace"}:
        return None
    if node.op == "call_module":
        try:
            known = activation_name(modules.get(str(node.target))) != "none"
        except ValueError:
            return None
        return str(node.target) if known else None
    if node.op == "call_method":
        return _ACTIVATION_METHODS.get(str(node.target))
    return _ACTIVATIONS.get(node.target) if node.op == "call_function" else None
