"""Attributes that repeat a tensor's size. torch's own modules keep their sizes as integers beside their weights.

This is the only table of layer types in the package, and it decides nothing: which positions go comes from the labels.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

#: what :func:`refresh_attributes` sets
_SIZES = ("in_channels", "out_channels", "groups", "in_features", "out_features", "num_features", "normalized_shape",
          "num_channels", "num_parameters", "num_embeddings", "embedding_dim")  # fmt: skip


def size_attributes(module: nn.Module) -> dict[str, Any]:
    """The size attributes of ``module`` as they are, to be put back into its ``__dict__``."""
    return {name: module.__dict__[name] for name in _SIZES if name in module.__dict__}


def refresh_attributes(module: nn.Module) -> None:
    """Set the size attributes of ``module`` to what its (sliced) tensors say."""
    if isinstance(module, _ConvNd):
        _refresh_conv(module)
    elif isinstance(module, (nn.Linear, nn.Bilinear)):
        module.out_features = module.weight.shape[0]
        if isinstance(module, nn.Linear):
            module.in_features = module.weight.shape[1]
    elif isinstance(module, _NormBase):
        vector = module.weight if module.weight is not None else module.running_mean
        if vector is not None:
            module.num_features = vector.shape[0]
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.GroupNorm) and module.weight is not None:
        module.num_channels = module.weight.shape[0]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.numel()
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape


def _refresh_conv(conv: _ConvNd) -> None:
    depthwise = conv.groups > 1 and conv.groups == conv.in_channels
    rows, columns = conv.weight.shape[:2]
    if isinstance(conv, _ConvTransposeNd):
        if depthwise:
            conv.groups = rows
        conv.in_channels, conv.out_channels = rows, columns * conv.groups
    else:
        if depthwise:
            multiplier = conv.out_channels // conv.groups
            conv.groups = rows // multiplier
        conv.in_channels, conv.out_channels = columns * conv.groups, rows
