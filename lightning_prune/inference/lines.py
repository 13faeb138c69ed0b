"""One-dimensional layers as two-dimensional ones over maps of one row, so that they run the same kernels."""

from __future__ import annotations

from typing import Any, cast

from torch import fx, nn

from ..nn._convert import _ACTIVATION_MODULES
from .functions import ACTIVATION_FUNCTIONS, ACTIVATION_METHODS, SUM_FUNCTIONS, SUM_METHODS
from .sites import plain

_ROW = 2  # where the dimension of one row stands
_POINTWISE = {*ACTIVATION_FUNCTIONS, *ACTIVATION_METHODS}
_SUMS = {*SUM_FUNCTIONS, *SUM_METHODS}


def rows_of_lines(module: fx.GraphModule) -> bool:
    """Let convolutions, norms and pools of (N, C, L) maps work on (N, C, 1, L), and what is pointwise between them.

    Where something else reads such a map, the row is taken away again; what is computed stays the same. Layers get new
    names, ``node.meta["name"]`` keeps theirs.

    Args:
        module: changed in place. Its nodes know their shapes (``meta["seen"]``); those of new nodes are not known.

    Returns:
        Whether there was a convolution to change.
    """
    graph, modules = module.graph, dict(module.named_modules())
    if not any(n.op == "call_module" and type(modules[str(n.target)]) is nn.Conv1d for n in graph.nodes):
        return False
    rows: dict[fx.Node, fx.Node] = {}  # map of three dimensions -> the same with a row

    def with_row(node: fx.Node) -> fx.Node:
        if node not in rows:
            with graph.inserting_after(node):
                rows[node] = graph.call_method("unsqueeze", (node, _ROW))
        return rows[node]

    changed = False
    for number, node in enumerate(list(graph.nodes)):
        maps = [a for a in node.args if isinstance(a, fx.Node)]
        if not maps or any(len((a.meta.get("seen") or ((),))[0]) != 3 for a in maps):
            continue
        target: Any = node.target
        if node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
            layer = modules[str(node.target)]
            wide = _in_two_dimensions(layer) if plain(layer) else None
            if wide is not None:
                target = f"line_{number}_" + str(node.target).replace(".", "_")
                module.add_submodule(target, wide)
                changed |= isinstance(wide, nn.Conv2d)
            elif type(layer) not in _ACTIVATION_MODULES or maps[0] not in rows:
                continue
        elif target in _POINTWISE:
            if len(maps) != 1 or maps[0] not in rows:
                continue
        elif target not in _SUMS or len(maps) != 2 or not all(a in rows for a in maps):
            continue
        inputs = [with_row(a) for a in maps]
        args = tuple(inputs.pop(0) if isinstance(a, fx.Node) else a for a in node.args)
        with graph.inserting_before(node):
            new = graph.create_node(node.op, target, args, dict(node.kwargs))
            line = graph.call_method("squeeze", (new, _ROW))
        new.meta["name"] = str(node.target)
        line.meta["seen"] = node.meta.get("seen")
        rows[line] = new
        node.replace_all_uses_with(line)
        graph.erase_node(node)
    for node in reversed(list(graph.nodes)):  # rows that nobody took away or asked for
        if node.op == "call_method" and node.target in ("squeeze", "unsqueeze") and not node.users:
            graph.erase_node(node)
    module.delete_all_unused_submodules()
    graph.lint()
    return changed


def _in_two_dimensions(layer: nn.Module) -> nn.Module | None:
    """The same layer for maps of one row, with the same tensors; None for other layers."""
    if type(layer) is nn.Conv1d:
        padding: Any = layer.padding if isinstance(layer.padding, str) else (0, *layer.padding)
        conv = nn.utils.skip_init(
            nn.Conv2d, layer.in_channels, layer.out_channels, (1, *layer.kernel_size), (1, *layer.stride), padding,
            (1, *layer.dilation), layer.groups, layer.bias is not None, layer.padding_mode, device="cpu",
        )  # fmt: skip
        conv.weight = nn.Parameter(layer.weight.detach().unsqueeze(_ROW), requires_grad=False)
        conv.bias = layer.bias
        return cast(nn.Module, conv.eval())
    if type(layer) is nn.BatchNorm1d and not layer.training:
        norm = nn.BatchNorm2d(layer.num_features, layer.eps, layer.momentum, False, False)
        for name in ("weight", "bias", "running_mean", "running_var"):
            setattr(norm, name, getattr(layer, name))
        norm.affine, norm.track_running_stats = layer.affine, layer.track_running_stats
        return norm.eval()
    if type(layer) is nn.MaxPool1d and not layer.return_indices:
        sizes = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        kernel, stride, padding, dilation = (_only(size) for size in sizes)
        return nn.MaxPool2d((1, kernel), (1, stride), (0, padding), (1, dilation), False, layer.ceil_mode)
    if type(layer) is nn.AvgPool1d:
        kernel, stride, padding = (_only(size) for size in (layer.kernel_size, layer.stride, layer.padding))
        return nn.AvgPool2d((1, kernel), (1, stride), (0, padding), layer.ceil_mode, layer.count_include_pad)
    if type(layer) is nn.AdaptiveAvgPool1d and _only(layer.output_size) == 1:
        return nn.AdaptiveAvgPool2d((1, 1))
    return None


def _only(value: Any) -> int:
    return int(value[0]) if isinstance(value, (tuple, list)) else int(value)


__all__ = ["rows_of_lines"]
