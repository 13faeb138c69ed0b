"""Goes through the trials of an experiment: alone, with worker processes, or beside other machines."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .runner import run_trial
from .store import TrialStore
from .trials import Setting, Trial, TrialResult

#: runs one trial: setting, trial, folder of the shared warmups, result of the trial it needs
Runner = Callable[[Setting, Trial, Path, TrialResult | None], TrialResult]
#: seconds between two looks at trials that others are running
_POLL = 0.5


@dataclass(frozen=True)
class Job:
    """Everything a worker process needs; it is pickled, so settings and runner must be importable.

    Attributes:
        storage: see :func:`~lightning_prune.experiments.store.open_storage`.
        study: name in the storage.
        settings: of the experiment, by name.
        trials: in the order of work, needed ones first (see :func:`~lightning_prune.experiments.trials.grid`).
        folder: for the shared warmups.
        runner: how a trial is run.
        threads: CPU threads per process.
    """

    storage: str
    study: str
    settings: Mapping[str, Setting]
    trials: Sequence[Trial]
    folder: Path
    runner: Runner = run_trial
    threads: int = 1


def work(job: Job, *, jobs: int = 1, progress: Callable[[str], None] = lambda line: None) -> None:
    """Run every trial that has no result yet; returns when each is complete or hopeless, whoever ran it.

    Args:
        job: what to do.
        jobs: processes, this one included.
        progress: called with one line per finished trial of this process.

    Raises:
        ValueError: the storage's study belongs to other settings.
    """
    store = TrialStore(
        job.storage, job.study, list(job.settings.values())
    )  # refuses before anything is started
    context = multiprocessing.get_context("spawn")
    helpers = [context.Process(target=work, args=(job,), daemon=True) for _ in range(jobs - 1)]
    for helper in helpers:
        helper.start()
    try:
        _go_through(job, store, progress)
    except BaseException:
        for helper in helpers:
            helper.terminate()
        raise
    finally:
        for helper in helpers:
            helper.join()


def _go_through(job: Job, store: TrialStore, progress: Callable[[str], None]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(job.threads)
    try:
        while True:
            store.release_lost()
            done, hopeless = store.results(), store.hopeless()
            blocked = _blocked(job.trials, hopeless)
            open_trials = [t for t in job.trials if t not in done and t not in blocked]
            if not open_trials:
                return
            ready = [t for t in open_trials if (needed := t.needs()) is None or needed in done]
            claim = store.claim(ready) if ready else None
            if claim is None:  # others are at work on what is left
                time.sleep(_POLL)
                continue
            needed = claim.trial.needs()
            try:
                with store.alive(claim):
                    setting = job.settings[claim.trial.network]
                    result = job.runner(
                        setting, claim.trial, job.folder, done.get(needed) if needed else None
                    )
            except Exception as error:
                store.fail(claim, f"{type(error).__name__}: {error}")
                progress(f"{claim.trial}: {type(error).__name__}: {error}")
            except BaseException:
                store.release(claim)
                raise
            else:
                store.complete(claim, result)
                progress(
                    f"[{len(job.trials) - len(open_trials) + 1}/{len(job.trials)}] {claim.trial}: "
                    f"{100 * result.accuracy:.1f} % with {result.macs_share:.1%} of the MACs ({result.seconds:.0f} s)"
                )
    finally:
        torch.set_num_threads(threads)


def _blocked(trials: Sequence[Trial], hopeless: Mapping[Trial, str]) -> set[Trial]:
    """Trials that cannot be run: hopeless ones, and those that need them."""
    blocked = set(hopeless)
    for trial in trials:  # needed ones come first
        if trial.needs() in blocked:
            blocked.add(trial)
    return blocked
