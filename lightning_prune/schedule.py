"""When what happens: warmup -> learn -> finetune, in whole epochs."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import lightning.pytorch as pl

from .config import PruneConfig


class Phase(IntEnum):
    """Phases of a fit; the number is what ``prune/phase`` logs."""

    WARMUP = 0
    LEARN = 1
    FINETUNE = 2


@dataclass(frozen=True)
class Schedule:
    """Length of each phase in epochs; ``finetune`` None means until the trainer stops."""

    warmup: int
    learn: int
    finetune: int | None

    @classmethod
    def resolve(cls, config: PruneConfig, max_epochs: int | None) -> Schedule:
        """Fill in the lengths that were left open from the trainer's ``max_epochs`` (None or -1: unlimited).

        A learned method takes a fifth of the epochs for warmup and two fifths for learning, a criterion with
        ``learn_epochs`` a fifth for warmup; without them it takes a third for warmup and no time for learning (one-shot).
        A given plan starts finetuning at once.

        Raises:
            ValueError: the phases do not fit into ``max_epochs``, or lengths are missing and there is no limit.
        """
        limit = max_epochs if max_epochs is not None and max_epochs >= 0 else None
        if config.plan is not None:
            warmup, learn = 0, 0
        else:
            shares = (0.2, 0.4) if config.learns else (1 / 3, 0.0)
            lengths = []
            named = (("warmup_epochs", config.warmup_epochs), ("learn_epochs", config.learn_epochs))
            for (name, given), share in zip(named, shares, strict=True):
                if name == "learn_epochs" and not config.learns:
                    lengths.append(0)
                elif given is not None:
                    lengths.append(given)
                elif limit is None:
                    raise ValueError(f"{name} must be given when the Trainer has no max_epochs")
                else:
                    lengths.append(max(round(limit * share), 1 if name == "learn_epochs" else 0))
            warmup, learn = lengths
        finetune = config.finetune_epochs
        needed = warmup + learn + (finetune or 0)
        if limit is not None and needed > limit:
            raise ValueError(
                f"warmup_epochs={warmup}, learn_epochs={learn} and finetune_epochs={finetune or 0} need {needed} epochs, "
                f"but the Trainer has max_epochs={limit}: raise max_epochs or shorten the phases"
            )
        return cls(warmup, learn, finetune)

    @property
    def before_selection(self) -> int:
        """Epochs before the hard selection."""
        return self.warmup + self.learn

    @property
    def total(self) -> int | None:
        """All epochs, or None when finetuning is open-ended."""
        return None if self.finetune is None else self.warmup + self.learn + self.finetune

    def learn_steps(self, trainer: pl.Trainer) -> int:
        """Optimizer steps in the learn phase, as well as can be told."""
        batches = trainer.num_training_batches
        per_epoch = batches / max(trainer.accumulate_grad_batches, 1) if batches != float("inf") else 1000.0
        return max(1, round(per_epoch * self.learn))

    def phase(self, epoch: int, selected: bool = False) -> Phase:
        """Phase of an epoch (counted from 0); once channels are ``selected``, a fit that goes on for longer only finetunes."""
        if selected:
            return Phase.FINETUNE
        if epoch < self.warmup:
            return Phase.WARMUP
        return Phase.LEARN if epoch < self.warmup + self.learn else Phase.FINETUNE
