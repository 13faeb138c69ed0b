"""Runs one trial: the shared warmup, the fit, the test."""

from __future__ import annotations

import functools
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn

from ..callback import ChannelPruning
from ..compaction import CompactionPlan
from ..config import PruneConfig
from ..fit import PruningFit
from ..init import from_scratch
from ..latency import evaluating
from ..profiling import profile
from ..quiet import quiet
from .trials import FROM_SCRATCH, Data, ExperimentModule, Setting, Trial, TrialResult


class FitClock(L.Callback):
    """Seeds the global generator before each batch, and adds up the CPU time of the epochs.

    With a seed per step a fit that goes on from a checkpoint draws the same dropout masks as one that was never
    interrupted: when a data loader takes its own share of the generator differs between the two. The time travels in the
    checkpoint.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.seconds = 0.0
        self._start = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._start = time.process_time()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed."""
        torch.manual_seed((self.seed + 1) * 1_000_003 + trainer.global_step)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock."""
        self.seconds += time.process_time() - self._start

    def state_dict(self) -> dict[str, Any]:
        """The time so far."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self.seconds = float(state_dict["seconds"])


@dataclass(frozen=True)
class Fit:
    """What the runner of one method works with.

    Attributes:
        setting: network, data and training.
        trial: which fit.
        data: of the trial's seed.
        warmup: checkpoint at the end of the shared warmup; None if the setting has none.
    """

    setting: Setting
    trial: Trial
    data: Data
    warmup: Path | None

    def module(self) -> ExperimentModule:
        """The untrained module of the seed."""
        return self.setting.build(self.data, self.trial.seed, self.trial.loss_scale)

    def train(
        self,
        module: ExperimentModule,
        callbacks: list[L.Callback],
        epochs: int | None = None,
        *,
        resume: bool = True,
    ) -> float:
        """Train ``module`` up to ``epochs`` (default: the setting's), on from the warmup with ``resume``; CPU seconds."""
        epochs = self.setting.total_epochs if epochs is None else epochs
        return train(
            module, self.data, epochs, epochs, self.trial.seed, callbacks, self.warmup if resume else None
        )[0]

    def result(
        self, model: nn.Module, dense: nn.Module, epochs: int, seconds: float, **more: Any
    ) -> TrialResult:
        """Test ``model``, count it and ``dense``, and put everything together.

        ``train_macs`` is by default what the schedule of pruning fits costs: dense until the end of learning.
        """
        example = self.data.part("test").inputs[:1]
        small, full = profile(model, example), profile(dense, example)
        before = self.setting.epochs[0] + self.setting.epochs[1]
        return TrialResult(
            trial=self.trial,
            accuracy=test_accuracy(model, self.data),
            macs=float(small.macs),
            dense_macs=float(full.macs),
            params=float(small.params),
            dense_params=float(full.params),
            epochs=epochs,
            seconds=seconds,
            **{"train_macs": float(full.macs * before + small.macs * max(epochs - before, 0)), **more},
        )


def train(
    module: ExperimentModule,
    data: Data,
    epochs: int,
    schedule_epochs: int,
    seed: int,
    callbacks: list[L.Callback],
    checkpoint: Path | None = None,
) -> tuple[float, L.Trainer]:
    """Train on the CPU without validation, up to ``epochs`` of a cosine decay over ``schedule_epochs``.

    Returns:
        CPU seconds of all epochs, those before ``checkpoint`` included, and the trainer.
    """
    loader = data.train_dataloader()
    module.total_steps = max(1, schedule_epochs * len(loader))
    clock = FitClock(seed)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[clock, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    trainer.fit(module, loader, ckpt_path=None if checkpoint is None else str(checkpoint))
    return clock.seconds, trainer


def test_accuracy(model: nn.Module, data: Data) -> float:
    """Share of the test part that ``model`` classifies correctly."""
    test = data.part("test")
    with evaluating(model), torch.inference_mode():
        hits = [
            (model(inputs).argmax(1) == labels).sum()
            for inputs, labels in zip(test.inputs.split(512), test.labels.split(512), strict=True)
        ]
    return float(torch.stack(hits).sum()) / len(test.labels)


def shared_warmup(setting: Setting, trial: Trial, data: Data, folder: Path) -> Path | None:
    """Checkpoint at the end of the warmup, which every method of a seed shares; trained if it is not there yet."""
    warmup = setting.epochs[0]
    if warmup == 0:
        return None
    scale = "" if trial.loss_scale == 1 else f"-x{trial.loss_scale:g}"
    path = folder / f"{setting.name}-{setting.fingerprint()}-seed{trial.seed}{scale}.ckpt"
    if path.exists():
        return path
    module = setting.build(data, trial.seed, trial.loss_scale)
    _, trainer = train(module, data, warmup, setting.total_epochs, trial.seed, [])
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".warmup-") as temporary:
        unfinished = Path(temporary) / path.name
        trainer.save_checkpoint(unfinished)
        os.replace(unfinished, path)
    return path


@functools.lru_cache(maxsize=2)
def seed_data(make_data: Callable[[int], Data], seed: int) -> Data:
    """The data of a seed, kept for the next trials, which mostly have the same one."""
    return make_data(seed)


def run_trial(setting: Setting, trial: Trial, folder: Path, needed: TrialResult | None = None) -> TrialResult:
    """Run one trial of a method that this package knows.

    Args:
        setting: network, data and training.
        trial: which fit.
        folder: where the shared warmups are kept.
        needed: result of ``trial.needs()``; the from-scratch baselines take its widths.

    Returns:
        The result; its plan is in where :meth:`Trial.needs` of another trial may name it.
    """
    with quiet():
        data = seed_data(setting.make_data, trial.seed)
        if trial.method in FROM_SCRATCH:
            return _from_scratch(Fit(setting, trial, data, None), needed)
        fit = Fit(setting, trial, data, shared_warmup(setting, trial, data, folder))
        if trial.method == "dense":
            module = fit.module()
            seconds = fit.train(module, [])
            dense_macs = float(profile(module, data.part("test").inputs[:1]).macs)
            epochs = setting.total_epochs
            return fit.result(module, module, epochs, seconds, train_macs=dense_macs * epochs)
        return _prune(fit)


def pruning_callback(setting: Setting, trial: Trial, data: Data, **more: Any) -> ChannelPruning:
    """The callback of a trial: every method learns or prunes gradually in the learn epochs, but for one-shot magnitude.

    ``more`` are further arguments of it, which stand before those of the setting.
    """
    warmup, learn, finetune = setting.epochs
    one_shot = trial.method == "magnitude_one_shot"
    method = "magnitude" if one_shot else trial.method
    if one_shot:
        learn, finetune = 0, learn + finetune
    return ChannelPruning(
        target=trial.target,
        metric=setting.metric,
        method=method,
        warmup_epochs=warmup,
        learn_epochs=learn,
        finetune_epochs=finetune,
        example_inputs=data.part("train").inputs[:2],
        seed=trial.seed,
        # which convolutions skip is decided by the clock; without, a fit can be repeated bit by bit
        **{"dead_channel_skipping": False, "reconfigure_every_n_epochs": 0, **setting.pruning, **more},
    )


def check_trial(setting: Setting, trial: Trial) -> None:
    """Fail before anything is trained: bad arguments, data that cannot be read, a budget that cannot be met.

    Raises:
        ValueError: an argument is out of range or misspelt.
        PruneError: the network cannot be traced or the budget cannot be reached.
    """
    data = setting.make_data(trial.seed)
    callback = pruning_callback(setting, trial, data)
    config: PruneConfig = callback.config
    PruningFit(config, setting.build(data, trial.seed), data.part("train").inputs[:2])


def _prune(fit: Fit) -> TrialResult:
    setting, trial = fit.setting, fit.trial
    pruning = pruning_callback(setting, trial, fit.data)
    module = fit.module()
    seconds = fit.train(module, [pruning])
    small, plan, report = pruning.compact_model, pruning.plan, pruning.report
    if small is None or plan is None or report is None:
        raise RuntimeError(f"{trial}: the fit ended without a compact network")
    learned = [record for record in pruning.history if record["phase"] == "learn"]
    reached = float(learned[-1]["macs"]) / report.macs_dense if learned and pruning.config.penalised else None
    epochs = setting.total_epochs
    result = fit.result(
        small, module, epochs, seconds, widths=dict(report.widths), reached=reached, plan=plan.to_json()
    )
    if trial.method != "magnitude_one_shot":
        return result
    dense_epochs = setting.epochs[0]
    macs = result.dense_macs * dense_epochs + result.macs * (epochs - dense_epochs)
    return TrialResult(**{**vars(result), "train_macs": macs})


def _from_scratch(fit: Fit, needed: TrialResult | None) -> TrialResult:
    if needed is None or needed.plan is None:
        raise ValueError(f"{fit.trial} needs the plan of {fit.trial.needs()}")
    dense = fit.module()
    small = from_scratch(dense, CompactionPlan.from_json(needed.plan, str(needed.trial)), seed=fit.trial.seed)
    assert isinstance(small, ExperimentModule)
    small.to(memory_format=torch.channels_last)
    epochs = fit.setting.total_epochs
    if fit.trial.method == "from_scratch_compute":
        epochs = max(epochs, round(needed.train_macs / needed.macs))
    seconds = fit.train(small, [], epochs, resume=False)
    return fit.result(small, dense, epochs, seconds, widths=needed.widths, train_macs=needed.macs * epochs)
