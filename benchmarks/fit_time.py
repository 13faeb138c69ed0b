"""How long does a whole pruning fit take? Masks alone, skipping dead channels, and cutting them out of the network.

The same fit (proximal l1 gates to a quarter of the MACs, on cluttered digits) four ways, from the same seeds: data, initial
weights and dropout are shared. One CPU thread, from the first epoch's start to the last one's end, by the clock on the wall and
in process CPU time, which says more where others use the machine: selection, comparisons by the clock and cuts count,
validation and the final compaction do not.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import lightning as L
import torch
from rich.table import Table
from training_step import environment

from lightning_prune.data import ClutteredDigitsDataModule
from lightning_prune.demo import TASKS
from lightning_prune.experiments import Setting, Trial, estimate, paired_difference
from lightning_prune.experiments.runner import pruning_callback, test_accuracy, train
from lightning_prune.experiments.settings import article_settings, cluttered_digits
from lightning_prune.files import write_atomically
from lightning_prune.quiet import quiet
from lightning_prune.report import to_text, write_json

TARGET = 0.25
#: characters of a line of the table
WIDTH = 180
#: arguments of ``ChannelPruning`` per way; the first is what the others are compared with
WAYS: dict[str, dict[str, Any]] = {
    "masks": {"dead_channel_skipping": False, "reconfigure_every_n_epochs": 0},
    "cut": {"dead_channel_skipping": False, "reconfigure_every_n_epochs": 1},
    "skipping": {"dead_channel_skipping": True, "reconfigure_every_n_epochs": 0},
    "skipping + cut": {"dead_channel_skipping": True, "reconfigure_every_n_epochs": 1},
}


class Stopwatch(L.Callback):
    """Seconds of every epoch with all that happens at its ends. To stand before ``ChannelPruning``."""

    def __init__(self) -> None:
        self._ticks: list[tuple[float, float]] = []

    def _tick(self) -> None:
        self._ticks.append((time.process_time(), time.perf_counter()))

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """An epoch begins."""
        self._tick()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The last one is over."""
        self._tick()

    @property
    def epochs(self) -> list[float]:
        """CPU seconds per epoch."""
        return [b[0] - a[0] for a, b in itertools.pairwise(self._ticks)]

    @property
    def wall(self) -> list[float]:
        """Seconds per epoch by the clock on the wall."""
        return [b[1] - a[1] for a, b in itertools.pairwise(self._ticks)]


@dataclass(frozen=True)
class Result:
    """One fit; seconds are of CPU time, ``wall`` ones by the clock on the wall."""

    network: str
    way: str
    seed: int
    accuracy: float
    macs_share: float
    epoch_seconds: list[float]
    epoch_wall_seconds: list[float]
    activation_memory: int
    activation_memory_dense: int

    @property
    def seconds(self) -> float:
        """Of the whole fit."""
        return sum(self.epoch_seconds)

    @property
    def wall_seconds(self) -> float:
        """Of the whole fit."""
        return sum(self.epoch_wall_seconds)


def demo_data(seed: int) -> ClutteredDigitsDataModule:
    """The demonstration's canvases, shuffled by ``seed``."""
    return ClutteredDigitsDataModule(num_train=5000, num_val=1, seed=seed, shuffle_seed=seed)


def settings(quick: bool, finetune: int | None) -> dict[str, Setting]:
    """The networks: the source article's, and the demonstration's narrower one with its own schedule."""
    if quick:
        data = functools.partial(cluttered_digits, samples=256, canvas=16, batch_size=64)
        return {"article": article_settings(data, {}, (8, 8, 16, 16, 32), epochs=(1, 1, 1))["article"]}
    task = TASKS["cluttered"]
    warmup, learn, last = task.epochs
    data = functools.partial(cluttered_digits, samples=5000, canvas=32, batch_size=64)
    epochs = (warmup, learn, finetune or last)
    widths = (32, 32, 64, 64, 128)
    return {
        "article": article_settings(data, {}, widths, epochs=epochs, lr=task.lr)["article"],
        "cluttered": article_settings(demo_data, {}, task.widths, epochs=epochs, lr=task.lr)["article"],
    }


def run(name: str, setting: Setting, way: str, seed: int, target: float = TARGET) -> Result:
    """One fit."""
    trial = Trial(name, "l1", target, seed)
    data = setting.make_data(seed)
    pruning = pruning_callback(setting, trial, data, **WAYS[way])
    module, watch = setting.build(data, seed), Stopwatch()
    train(module, data, setting.total_epochs, setting.total_epochs, seed, [watch, pruning])
    report, small = pruning.report, pruning.compact_model
    assert report is not None
    assert small is not None
    assert report.activation_memory is not None
    assert report.activation_memory_dense is not None
    share = report.macs_compact / report.macs_dense
    memory = (report.activation_memory, report.activation_memory_dense)
    return Result(name, way, seed, test_accuracy(small, data), share, watch.epochs, watch.wall, *memory)


def summary(results: list[Result], networks: dict[str, Setting]) -> list[dict[str, Any]]:
    """Per network and way: means with t intervals over the seeds; ratios and differences are paired by seed."""
    rows = []
    for name, setting in networks.items():
        first = {r.seed: r for r in results if (r.network, r.way) == (name, next(iter(WAYS)))}
        for way in WAYS:
            found = {r.seed: r for r in results if (r.network, r.way) == (name, way)}
            pairs = [(found[s], first[s]) for s in found if s in first]
            if not pairs:
                continue
            gap = paired_difference(*({s: r.accuracy for s, r in group.items()} for group in (found, first)))
            ends = (0, setting.epochs[0], setting.epochs[0] + setting.epochs[1], setting.total_epochs)
            phases = [
                estimate(sum(r.epoch_seconds[a:b]) for r in found.values()).mean
                for a, b in itertools.pairwise(ends)
            ]
            memory = [r.activation_memory / r.activation_memory_dense for r in found.values()]
            rows.append(
                {
                    "network": name,
                    "way": way,
                    "epochs": list(setting.epochs),
                    "seeds": len(found),
                    "seconds": estimate(r.seconds for r in found.values()).to_json(),
                    "ratio": estimate(a.seconds / b.seconds for a, b in pairs).to_json(),
                    "wall_seconds": estimate(r.wall_seconds for r in found.values()).to_json(),
                    "wall_ratio": estimate(a.wall_seconds / b.wall_seconds for a, b in pairs).to_json(),
                    "phase_seconds": dict(zip(("warmup", "learn", "finetune"), phases, strict=True)),
                    "accuracy": estimate(r.accuracy for r in found.values()).to_json(),
                    "accuracy_gap": gap.to_json() if gap is not None and way != next(iter(WAYS)) else None,
                    "macs_share": estimate(r.macs_share for r in found.values()).mean,
                    "activation_memory": estimate(memory).mean,
                }
            )
    return rows


def _with_interval(value: dict[str, Any] | None, scale: float, digits: int) -> str:
    if value is None:
        return ""
    width = value["half_width"]
    text = f"{scale * value['mean']:.{digits}f}"
    return text if width is None else f"{text} ± {scale * width:.{digits}f}"


def table(rows: list[dict[str, Any]]) -> Table:
    """One row per network and way."""
    result = Table(title="A pruning fit to a quarter of the MACs (mean ± 95 % t interval over seeds)")
    for column in ("network", "epochs", "seeds", "way", "wall s", "of masks, %", "CPU s", "of masks, %", "warmup", "learn",
                   "finetune", "accuracy, %", "against masks", "memory, %"):  # fmt: skip
        result.add_column(column, justify="left" if column in ("network", "epochs", "way") else "right")
    for row in rows:
        result.add_row(
            row["network"],
            "+".join(map(str, row["epochs"])),
            str(row["seeds"]),
            row["way"],
            _with_interval(row["wall_seconds"], 1, 1),
            _with_interval(row["wall_ratio"], 100, 1),
            _with_interval(row["seconds"], 1, 1),
            _with_interval(row["ratio"], 100, 1),
            *(f"{seconds:.1f}" for seconds in row["phase_seconds"].values()),
            _with_interval(row["accuracy"], 100, 1),
            _with_interval(row["accuracy_gap"], 100, 1),
            f"{100 * row['activation_memory']:.0f}",
        )
    return result


def write(rows: list[dict[str, Any]], results: list[Result], facts: dict[str, Any], folder: Path) -> None:
    """Replace the files of the last run."""
    notes = [
        "# The time of a whole pruning fit\n",
        __doc__ or "",
        "- masks: dead channels are held at zero, torch's kernels; what the others are compared with",
        "- cut: `reconfigure_every_n_epochs=1`, torch's kernels",
        "- skipping: `dead_channel_skipping=True`: the package's kernels without dead channels; nothing is cut",
        "- skipping + cut: both",
        "- warmup, learn, finetune: CPU seconds of their epochs",
        "- memory: activations kept for the backward pass, in percent of the dense",
        *(f"- {key}: {value}" for key, value in facts.items() if key != "features"),
    ]
    text = "\n".join([*notes, "", "```", to_text(table(rows), WIDTH), "```", ""])
    write_atomically(folder / "fit_time.md", text.encode())
    fits = [vars(result) for result in results]
    write_json(folder / "fit_time.json", {"environment": facts, "rows": rows, "fits": fits})


def arguments() -> argparse.Namespace:
    """Command line; all ways unless some are chosen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", choices=[[], "article", "cluttered"], default=[])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--finetune", type=int, help="epochs after the selection (default: the demonstration's)"
    )
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--quick", action="store_true", help="one seed of a tiny network; nothing is written")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


def main() -> None:
    """Networks and seeds one by one, the ways of each in turns."""
    options = arguments()
    torch.set_num_threads(1)
    chosen = settings(options.quick, options.finetune)
    networks = {name: s for name, s in chosen.items() if not options.networks or name in options.networks}
    seeds = 1 if options.quick else options.seeds
    facts = environment() | {"target": TARGET}
    results: list[Result] = []
    with quiet():
        for setting in settings(quick=True, finetune=None).values():
            run(
                "warm up", setting, next(iter(WAYS)), 0, 0.5
            )  # the first fit of a process pays for what it imports
        for (name, setting), seed in itertools.product(networks.items(), range(seeds)):
            for way in options.ways:
                results.append(run(name, setting, way, seed, 0.5 if options.quick else TARGET))
                print(json.dumps(vars(results[-1])), file=sys.stderr, flush=True)
            if not options.quick:
                facts["load_average"] = round(os.getloadavg()[0], 1)
                write(summary(results, networks), results, facts, options.out)
    print(to_text(table(summary(results, networks)), WIDTH))


if __name__ == "__main__":
    main()
