"""The demonstration: train, learn masks, finetune, compact and time the article's network on real digits.

For each data set and each seed two networks are trained for the same number of epochs with the same optimizer and
schedule: one plain (the dense baseline) and one with the :class:`~lightning_prune.ChannelPruning` callback. Every
number in the tables is measured in this run on the test scans, which neither network nor selection has seen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from .callback import ChannelPruning
from .compaction import CompactionPlan, load_compact, mask_channels, save_compact
from .data import ClutteredDigitsDataModule, DigitsDataModule
from .inference import optimize_for_inference
from .latency import compare_latency, cpu_threads, evaluating
from .models import ArticleNet, Classifier
from .plots import plot_filters, plot_gates, plot_samples
from .profiling import profile
from .quiet import quiet
from .report import VARIANTS, comparison_table, mean_and_spread, widths_table, write_json


@dataclass(frozen=True)
class Task:
    """One data set of the demonstration and how its network is trained.

    Attributes:
        name: of the data set; also of its folder and its key in ``metrics.json``.
        make_data: a fresh data module (``input_shape``, ``part``, loaders).
        widths: of :class:`~lightning_prune.models.ArticleNet`.
        epochs: warmup, mask learning and finetuning; the dense baseline gets their sum.
        lr: start of the cosine decay of Adam's learning rate.
        dropout: before the first dense layer.
    """

    name: str
    make_data: Callable[[], DigitsDataModule | ClutteredDigitsDataModule]
    widths: tuple[int, int, int, int, int]
    epochs: tuple[int, int, int]
    lr: float = 1.5e-3
    dropout: float = 0.5

    def build(self, steps: int | None = None) -> Classifier:
        """A fresh, untrained classifier in channels_last; ``steps`` is the length of the learning rate's decay."""
        channels, size, _ = self.make_data().input_shape
        net = ArticleNet(channels, size, self.widths, dropout=self.dropout)
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return Classifier(net, lr=self.lr, total_steps=steps)


TASKS: dict[str, Task] = {
    "digits": Task("digits", DigitsDataModule, widths=(32, 32, 64, 64, 128), epochs=(6, 8, 10)),
    "cluttered": Task(
        "cluttered",
        lambda: ClutteredDigitsDataModule(num_train=5000),
        widths=(20, 20, 40, 40, 80),
        epochs=(2, 3, 4),
        lr=2e-3,
    ),
}


@dataclass
class _SeedResult:
    """What one seed gave, per variant (the keys of :data:`lightning_prune.report.VARIANTS`)."""

    seed: int
    accuracy: dict[str, float]
    params: dict[str, int]
    macs: dict[str, int]
    latency_ms: dict[str, dict[str, float]]
    max_relative_error: float
    widths: dict[str, tuple[int, int]]
    seconds: dict[str, float] = field(default_factory=dict)


class _EpochBar(L.Callback):
    """Advances one progress bar per epoch and shows the validation accuracy on it."""

    def __init__(self, progress: Progress, bar: TaskID) -> None:
        self._progress = progress
        self._bar = bar

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        accuracy = trainer.callback_metrics.get("val_acc")
        note = "" if accuracy is None else f"validation {100 * float(accuracy):.1f} %"
        self._progress.update(self._bar, advance=1, note=note)


def _fit(lit: Classifier, data: L.LightningDataModule, epochs: int, callbacks: list[L.Callback]) -> float:
    """Train on the CPU; returns seconds."""
    start = time.perf_counter()
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(lit, datamodule=data)
    return time.perf_counter() - start


def _logits(model: nn.Module, inputs: Tensor) -> Tensor:
    with evaluating(model), torch.inference_mode():
        return torch.cat([model(chunk) for chunk in inputs.split(256)])


def _relative_error(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).abs().max() / reference.abs().max().clamp_min(1e-12))


def _latencies(
    models: dict[str, nn.Module], inputs: Tensor, batches: Sequence[int]
) -> tuple[dict[str, dict[str, float]], dict[str, nn.Module]]:
    """Milliseconds per variant and batch size on one CPU thread, the variants taking turns; and the optimised networks.

    Networks are optimised for each batch size by itself, which is what one would deploy.
    """
    result: dict[str, dict[str, float]] = {name: {} for name in VARIANTS}
    optimized: dict[str, nn.Module] = {}
    for batch in batches:
        example = inputs[:batch]
        with cpu_threads(1):
            optimized = {
                "dense_optimized": optimize_for_inference(models["dense"], example),
                "optimized": optimize_for_inference(models["compact"], example),
            }
            times = compare_latency({**models, **optimized}, example, warmup=10, repeats=40, min_seconds=0.3)
        for name, latency in times.items():
            result[name][str(batch)] = latency.milliseconds
    return result, optimized


def _run_seed(
    task: Task, seed: int, target: float, method: str, folder: Path, progress: Progress
) -> _SeedResult:
    data = task.make_data()
    epochs = sum(task.epochs)
    steps = epochs * len(data.train_dataloader())
    test = data.part("test")
    example = data.part("train").inputs[:2]

    def bar(what: str) -> _EpochBar:
        label = f"{task.name}, seed {seed}: {what}"
        return _EpochBar(progress, progress.add_task(label, total=epochs, note=""))

    L.seed_everything(seed, verbose=False)
    dense = task.build(steps)
    dense_seconds = _fit(dense, data, epochs, [bar("dense")])

    L.seed_everything(seed, verbose=False)
    pruned = task.build(steps)
    warmup, learn, finetune = task.epochs
    pruning = ChannelPruning(
        target=target,
        metric="macs",
        method=method,
        warmup_epochs=warmup,
        learn_epochs=learn,
        finetune_epochs=finetune,
        patience=max(1, finetune),  # no early end: as many epochs as the baseline
        example_inputs=example,
    )
    pruned_seconds = _fit(pruned, data, epochs, [pruning, bar("pruned")])
    compact, plan = pruning.compact_model, pruning.plan
    if compact is None or plan is None or pruning.report is None:
        raise RuntimeError("the fit ended without a compact network, although compaction was asked for")
    masked = mask_channels(pruned, example, plan)

    folder.mkdir(parents=True, exist_ok=True)
    plan.save(folder / "plan.json")
    save_compact(compact, plan, folder / "compact.safetensors")
    plot_gates(pruning.history, folder / "gates.png", title=f"{task.name}, seed {seed}")
    if pruning.first_filters is not None:
        plot_filters(
            pruning.first_filters, folder / "filters.png", title=f"{task.name}, seed {seed}: first layer"
        )

    compact.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    models: dict[str, nn.Module] = {"dense": dense, "masked": masked, "compact": compact}
    latency_ms, optimized = _latencies(models, test.inputs, (1, 64))
    models.update(optimized)
    logits = {name: _logits(model, test.inputs) for name, model in models.items()}
    _check_files(task, folder, test.inputs[:64], logits["compact"][:64])
    profiles = {name: profile(model, example[:1]) for name, model in models.items()}
    params = {name: p.params for name, p in profiles.items()}
    params.update(dense_optimized=params["dense"], optimized=params["compact"])  # theirs are packed or folded
    return _SeedResult(
        seed=seed,
        accuracy={k: float((v.argmax(1) == test.labels).double().mean()) for k, v in logits.items()},
        params=params,
        macs={name: p.macs for name, p in profiles.items()},
        latency_ms=latency_ms,
        max_relative_error=max(
            pruning.report.max_relative_error or 0.0, _relative_error(logits["compact"], logits["masked"])
        ),
        widths=dict(pruning.report.widths),
        seconds={"dense": dense_seconds, "pruned": pruned_seconds},
    )


def _check_files(task: Task, folder: Path, inputs: Tensor, expected: Tensor) -> None:
    """The files alone, with the dense network's code, give the compact network again."""
    loaded = load_compact(task.build(), folder / "compact.safetensors")
    error = _relative_error(_logits(loaded, inputs), expected)
    if error > 1e-5:
        raise RuntimeError(
            f"{folder / 'compact.safetensors'} gives other outputs than the network saved: {error:.2g}"
        )
    CompactionPlan.load(folder / "plan.json")


def _summary(results: Sequence[_SeedResult]) -> dict[str, Any]:
    """Means over the seeds, and every seed's own numbers beside them."""

    def mean(values: Sequence[float]) -> float:
        return mean_and_spread(values)[0]

    summary: dict[str, Any] = {}
    for variant in VARIANTS:
        accuracies = [r.accuracy[variant] for r in results]
        summary[variant] = {
            "accuracy": mean(accuracies),
            "accuracy_spread": mean_and_spread(accuracies)[1],
            "accuracy_per_seed": accuracies,
            "params": round(mean([r.params[variant] for r in results])),
            "params_per_seed": [r.params[variant] for r in results],
            "macs": round(mean([r.macs[variant] for r in results])),
            "macs_per_seed": [r.macs[variant] for r in results],
            "latency_ms": {
                batch: mean([r.latency_ms[variant][batch] for r in results])
                for batch in results[0].latency_ms[variant]
            },
            "latency_ms_per_seed": [r.latency_ms[variant] for r in results],
        }
    summary["max_relative_error"] = max(r.max_relative_error for r in results)
    summary["widths"] = {group: list(width) for group, width in results[0].widths.items()}
    summary["widths_per_seed"] = [{g: list(w) for g, w in r.widths.items()} for r in results]
    summary["accuracy_per_seed"] = {variant: summary[variant]["accuracy_per_seed"] for variant in VARIANTS}
    summary["seeds"] = [r.seed for r in results]
    summary["train_seconds_per_seed"] = [r.seconds for r in results]
    return summary


def _training_time(seconds: Sequence[dict[str, float]]) -> str:
    dense, pruned = (mean_and_spread([s[name] for s in seconds]) for name in ("dense", "pruned"))
    ratio = mean_and_spread([s["pruned"] / s["dense"] for s in seconds])
    return (
        f"the pruning fit took {pruned[0]:.1f} ± {pruned[1]:.1f} s, the dense one {dense[0]:.1f} ± {dense[1]:.1f} s "
        f"(ratio {ratio[0]:.2f} ± {ratio[1]:.2f})"
    )


def run_demo(
    out: str | Path = "runs/demo",
    *,
    datasets: Sequence[str] = tuple(TASKS),
    seeds: int = 3,
    target: float = 0.5,
    method: str = "l1",
    tasks: dict[str, Task] | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run the demonstration and write what it measured.

    Writes ``metrics.json``, and per data set ``samples.png`` and per seed ``compact.safetensors``, ``plan.json`` and
    ``gates.png`` (mask values over the epochs) and ``filters.png`` (the first layer's filters before and after).

    Args:
        out: folder for the results.
        datasets: names in ``tasks``, each at most once.
        seeds: number of seeds (0, 1, ...); data and test scans stay the same, everything else is drawn anew.
        target: share of the dense network's multiply-accumulates to keep, in (0, 1].
        method: of :class:`~lightning_prune.ChannelPruning`.
        tasks: the data sets and their training; None takes :data:`TASKS`.
        console: where the tables and bars go; None takes the terminal.

    Returns:
        What ``metrics.json`` holds. Per data set and variant: "accuracy" (mean over the seeds, share of the test part),
        "params", "macs" (of one sample), "latency_ms" (one CPU thread, mean over the
        seeds of the medians, per batch size), the same
        per seed; "max_relative_error" of compact against masked, "widths" of the first seed (live, size) and of each.

    Raises:
        ValueError: an unknown data set or no seed.
    """
    tasks = TASKS if tasks is None else tasks
    unknown = [name for name in datasets if name not in tasks]
    if unknown or not datasets:
        raise ValueError(f"datasets must be some of {sorted(tasks)}, got {list(datasets)}")
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    console = console or Console()
    folder = Path(out)
    start = time.perf_counter()
    metrics: dict[str, Any] = {}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with quiet(), Progress(*columns, console=console) as progress:
        for name in dict.fromkeys(datasets):
            task = tasks[name]
            where = folder / name
            plot_samples(task.make_data().part("train"), where / "samples.png", title=name)
            results = [
                _run_seed(task, seed, target, method, where / f"seed-{seed}", progress)
                for seed in range(seeds)
            ]
            metrics[name] = _summary(results)
    for name, summary in metrics.items():
        console.print(comparison_table(f"{name}: mean over {seeds} seeds", summary))
        console.print(widths_table(f"{name}: live channels (seed 0)", summary["widths"]))
        console.print(
            f"{name}: compact against masked, largest relative difference {summary['max_relative_error']:.1e}"
        )
        console.print(f"{name}: {_training_time(summary['train_seconds_per_seed'])}")
    path = write_json(folder / "metrics.json", metrics)
    console.print(
        f"{time.perf_counter() - start:.0f} s; numbers, plans, checkpoints and pictures: {path.parent}"
    )
    return metrics
