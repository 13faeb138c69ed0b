"""Functions of torch and methods of tensors that stand for an activation or a sum in a traced forward."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F

#: function -> name in ``lightning_prune.ops.ACTIVATIONS``
ACTIVATION_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu", torch.relu: "relu", torch.relu_: "relu", F.relu_: "relu", F.relu6: "relu6", F.silu: "silu",
    F.hardswish: "hardswish", torch.sigmoid: "sigmoid", F.sigmoid: "sigmoid", F.gelu: "gelu",
}  # fmt: skip
#: method -> the same
ACTIVATION_METHODS = {"relu": "relu", "relu_": "relu", "sigmoid": "sigmoid", "sigmoid_": "sigmoid"}
SUM_FUNCTIONS = (operator.add, operator.iadd, torch.add)
SUM_METHODS = ("add", "add_")

__all__ = ["ACTIVATION_FUNCTIONS", "ACTIVATION_METHODS", "SUM_FUNCTIONS", "SUM_METHODS"]
