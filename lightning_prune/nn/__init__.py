"""Modules over the compiled operators: a trainable masked convolution and an inference convolution."""

from lightning_prune.nn.compact_conv2d import CompactConv2d
from lightning_prune.nn.masked_conv2d import MaskedConv2d

__all__ = ["CompactConv2d", "MaskedConv2d"]
