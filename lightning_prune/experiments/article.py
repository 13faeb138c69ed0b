"""The source article's experiment as one command: accuracy against the share of weights removed."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from ..config import check_fraction, check_positive
from ..data.cifar import find_cifar
from ..report import write_json
from .present import accuracy_table, document, networks, plot_accuracy
from .runner import check_trial
from .settings import article_settings, cifar, cluttered_digits
from .store import TrialStore
from .summary import summarise
from .trials import FROM_SCRATCH, Setting, Trial, check_methods, grid
from .work import Job, work

METHODS = (
    "l1", "l0", "vib", "taylor", "slimming", "magnitude", "random", "first_k", "from_scratch", "from_scratch_compute",
)  # fmt: skip


@dataclass(frozen=True)
class ArticleSweep:
    """Arguments of ``lightning-prune sweep article``; the defaults are the article's, on cluttered digits.

    Attributes:
        methods: see :func:`~lightning_prune.experiments.trials.known_methods`.
        targets: shares of ``metric`` to keep.
        seeds: number of seeds (0, 1, ...).
        epochs: warmup, learning, finetuning.
        metric: of the budget: "params" (the article's weights) or "macs".
        data_dir: folder of CIFAR-10 or CIFAR-100 in a published layout; None draws cluttered digits.
        samples: training samples (None: all there are; cluttered digits: 4000).
        canvas: edge length of the cluttered digits in pixels.
        widths: of :class:`~lightning_prune.models.ArticleNet`; None: 32, 32, 64, 64, 128, and twice that for CIFAR-100,
            for which the article's network is wider, too.
        batch_size: of training.
        lr: Adam's, decayed to zero by a cosine.
        l1: penalty on the absolute weights.
        l2: penalty on the squared weights.
        quick: a few seconds, to see that everything works: fewer samples, narrow layers, one epoch per phase.
    """

    methods: Sequence[str] = METHODS
    targets: Sequence[float] = (0.7, 0.5, 0.3, 0.2, 0.1)
    seeds: int = 5
    epochs: tuple[int, int, int] = (6, 3, 6)
    metric: str = "params"
    data_dir: str | os.PathLike[str] | None = None
    samples: int | None = None
    canvas: int = 20
    widths: tuple[int, ...] | None = None
    batch_size: int = 32
    lr: float = 1.5e-3
    l1: float = 5e-5
    l2: float = 2.5e-4
    quick: bool = False

    def __post_init__(self) -> None:
        check_methods(self.methods)
        check_positive("seeds", self.seeds)
        check_positive("batch_size", self.batch_size)
        if self.samples is not None:
            check_positive("samples", self.samples)
        if not self.targets:
            raise ValueError("targets must name at least one share to keep, got none")
        for target in self.targets:
            check_fraction("targets", target)
        if len(set(self.targets)) != len(self.targets):
            raise ValueError(f"targets must be given once each, got {list(self.targets)}")

    def scaled(self) -> ArticleSweep:
        """With ``quick``: the same experiment in miniature."""
        if not self.quick:
            return self
        return replace(
            self,
            quick=False,
            epochs=(1, 1, 1),
            samples=min(self.samples or 512, 512),
            widths=(8, 8, 16, 16, 32),
        )

    def settings(self) -> dict[str, Setting]:
        """The networks of the experiment, by name."""
        make_data: Any
        widths = self.widths or (32, 32, 64, 64, 128)
        if self.data_dir is None:
            samples = 4000 if self.samples is None else self.samples
            sizes: dict[str, Any] = {"data": "cluttered digits", "samples": samples, "canvas": self.canvas}
            make_data = functools.partial(
                cluttered_digits, samples=samples, canvas=self.canvas, batch_size=self.batch_size
            )
        else:
            folder, classes = find_cifar(self.data_dir)
            if classes == 100 and self.widths is None:
                widths = tuple(2 * width for width in widths)
            sizes = {"data": f"CIFAR-{classes}", "samples": self.samples}
            make_data = functools.partial(
                cifar, data_dir=str(folder), samples=self.samples, batch_size=self.batch_size
            )
        return article_settings(
            make_data,
            {**sizes, "batch_size": self.batch_size},
            widths,
            epochs=self.epochs,
            lr=self.lr,
            metric=self.metric,
            l1=self.l1,
            l2=self.l2,
            pruning={"weight_l2": 0.0},  # the loss has it, in every phase
        )

    def trials(self) -> list[Trial]:
        """In the order of work."""
        return grid(self.settings(), self.methods, self.targets, range(self.seeds))

    def check(self) -> None:
        """Fail now on what would fail after hours.

        Raises:
            ValueError: an argument is out of range.
            FileNotFoundError: the data are not there.
            PruneError: a budget cannot be reached.
        """
        settings, first = self.settings(), [t for t in self.trials() if t.seed == 0]
        seen = set()
        for trial in first:
            learned = trial.method not in (*FROM_SCRATCH, "dense")
            if learned and (trial.network, trial.target) not in seen:
                seen.add((trial.network, trial.target))
                check_trial(settings[trial.network], trial)


def run_article(
    sweep: ArticleSweep,
    out: str | os.PathLike[str] = "runs/article",
    *,
    storage: str | None = None,
    study: str = "article",
    jobs: int = 1,
    threads: int = 1,
    report_only: bool = False,
    console: Console | None = None,
) -> bool:
    """Run what is missing of the sweep, then write ``results.json`` and ``accuracy.png`` and print the tables.

    Args:
        sweep: what to compare.
        out: folder of results and shared warmups.
        storage: see :func:`~lightning_prune.experiments.store.open_storage`; None: ``sqlite:///<out>/study.db``. Several
            calls with the same storage, study and ``out`` share the work.
        study: name in the storage.
        jobs: processes.
        threads: CPU threads of each.
        report_only: train nothing.
        console: where progress and tables go.

    Returns:
        Whether every trial has a result.

    Raises:
        ValueError: an argument is out of range, or the study was begun with other settings.
        PruneError: a budget cannot be reached.
    """
    check_positive("jobs", jobs)
    check_positive("threads", threads)
    console = console or Console()
    sweep = sweep.scaled()
    folder = Path(out)
    settings, trials = sweep.settings(), sweep.trials()
    if not report_only:
        sweep.check()
    folder.mkdir(parents=True, exist_ok=True)
    storage = storage or f"sqlite:///{folder.absolute() / 'study.db'}"
    store = TrialStore(storage, study, list(settings.values()))
    if not report_only:
        console.print(f"{len(trials)} fits; finished ones are in {storage} and are not run again")
        job = Job(storage, study, settings, trials, folder / "warmup", threads=threads)
        work(job, jobs=jobs, progress=lambda line: console.print(line, highlight=False, markup=False))
    results, failed = store.results(), store.hopeless()
    rows = summarise(results, trials)
    if not rows:
        console.print("no results yet")
        return False
    write_json(folder / "results.json", document(rows, results, trials, failed, settings))
    plot_accuracy(rows, settings, folder / "accuracy.png", metrics=("params", "macs"))
    for network in networks(rows, settings):
        console.print(accuracy_table(rows, network, settings))
    for trial, message in failed.items():
        console.print(f"failed: {trial}: {message}", markup=False)
    console.print(f"written: {folder / 'results.json'}, {folder / 'accuracy.png'}")
    return all(trial in results for trial in trials)
