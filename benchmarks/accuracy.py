"""Accuracy of every pruning method at the same budgets, epochs and seeds, with intervals.

    python benchmarks/accuracy.py --jobs 2      # the whole grid; a second call goes on where the first one was
    python benchmarks/accuracy.py --report      # draw what is there
    python benchmarks/accuracy.py --quick       # in miniature, to see that everything works

Two networks on cluttered digits, the source article's and a CIFAR-style ResNet-20; 50, 25 and 10 % of the MACs; every
method of this package, from-scratch baselines and Torch-Pruning's GroupNormPruner. Equal seeds share data, initial weights and
the whole warmup, so differences are paired by seed. Results: ``results/accuracy.md``, ``.png`` and ``.json``; the trials
themselves are kept in ``runs/accuracy/study.db`` the moment they exist.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from accuracy_claims import claims, markdown  # noqa: E402
from accuracy_peer import METHOD, run_with_peer  # noqa: E402
from rich.console import Console  # noqa: E402

from lightning_prune.experiments import Setting, Trial, TrialStore, check_methods, grid, work  # noqa: E402
from lightning_prune.experiments.present import document, plot_accuracy  # noqa: E402
from lightning_prune.experiments.settings import (  # noqa: E402
    article_settings,
    cluttered_digits,
    resnet20_setting,
)
from lightning_prune.experiments.summary import summarise  # noqa: E402
from lightning_prune.experiments.work import Job  # noqa: E402
from lightning_prune.files import write_atomically  # noqa: E402
from lightning_prune.report import write_json  # noqa: E402

METHODS = (
    "l1", "l0", "vib", "slimming", "taylor", "obd", "apoz", "fpgm", "magnitude", "magnitude_one_shot", "random", "first_k",
    METHOD, "from_scratch", "from_scratch_compute",
)  # fmt: skip
TARGETS = (0.5, 0.25, 0.1)
#: warmup, learning, finetuning; without batch norms a network takes longer until it is good
EPOCHS = {"article": (12, 4, 24), "resnet20": (6, 3, 6)}
SCALES = (0.1, 10.0)
SCALE_SEEDS = 2


def settings(quick: bool, epochs: tuple[int, int, int] | None = None) -> dict[str, Setting]:
    """Small enough for hundreds of fits, large enough that the dense networks are good; ``epochs`` for all networks."""
    each = {name: epochs or ((1, 1, 1) if quick else EPOCHS[name]) for name in EPOCHS}

    def data(samples: int, canvas: int) -> dict:
        sizes = {"samples": 256 if quick else samples, "canvas": canvas, "batch_size": 64}
        return {
            "make_data": functools.partial(cluttered_digits, **sizes),
            "describe": {"data": "cluttered digits", **sizes},
        }

    return {
        **article_settings(
            **data(4000, 20),
            widths=(20, 20, 40, 40, 80),
            epochs=each["article"],
            lr=2e-3,
            # the same numbers up to rounding; finetuning then costs what the small network costs
            pruning={"reconfigure_every_n_epochs": 1},
        ),
        **resnet20_setting(**data(2400, 16), width=8 if quick else 16, epochs=each["resnet20"], lr=2e-3),
    }


def scale_trials(options: argparse.Namespace) -> list[Trial]:
    """l0 with the loss multiplied, on the first seeds; factor 1 is in the grid already."""
    if "l0" not in options.methods or options.no_scales:
        return []
    return [
        Trial(network, "l0", target, seed, scale)
        for seed in range(min(options.seeds, SCALE_SEEDS))
        for network in options.networks
        for scale in SCALES
        for target in options.targets
    ]


def main() -> int:
    options = parse()
    known = settings(options.quick, options.epochs)
    shown = {n: s for n, s in known.items() if n in options.networks or s.shown_as in options.networks}
    trials = list(
        dict.fromkeys(
            [*grid(shown, options.methods, options.targets, range(options.seeds)), *scale_trials(options)]
        )
    )
    folder = options.runs / ("quick" if options.quick else "accuracy")
    folder.mkdir(parents=True, exist_ok=True)
    storage = options.storage or f"sqlite:///{folder.absolute() / 'study.db'}"
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if not options.report:
        job = Job(storage, "accuracy", shown, trials, folder / "warmup", run_with_peer)
        work(job, jobs=options.jobs, progress=console.print)
    store = TrialStore(storage, "accuracy", list(shown.values()))
    results, failed = store.results(), store.hopeless()
    rows = summarise(results, trials)
    if not rows:
        console.print("no results yet")
        return 1
    checked = claims(rows, shown)
    data = document(rows, results, trials, failed, shown, "torch-pruning", "scipy")
    text = markdown(rows, checked, shown, data)
    out = options.out or (folder if options.quick else HERE / "results")
    write_json(out / "accuracy.json", {**data, "claims": checked})
    write_atomically(out / "accuracy.md", text.encode())
    plot_accuracy(rows, shown, out / "accuracy.png")
    console.print(text)
    return 0 if not data["failed"] and not data["missing"] else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="in miniature: one epoch per phase, two seeds")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="METHOD")
    parser.add_argument(
        "--networks", nargs="+", choices=("article", "resnet20"), default=["article", "resnet20"]
    )
    parser.add_argument("--targets", nargs="+", type=float, default=list(TARGETS), metavar="SHARE")
    parser.add_argument("--seeds", type=int, help="default: 5, with --quick 2")
    parser.add_argument(
        "--epochs",
        nargs=3,
        type=int,
        metavar=("WARMUP", "LEARN", "FINETUNE"),
        help="of every network; default: 12 4 24 for the article's, 6 3 6 for ResNet-20",
    )
    parser.add_argument("--no-scales", action="store_true", help="without l0 at other loss scales")
    parser.add_argument("--jobs", type=int, default=1, help="worker processes, one thread each")
    parser.add_argument("--report", action="store_true", help="train nothing, draw what is in the storage")
    parser.add_argument("--storage", help="Optuna storage; default: sqlite in the runs folder")
    parser.add_argument(
        "--runs", type=Path, default=HERE.parent / "runs", help="folder of storage and warmups"
    )
    parser.add_argument(
        "--out", type=Path, help="folder of table, picture and JSON; default: benchmarks/results"
    )
    options = parser.parse_args()
    options.epochs = tuple(options.epochs) if options.epochs else None
    options.seeds = options.seeds or (2 if options.quick else 5)
    try:
        check_methods(options.methods, extra=[METHOD])
        if options.seeds < 1 or options.jobs < 1 or not all(0 < t < 1 for t in options.targets):
            raise ValueError("--seeds and --jobs must be at least 1, --targets between 0 and 1")
        settings(options.quick, options.epochs)
    except ValueError as error:
        parser.error(str(error))
    return options


if __name__ == "__main__":
    sys.exit(main())
