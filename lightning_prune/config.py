"""Arguments of :class:`lightning_prune.ChannelPruning`, checked the moment they are given."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .budget import RAMPS
from .compaction import CompactionPlan
from .cost import METRICS
from .criteria import CRITERIA
from .gates import LEARNED, Measured
from .recalibration import check_recalibrate
from .scope import Patterns, check_factors, check_patterns, check_ratios


def methods() -> tuple[str, ...]:
    """Every name that ``method=`` takes."""
    return (*LEARNED, *sorted(CRITERIA))


def check_choice(argument: str, value: object, choices: Iterable[str]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    options = list(choices)
    if value not in options:
        raise ValueError(f"{argument} must be one of {', '.join(options)}; got {value!r}")


def check_fraction(argument: str, value: float) -> None:
    """Raise ValueError unless ``value`` is a number in (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value <= 1.0:
        raise ValueError(
            f"{argument} is the fraction of the dense network to keep and must be in (0, 1]; got {value!r}"
        )


def check_positive(argument: str, value: int, least: int = 1) -> None:
    """Raise ValueError unless ``value`` is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{argument} must be an integer of at least {least}; got {value!r}")


def check_number(argument: str, value: float, *, zero: bool = True) -> None:
    """Raise ValueError unless ``value`` is a finite number that is not negative (nor zero, unless ``zero``)."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0.0 <= value < float("inf")
    if not good or (value == 0 and not zero):
        raise ValueError(
            f"{argument} must be a {'non-negative' if zero else 'positive'} number; got {value!r}"
        )


@dataclass(frozen=True)
class PruneConfig:
    """Validated arguments; see :class:`lightning_prune.ChannelPruning` for their meaning."""

    target: float
    metric: str
    method: str
    plan: CompactionPlan | None
    warmup_epochs: int | None
    learn_epochs: int | None
    finetune_epochs: int | None
    include: Patterns
    exclude: Patterns
    prune_streams: bool
    round_to: int
    min_channels: int
    alternate_every_n_steps: int
    weight_l1: float
    weight_l2: float
    sphere: bool
    gate_lr: float | None
    snap_threshold: float
    method_options: Mapping[str, Any]
    ratios: Mapping[str, float] | None
    reconstruct: bool
    rewind_to: int | None
    remove_branches: bool
    ramp: str
    seed: int
    dead_channel_skipping: bool = True
    distill: float = 0.0
    distill_temperature: float = 4.0
    recalibrate: bool | int = False
    reentry_until: float = 0.0
    penalty_weights: Mapping[str, float] | None = None
    reconfigure_every_n_epochs: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        check_fraction("target", self.target)
        check_choice("metric", self.metric, METRICS)
        check_choice("method", self.method, methods())
        check_choice("ramp", self.ramp, RAMPS)
        for name in ("warmup_epochs", "learn_epochs", "finetune_epochs"):
            value = getattr(self, name)
            if value is not None:
                check_positive(name, value, least=0)
        check_positive("round_to", self.round_to)
        check_positive("min_channels", self.min_channels)
        check_positive("alternate_every_n_steps", self.alternate_every_n_steps, least=0)
        check_positive("reconfigure_every_n_epochs", self.cut_every, least=0)
        check_number("weight_l1", self.weight_l1)
        check_number("weight_l2", self.weight_l2)
        check_number("snap_threshold", self.snap_threshold)
        if self.gate_lr is not None:
            check_number("gate_lr", self.gate_lr, zero=False)
        check_ratios(self.ratios)
        check_factors(self.penalty_weights)
        check_number("distill", self.distill)
        check_number("distill_temperature", self.distill_temperature, zero=False)
        check_recalibrate(self.recalibrate)
        check_number("reentry_until", self.reentry_until)
        if self.reentry_until > 1:
            raise ValueError(
                f"reentry_until is a share of the learn phase and must be in [0, 1]; got {self.reentry_until!r}"
            )
        if self.reentry_until and not self.learns:
            raise ValueError(
                f"reentry_until={self.reentry_until!r} needs a learn phase during which channels may come back: give "
                f"learn_epochs with method={self.method!r}"
            )
        if self.rewind_to is not None:
            check_positive("rewind_to", self.rewind_to, least=0)
        if not isinstance(self.dead_channel_skipping, bool):
            raise ValueError(
                f"dead_channel_skipping must be True or False; got {self.dead_channel_skipping!r}"
            )
        check_patterns("include", self.include)
        check_patterns("exclude", self.exclude)
        if self.learned and self.learn_epochs == 0:
            raise ValueError(
                f"learn_epochs must be at least 1 for method={self.method!r}, which learns its masks; got 0"
            )

    @property
    def cut_every(self) -> int:
        """Epochs between cuts that were asked for; 0: none were."""
        every = self.reconfigure_every_n_epochs
        return every if every != "auto" else 0

    @property
    def cuts_unasked(self) -> bool:
        """Whether the network may be cut wherever nobody can notice."""
        return self.reconfigure_every_n_epochs == "auto"

    @property
    def learned(self) -> bool:
        """Whether the method needs the learn phase (otherwise a criterion or a given plan decides)."""
        return self.plan is None and self.method in LEARNED

    @property
    def learns(self) -> bool:
        """Whether there is a learn phase: a learned method, or a criterion that prunes gradually."""
        return self.learned or (self.plan is None and bool(self.learn_epochs))

    @property
    def penalised(self) -> bool:
        """Whether a penalty drives channels out (otherwise saliencies are only ranked)."""
        return self.learned and not issubclass(LEARNED[self.method], Measured)


def load_plan(plan: CompactionPlan | str | os.PathLike[str] | None) -> CompactionPlan | None:
    """A plan given as object or path.

    Raises:
        PlanError: the file is missing, corrupt or foreign.
        ValueError: neither a plan nor a path.
    """
    if plan is None or isinstance(plan, CompactionPlan):
        return plan
    if isinstance(plan, (str, os.PathLike)):
        return CompactionPlan.load(plan)
    raise ValueError(f"plan must be a CompactionPlan or the path of one; got {type(plan).__name__}")
