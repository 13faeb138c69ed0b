"""The last dense layer behind a global mean, as a 1x1 convolution: then a segment can hold it."""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..nn import CompactConv2d
from .rewrite import Rewrite
from .sites import plain


def with_convolution_as_head(network: fx.GraphModule) -> fx.GraphModule:
    """The network with ``linear(mean over the map)`` as ``flatten(conv1x1(mean over the map))``, wherever it has that.

    Args:
        network: its nodes know their shapes (``meta["seen"]``); not changed, its weights are shared but for those of the
            dense layers.

    Returns:
        The network itself where there is none.
    """
    if not any(_head(network, node) for node in network.graph.nodes):
        return network
    network = Rewrite(network).module()
    for node in list(network.graph.nodes):
        found = _head(network, node)
        if found is not None:
            _replace(network, node, found)
    network.graph.eliminate_dead_code()
    network.recompile()
    return network


def _replace(network: fx.GraphModule, linear: fx.Node, source: fx.Node) -> None:
    module = cast(nn.Linear, network.get_submodule(str(linear.target)))
    images, channels = source.meta["seen"][0][:2]
    conv = nn.Conv2d(channels, module.out_features, 1, bias=module.bias is not None)
    conv.weight = nn.Parameter(module.weight.detach()[:, :, None, None])
    if module.bias is not None:
        conv.bias = nn.Parameter(module.bias.detach())
    pool, name = f"{linear.name}_mean", f"{linear.name}_as_convolution"
    network.add_submodule(pool, nn.AdaptiveAvgPool2d(1).eval())
    network.add_submodule(name, CompactConv2d.from_conv(conv, backend="own", algorithm="direct"))
    graph = network.graph
    with graph.inserting_before(linear):
        mean = graph.call_module(pool, (source,))
        mapped = graph.call_module(name, (mean,))
        result = graph.call_function(torch.flatten, (mapped, 1))
    mean.meta["seen"] = ((images, channels, 1, 1), torch.float32)
    mapped.meta["seen"] = ((images, module.out_features, 1, 1), torch.float32)
    result.meta = dict(linear.meta)
    linear.replace_all_uses_with(result)
    graph.erase_node(linear)


def _head(network: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The map over which a dense layer takes the mean, or None."""
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return None
    linear = network.get_submodule(str(node.target))
    if type(linear) is not nn.Linear or not plain(linear) or linear.weight.is_cuda:
        return None
    flat = node.args[0]
    if linear.weight.dtype is not torch.float32 or not isinstance(flat, fx.Node) or len(flat.users) != 1:
        return None
    if flat.meta.get("seen") is None or len(flat.meta["seen"][0]) != 2:
        return None
    source = _mean(network, flat, keeps=False)
    if source is None and _flattens(network, flat):
        pooled = flat.args[0]
        if isinstance(pooled, fx.Node) and len(pooled.users) == 1:
            source = _mean(network, pooled, keeps=True)
    seen = None if source is None else source.meta.get("seen")
    if seen is None or len(seen[0]) != 4 or seen[1] is not torch.float32 or seen[0][1] != linear.in_features:
        return None
    return source


def _mean(network: fx.GraphModule, node: fx.Node, keeps: bool) -> fx.Node | None:
    """What a node takes the mean over rows and columns of; ``keeps``: as a map of one pixel."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    if node.op == "call_module":
        module = network.get_submodule(str(node.target))
        one = type(module) is nn.AdaptiveAvgPool2d and module.output_size in (1, (1, 1)) and plain(module)
        return source if one and keeps else None
    if node.op == "call_function" and node.target is F.adaptive_avg_pool2d:
        given = _bound(F.adaptive_avg_pool2d, node)
        return source if keeps and given.get("output_size") in (1, (1, 1), [1, 1]) else None
    if (node.op, node.target) in (("call_method", "mean"), ("call_function", torch.mean)):
        given = {
            "dim": None,
            "keepdim": False,
            **dict(zip(("dim", "keepdim"), node.args[1:], strict=False)),
            **node.kwargs,
        }
        dims = given.pop("dim")
        both = isinstance(dims, (tuple, list)) and sorted(map(str, dims)) in (["2", "3"], ["-1", "-2"])
        return source if both and given == {"keepdim": keeps} else None
    return None


def _flattens(network: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node makes (N, C) of (N, C, 1, 1): only one way to write that is looked at for each of torch's three."""
    if node.op == "call_module":
        module = network.get_submodule(str(node.target))
        return type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1) and plain(module)
    known = (node.op, node.target) in (("call_function", torch.flatten), ("call_method", "flatten"))
    return known and (node.args[1:], node.kwargs) in (((1,), {}), ((), {"start_dim": 1}), ((1, -1), {}))


def _bound(function: Any, node: fx.Node) -> dict[str, Any]:
    return dict(inspect.signature(function).bind(*node.args, **node.kwargs).arguments)


__all__ = ["with_convolution_as_head"]
