"""The callback in whole fits: what the user's module sees, what comes out, what resumes."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, IterableDataset

from lightning_prune import ChannelPruning, CompactionPlan, mask_channels, prune_channels
from lightning_prune.gates.attach import GateHooks
from tests.fit.toys import ToyModule, loader, toy_data, toy_fit, trainer


def pruner(**options: Any) -> ChannelPruning:
    return ChannelPruning(
        **({"target": 0.5, "warmup_epochs": 1, "learn_epochs": 2, "finetune_epochs": 2} | options)
    )


def flat(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


class Spy(pl.Callback):
    """Records what the user's optimizer and state_dict look like at every batch, and the weights after each."""

    def __init__(self) -> None:
        self.groups: list[Any] = []
        self.keys: list[list[str]] = []
        self.weights: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any) -> None:
        names = {p: n for n, p in pl_module.named_parameters()}
        optimizer = trainer.optimizers[0]
        self.groups.append(
            [([names[p] for p in g["params"]], g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
        )
        self.keys.append(list(pl_module.state_dict()))
        self.weights.append(flat(pl_module))


def test_the_users_module_and_optimizer_never_notice() -> None:
    with_callback, without = Spy(), Spy()
    toy_fit([pruner(), with_callback])
    toy_fit([without])
    assert with_callback.groups == without.groups
    assert with_callback.keys == without.keys
    warmup = 96 // 16
    for a, b in zip(with_callback.weights[:warmup], without.weights[:warmup], strict=True):
        assert torch.equal(a, b), "warmup must be the user's own training, bit for bit"


def test_budget_is_met_from_below_and_the_compact_model_is_the_plain_module() -> None:
    callback = pruner()
    module = toy_fit([callback])
    assert callback.report is not None
    assert callback.compact_model is not None
    share = callback.report.macs_compact / callback.report.macs_dense
    assert 0.46 <= share <= 0.5, "within one channel, which is 3 % and more of this network"
    x = toy_data(8).tensors[0]
    module.eval()
    with torch.no_grad():
        torch.testing.assert_close(callback.compact_model(x), module(x), rtol=1e-5, atol=1e-6)
        masked = mask_channels(module, x, callback.plan).eval()
        assert torch.equal(masked(x), module(x)), "dead channels of the plain module are exactly zero"
    assert callback.compact_model.net.conv1.weight.shape[0] == callback.report.widths["net.conv1"][0]
    assert isinstance(callback.compact_model, ToyModule)


def test_params_budget() -> None:
    callback = pruner(metric="params", target=0.3)
    toy_fit([callback])
    assert callback.report is not None
    counted = sum(p.numel() for p in callback.compact_model.parameters())
    assert counted == callback.report.params_compact
    assert 0.29 <= counted / callback.report.params_dense <= 0.3


def test_gates_die_during_learning_and_dead_channels_stay_dead() -> None:
    callback = pruner(warmup_epochs=0, learn_epochs=6, finetune_epochs=2, gate_lr=0.05)

    class Dead(pl.Callback):
        seen = 0

        def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            mask = callback._fit.mask()
            for group in callback._fit.graph.groups:
                gone = [i for i in range(group.size) if not mask[group.start + i]]
                for member in group.members:
                    if gone and not member.tensor.endswith("running_var"):
                        tensor = callback._fit.keeper._tensors[member.tensor]
                        index = torch.from_numpy(member.index[gone].ravel())
                        assert not tensor.index_select(member.dim, index).any(), member.tensor
                        type(self).seen += 1

    toy_fit([callback, Dead()], max_epochs=8)
    live = [record["live_channels"] for record in callback.history]
    assert live[5] < live[0] == 48, "channels must be snapped while learning, not only by the final selection"
    assert Dead.seen > 0


def test_history_and_logged_metrics() -> None:
    callback = pruner()
    torch.manual_seed(0)
    fit = trainer([callback], 5)
    fit.fit(ToyModule(), loader(), loader(24))
    assert [r["phase"] for r in callback.history] == ["warmup", "learn", "learn", "finetune", "finetune"]
    assert set(callback.history[1]["gates"]) == {"net.conv1", "net.conv2", "net.fc1"}
    for key in ("phase", "macs", "params", "live_channels", "lambda"):
        assert f"prune/{key}" in fit.callback_metrics
    assert fit.callback_metrics["prune/phase"] == 2
    assert fit.callback_metrics["prune/macs"] == callback.report.macs_compact


@pytest.mark.parametrize("at_epoch_end", [True, False], ids=["epoch-end", "validation-end"])
@pytest.mark.parametrize("stop_after", [1, 2, 4], ids=["warmup", "learn", "finetune"])
def test_a_resumed_fit_ends_where_an_uninterrupted_one_does(
    tmp_path: Path, stop_after: int, at_epoch_end: bool
) -> None:
    options = {"warmup_epochs": 1, "learn_epochs": 2, "finetune_epochs": 3, "sphere": True, "gate_lr": 0.05,
               "reconfigure_every_n_epochs": 0}  # fmt: skip
    whole = pruner(**options)
    reference = toy_fit([whole], max_epochs=6)

    class Stop(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch == stop_after:
                raise KeyboardInterrupt

    checkpoint = ModelCheckpoint(dirpath=tmp_path, save_last=True, save_on_train_epoch_end=at_epoch_end)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        toy_fit([pruner(**options), Stop(), checkpoint], max_epochs=6, enable_checkpointing=True)
    assert (tmp_path / "last.ckpt").exists()

    resumed = pruner(**options)
    module = ToyModule()
    again = ModelCheckpoint(dirpath=tmp_path, save_last=True, save_on_train_epoch_end=at_epoch_end)
    fit = trainer([resumed, again], 6, enable_checkpointing=True)
    fit.fit(module, loader(), loader(24), ckpt_path=tmp_path / "last.ckpt")
    torch.testing.assert_close(flat(module), flat(reference), rtol=1e-6, atol=1e-7)
    assert resumed.plan == whole.plan
    assert [r["live_channels"] for r in resumed.history] == [r["live_channels"] for r in whole.history]


def test_a_given_plan_holds_from_the_first_step(tmp_path: Path) -> None:
    x = toy_data(2).tensors[0]
    plan = prune_channels(ToyModule(), x, target=0.4, method="random").plan
    plan.save(tmp_path / "plan.json")
    callback = ChannelPruning(plan=tmp_path / "plan.json")

    class Check(pl.Callback):
        def on_train_batch_start(
            self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any
        ) -> None:
            masked = mask_channels(pl_module, None, plan)
            assert torch.equal(flat(masked), flat(pl_module))

    toy_fit([callback, Check()], max_epochs=2)
    assert callback.plan == plan
    assert callback.compact_model is not None


@pytest.mark.parametrize("method", ["magnitude", "random", "first_k"])
def test_criteria_select_once_after_warmup(method: str) -> None:
    callback = ChannelPruning(target=0.4, method=method, warmup_epochs=1)
    toy_fit([callback], max_epochs=2)
    assert [r["phase"] for r in callback.history] == ["warmup", "finetune"]
    assert 0.385 <= callback.report.macs_compact / callback.report.macs_dense <= 0.4


def test_push_pull_moves_either_weights_or_gates() -> None:
    callback = pruner(
        warmup_epochs=0, learn_epochs=3, finetune_epochs=1, alternate_every_n_steps=2, target=1.0
    )
    moves: list[tuple[bool, bool]] = []

    class Watch(pl.Callback):
        def state(self, module: pl.LightningModule) -> tuple[torch.Tensor, torch.Tensor]:
            return flat(module), callback._fit.learner.gates.values.detach().clone()

        def on_train_batch_start(
            self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any
        ) -> None:
            self.before = self.state(pl_module) if callback._fit.learner else None

        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any) -> None:
            if self.before:
                after = self.state(pl_module)
                moves.append(tuple(not torch.equal(a, b) for a, b in zip(self.before, after, strict=True)))

    toy_fit([callback, Watch()], max_epochs=4)
    assert moves == [(True, False)] * 2 + [(False, True)] * 2 + moves[4:]
    assert all(weights != gates for weights, gates in moves)


def test_sphere_keeps_every_filter_on_its_radius() -> None:
    callback = pruner(warmup_epochs=1, learn_epochs=3, finetune_epochs=0, sphere=True, target=1.0)
    norms: list[torch.Tensor] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any) -> None:
            if callback._fit.learner is not None:
                norms.append(pl_module.net.conv1.weight.detach().flatten(1).norm(dim=1))

    toy_fit([callback, Watch()], max_epochs=4)
    assert len(norms) == 18
    for later in norms[1:]:
        torch.testing.assert_close(later, norms[0], rtol=1e-5, atol=0)


def test_gradient_accumulation_steps_the_gates_with_the_optimizer() -> None:
    callback = pruner(warmup_epochs=0, learn_epochs=2, finetune_epochs=0)
    steps = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, *unused: Any) -> None:
            steps.append(callback._fit.learner.done)

    toy_fit([callback, Watch()], max_epochs=2, accumulate_grad_batches=3)
    assert steps == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4]


def test_bf16_mixed_precision() -> None:
    callback = pruner()
    toy_fit([callback], precision="bf16-mixed")
    assert callback.compact_model is not None


def test_finetuning_stops_on_a_plateau() -> None:
    class Flat(ToyModule):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", torch.tensor(1.0))

    callback = ChannelPruning(method="magnitude", warmup_epochs=1, monitor="val_loss", patience=2)
    fit = trainer([callback], 50)
    fit.fit(Flat(), loader(), loader(24))
    assert fit.current_epoch == 4, "warmup, the best epoch, and two without improvement"


def test_finetune_epochs_end_the_fit() -> None:
    callback = pruner(finetune_epochs=1)
    fit = trainer([callback], 50)
    fit.fit(ToyModule(), loader(), loader(24))
    assert fit.current_epoch == 4
    assert callback.compact_model is not None


def test_learning_may_be_the_last_phase() -> None:
    callback = pruner(finetune_epochs=0)
    toy_fit([callback], max_epochs=3)
    assert callback.compact_model is not None
    assert callback.report.macs_compact <= 0.5 * callback.report.macs_dense


def test_a_fit_that_ends_early_says_so() -> None:
    callback = pruner(warmup_epochs=2, learn_epochs=2, finetune_epochs=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        toy_fit([callback], max_epochs=5, max_steps=7)
    assert any("ended in the warmup phase" in str(w.message) for w in caught)
    assert callback.compact_model is None


def test_fast_dev_run_goes_through_everything() -> None:
    callback = ChannelPruning(target=0.5)
    toy_fit([callback], max_epochs=1, fast_dev_run=True)
    assert callback.compact_model is not None


def test_streaming_data_loses_no_batch() -> None:
    class Stream(IterableDataset):
        given = 0

        def __iter__(self) -> Any:
            for sample in toy_data(32):
                type(self).given += 1
                yield sample

    callback = pruner(warmup_epochs=0, learn_epochs=1, finetune_epochs=1)
    seen = []

    class Count(ToyModule):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            seen.append(len(batch[0]))
            return super().training_step(batch, batch_idx)

    trainer([callback], 2).fit(Count(), DataLoader(Stream(), batch_size=8))
    assert sum(seen) == Stream.given == 64
    assert callback.compact_model is not None


def test_no_hook_is_left_after_a_fit_or_an_exception() -> None:
    class Boom(ToyModule):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if self.trainer.current_epoch == 1 and batch_idx == 2:
                self(torch.zeros(1, 7, 6, 6))
            return super().training_step(batch, batch_idx)

    module = Boom()
    with pytest.raises(RuntimeError, match="channels"):
        trainer([pruner()], 5).fit(module, loader())
    for checked in (module, toy_fit([pruner()])):
        for name, child in checked.named_modules():
            assert not child._forward_hooks, name
            assert not child._forward_pre_hooks, name
            assert "weight" not in child.__dict__, name
        copy.deepcopy(checked.net)


def test_validation_uses_the_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    shadowed = []
    original = GateHooks._shadow

    def spy(self: GateHooks, module: torch.nn.Module, args: Any) -> Any:
        shadowed.append(module.training)
        return original(self, module, args)

    monkeypatch.setattr(GateHooks, "_shadow", spy)
    toy_fit([pruner()])
    assert True in shadowed
    assert False in shadowed


def test_the_plan_of_a_finished_fit_replays_elsewhere(tmp_path: Path) -> None:
    callback = pruner()
    toy_fit([callback])
    callback.plan.save(tmp_path / "p.json")
    assert CompactionPlan.load(tmp_path / "p.json") == callback.plan


@pytest.mark.slow
def test_compiled_module() -> None:
    class Silent(ToyModule):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])  # self.log does not compile

    callback = pruner()
    torch.manual_seed(0)
    module = torch.compile(Silent(), backend="eager")
    trainer([callback], 5).fit(module, loader())
    assert callback.compact_model is not None
    assert callback.report.macs_compact <= 0.5 * callback.report.macs_dense
