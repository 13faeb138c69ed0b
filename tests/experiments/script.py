"""Run by tests in processes of their own: an experiment whose fits only wait, and note that they ran."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from lightning_prune.experiments import Setting, Trial, TrialResult, work
from lightning_prune.experiments.work import Job


def no_data(seed: int) -> None:
    raise AssertionError("no data are needed")


def wait(setting: Setting, trial: Trial, folder: Path, needed: TrialResult | None) -> TrialResult:
    with (folder / "started").open("a") as file:
        file.write(f"{os.getpid()} {trial.key}\n")
    time.sleep(float(os.environ.get("FIT_SECONDS", "0.2")))
    return TrialResult(trial, 0.5, 1.0, 2.0, 1.0, 2.0, 3, 4.0, 0.1)


SETTING = Setting("a", no_data, no_data, (1, 1, 1))
TRIALS = [
    t
    for seed in range(3)
    for t in (
        Trial("a", "dense", 1.0, seed),
        Trial("a", "l1", 0.5, seed),
        Trial("a", "from_scratch", 0.5, seed),
    )
]

if __name__ == "__main__":
    work(Job(sys.argv[1], "study", {"a": SETTING}, TRIALS, Path(sys.argv[2]), wait), progress=print)
