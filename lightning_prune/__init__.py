"""lightning-prune: make convolutional networks physically smaller and measurably faster.

One callback for PyTorch Lightning (:class:`ChannelPruning`), and functions for plain PyTorch. Names are imported on first
use, so that plain PyTorch users never load Lightning.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "BudgetError": "errors",
    "ChannelGraph": "channels",
    "ChannelGroup": "channels",
    "ChannelPruning": "callback",
    "CompactionError": "errors",
    "CompactionPlan": "compaction",
    "CostModel": "cost",
    "Latency": "latency",
    "PlanError": "errors",
    "PruneError": "errors",
    "PruneReport": "outcome",
    "PruneResult": "prune",
    "TraceError": "errors",
    "compact": "compaction",
    "compact_optimizer": "compaction",
    "compare_latency": "latency",
    "find_duplicate_channels": "redundancy",
    "from_scratch": "init",
    "load_compact": "compaction",
    "mask_channels": "compaction",
    "max_relative_error": "compaction",
    "measure_latency": "latency",
    "merge_duplicate_channels": "redundancy",
    "optimize_for_inference": "inference",
    "profile": "profiling",
    "prune_channels": "prune",
    "reconstruct": "reconstruction",
    "reinitialise": "init",
    "save_compact": "compaction",
    "trace_channels": "channels",
}

__all__ = ["__version__", *sorted(_HOME)]

if TYPE_CHECKING:
    from .callback import ChannelPruning as ChannelPruning
    from .channels import ChannelGraph as ChannelGraph
    from .channels import ChannelGroup as ChannelGroup
    from .channels import trace_channels as trace_channels
    from .compaction import CompactionPlan as CompactionPlan
    from .compaction import compact as compact
    from .compaction import compact_optimizer as compact_optimizer
    from .compaction import load_compact as load_compact
    from .compaction import mask_channels as mask_channels
    from .compaction import max_relative_error as max_relative_error
    from .compaction import save_compact as save_compact
    from .cost import CostModel as CostModel
    from .errors import BudgetError as BudgetError
    from .errors import CompactionError as CompactionError
    from .errors import PlanError as PlanError
    from .errors import PruneError as PruneError
    from .errors import TraceError as TraceError
    from .inference import optimize_for_inference as optimize_for_inference
    from .init import from_scratch as from_scratch
    from .init import reinitialise as reinitialise
    from .latency import Latency as Latency
    from .latency import compare_latency as compare_latency
    from .latency import measure_latency as measure_latency
    from .outcome import PruneReport as PruneReport
    from .profiling import profile as profile
    from .prune import PruneResult as PruneResult
    from .prune import prune_channels as prune_channels
    from .reconstruction import reconstruct as reconstruct
    from .redundancy import find_duplicate_channels as find_duplicate_channels
    from .redundancy import merge_duplicate_channels as merge_duplicate_channels


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
