"""When finetuning has nothing left to gain."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from .config import check_positive


class Plateau:
    """Watches a logged metric; on a plateau when it has not improved for ``patience`` epochs.

    Metrics named like an accuracy, a score or an F-measure should rise, all others fall.
    """

    def __init__(self, monitor: str | None, patience: int) -> None:
        check_positive("patience", patience)
        self.monitor = monitor
        self.patience = patience
        self.best: float | None = None
        self.waited = 0

    @property
    def rising(self) -> bool:
        """Whether larger is better."""
        return self.monitor is not None and any(
            k in self.monitor.lower() for k in ("acc", "f1", "auc", "map", "score", "iou")
        )

    def reached(self, trainer: pl.Trainer) -> bool:
        """Take in this epoch's value; True on a plateau, alike on every rank."""
        if self.monitor is None:
            return False
        value = trainer.callback_metrics.get(self.monitor)
        if value is None:
            known = ", ".join(sorted(trainer.callback_metrics)) or "none"
            raise MisconfigurationException(
                f"monitor={self.monitor!r} is not among the logged metrics: {known}"
            )
        number = float(trainer.strategy.reduce(value.float(), reduce_op="mean"))
        better = self.best is None or (number > self.best if self.rising else number < self.best)
        self.best, self.waited = (number, 0) if better else (self.best, self.waited + 1)
        return self.waited >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """Best value and how long ago it was."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self.best, self.waited = state["best"], state["waited"]
