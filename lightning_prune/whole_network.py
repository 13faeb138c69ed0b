"""Which modules compute the whole network: ``self(x)`` and ``self.net(x)`` may be the same."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .channels.trace import undisturbed
from .inputs import ExampleInputs, call_model


def whole_network_calls(model: nn.Module, inputs: ExampleInputs) -> tuple[list[str], Any]:
    """Names of the modules whose call takes an input of the network and returns its output as it is, and that output.

    Outermost first; ``""`` is the model itself.
    """
    given = {id(leaf) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)}
    names = {module: name for name, module in model.named_modules()}
    calls: list[tuple[str, bool, Any]] = []

    def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.append((names[module], any(id(leaf) in given for leaf in tree_leaves((args, kwargs))), output))

    handles = [module.register_forward_hook(record, with_kwargs=True) for module in names]
    try:
        with undisturbed(model):
            found = call_model(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    whole = [name for name, takes_input, output in calls if takes_input and output is found]
    return sorted(dict.fromkeys(whole), key=lambda name: (name != "", name.count("."))), found
