"""Experiments: many fits that differ in method, budget and seed, compared with honest intervals.

``trials`` says what a fit is, ``runner`` trains one, ``store`` keeps results in an Optuna storage, ``work`` goes through a
grid of trials alone or beside other processes, ``summary`` computes means and paired differences, ``present`` draws them.
``article`` is the source article's experiment (``lightning-prune sweep article``); ``benchmarks/accuracy.py`` is another.
"""

from .runner import run_trial
from .store import TrialStore
from .summary import Estimate, estimate, paired_difference
from .trials import BASELINES, Setting, Trial, TrialResult, check_methods, grid, known_methods
from .work import Runner, work

__all__ = [
    "BASELINES", "Estimate", "Runner", "Setting", "Trial", "TrialResult", "TrialStore", "check_methods", "estimate", "grid",
    "known_methods", "paired_difference", "run_trial", "work",
]  # fmt: skip
