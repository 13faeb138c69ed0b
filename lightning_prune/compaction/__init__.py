"""From a choice of channels to a smaller network that is proven equal.

``plan`` (which positions of which tensors go) -> ``apply`` (slice a copy, patch its attributes) -> ``verify`` (compare
with the masked network) -> ``checkpoint`` (save and load without pickle).
"""

from .apply import apply_plan, mask_channels, zeroed_slices
from .checkpoint import load_compact, save_compact
from .optimizer import compact_optimizer
from .plan import CompactionPlan, GroupRemoval, TensorSlice
from .verify import compact, max_relative_error

__all__ = [
    "CompactionPlan", "GroupRemoval", "TensorSlice", "apply_plan", "compact", "compact_optimizer", "load_compact",
    "mask_channels", "max_relative_error", "save_compact", "zeroed_slices",
]  # fmt: skip
