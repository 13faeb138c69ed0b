"""Every error the package raises on purpose. All derive from :class:`PruneError`."""

from __future__ import annotations


class PruneError(Exception):
    """Base class."""


class TraceError(PruneError):
    """The model could not be run on the example input, or has nothing to prune."""


class PlanError(PruneError):
    """A plan file is corrupt, foreign, or does not fit the model."""


class CompactionError(PruneError):
    """The compact network would not equal the masked one. ``module`` names the first module that differs."""

    def __init__(self, message: str, module: str | None = None) -> None:
        super().__init__(message)
        self.module = module


class BudgetError(PruneError):
    """No selection of channels meets the target."""
