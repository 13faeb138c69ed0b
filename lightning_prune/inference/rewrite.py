"""A copy of a traced network in which runs of nodes are single modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx, nn


class Rewrite:
    """Builds the copy; the traced network is not changed, what is not replaced is shared with it.

    Args:
        network: the traced network.
    """

    def __init__(self, network: fx.GraphModule) -> None:
        self._network = network
        self._graph = fx.Graph()
        self._copies: dict[fx.Node, fx.Node] = {}
        self._root: dict[str, Any] = {}
        output = self._graph.graph_copy(network.graph, self._copies)
        if any(node.op == "output" for node in network.graph.nodes):
            self._graph.output(output)

    def replace(
        self, run: Sequence[fx.Node], inputs: Sequence[fx.Node], name: str, module: nn.Module
    ) -> None:
        """Put ``module(*inputs)`` in the place of ``run``, of which only the last node is read by others.

        Args:
            run: nodes of the traced network in the order of execution; ``inputs`` likewise its own.
            inputs: what the module is called with; all of them come before the last of ``run``.
            name: of the module in the copy.
            module: computes what the last node of ``run`` did.
        """
        self._root[name] = module
        last = self._copies[run[-1]]
        with self._graph.inserting_before(last):
            call = self._graph.call_module(name, tuple(self._copies[node] for node in inputs))
        call.meta = dict(last.meta)
        last.replace_all_uses_with(call)
        for node in reversed(run):
            self._graph.erase_node(self._copies[node])
        self._copies[run[-1]] = call

    def module(self) -> fx.GraphModule:
        """The copy, in evaluation mode."""
        for node in self._graph.nodes:
            if node.op in ("call_module", "get_attr") and node.target not in self._root:
                self._root[str(node.target)] = attribute(self._network, str(node.target))
        self._graph.lint()
        return fx.GraphModule(self._root, self._graph, type(self._network).__name__).eval()


def attribute(module: nn.Module, path: str) -> Any:
    """What a dotted path names: a submodule, parameter, buffer or constant."""
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value


__all__ = ["Rewrite", "attribute"]
