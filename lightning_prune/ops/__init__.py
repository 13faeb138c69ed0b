"""Compiled convolution operators, each beside a pure-torch reference.

One wrapper file per operator; `reference.py` defines what every operator computes, `availability.py` says whether the
compiled one can run and why not, `_library.py` loads the library and registers fake kernels and autograd. Without the
compiled extension the wrappers compute with the reference, so a pure-Python install works, only slower.
"""

from lightning_prune.ops import availability, reference, reference_norm
from lightning_prune.ops.availability import (
    CanRun,
    can_run_compact_conv2d,
    can_run_masked_batch_norm_act,
    can_run_masked_conv2d,
    extension_available,
    unavailable_reason,
)
from lightning_prune.ops.batch_norm import masked_batch_norm_act
from lightning_prune.ops.compact_conv2d import compact_conv2d, pack_conv2d_weight, unpack_conv2d_weight
from lightning_prune.ops.masked_conv2d import masked_conv2d, masked_conv2d_backward
from lightning_prune.ops.reference import ACTIVATIONS

availability.warn_if_unavailable()

__all__ = [
    "ACTIVATIONS",
    "CanRun",
    "can_run_compact_conv2d",
    "can_run_masked_batch_norm_act",
    "can_run_masked_conv2d",
    "compact_conv2d",
    "extension_available",
    "masked_batch_norm_act",
    "masked_conv2d",
    "masked_conv2d_backward",
    "pack_conv2d_weight",
    "reference",
    "reference_norm",
    "unavailable_reason",
    "unpack_conv2d_weight",
]
