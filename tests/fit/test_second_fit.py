"""The same callback, or the same trainer, used again."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_prune import ChannelPruning
from tests.fit.test_callback import flat, pruner
from tests.fit.toys import ToyModule, loader, toy_fit, trainer


@pytest.mark.parametrize("options", [{}, {"dead_channel_skipping": False, "reconfigure_every_n_epochs": 0}])
def test_the_same_trainer_goes_on(options: dict[str, Any]) -> None:
    callback = pruner(learn_epochs=None, warmup_epochs=None, finetune_epochs=None, **options)
    torch.manual_seed(0)
    module, fit = ToyModule(), trainer([callback], 5)
    fit.fit(module, loader(), loader(24))
    plan, smaller, before = callback.plan, callback.compact_model, flat(module)
    macs = callback.report.training_macs
    fit.fit(module, loader(), loader(24))
    assert callback.plan == plan, "all epochs are over: nothing happens"
    fit.fit_loop.max_epochs = 20  # of which warmup and learning would now take twelve
    fit.fit(module, loader(), loader(24))
    assert callback.plan == plan, "what was removed stays so"
    assert [r["epoch"] for r in callback.history] == list(range(fit.current_epoch))
    assert [r["phase"] for r in callback.history][4:] == ["finetune"] * (fit.current_epoch - 4)
    assert callback.report.training_macs > macs
    assert callback.compact_model is not smaller
    assert not torch.equal(flat(module), before)
    x = torch.randn(4, 1, 6, 6)
    torch.testing.assert_close(callback.compact_model(x), module.eval()(x), rtol=1e-4, atol=1e-5)


def test_a_fit_that_ended_while_learning_goes_on() -> None:
    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.should_stop = trainer.current_epoch == 1

    callback, whole = pruner(), pruner()
    torch.manual_seed(0)
    module, fit = ToyModule(), trainer([callback, Stop()], 5)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*ended in the learn phase")
        fit.fit(module, loader(), loader(24))
    gates = callback.history[-1]["gates"]
    fit.fit(module, loader(), loader(24))
    toy_fit([whole])
    assert callback.history[1]["gates"] == gates == whole.history[1]["gates"]
    assert [r["phase"] for r in callback.history] == [r["phase"] for r in whole.history]
    assert callback.compact_model is not None


def test_another_fit_starts_anew() -> None:
    callback, fresh = pruner(reconfigure_every_n_epochs=1), pruner(reconfigure_every_n_epochs=1)
    toy_fit([callback], seed=1)
    toy_fit([callback])
    toy_fit([fresh])
    clocks = {"step_time", "samples_per_second"}
    records = [
        [{k: v for k, v in r.items() if k not in clocks} for r in c.history] for c in (callback, fresh)
    ]
    assert records[0] == records[1]
    assert callback.history[0]["saved_training_macs"] == 0
    assert callback.report.training_macs_dense == fresh.report.training_macs_dense
    assert callback.report.activation_memory_dense == fresh.report.activation_memory_dense
    assert callback.plan == fresh.plan


def test_another_module_on_a_trainer_that_is_past_learning_is_refused() -> None:
    callback = pruner(finetune_epochs=None)
    fit = trainer([callback], 4)
    fit.fit(ToyModule(), loader())
    fit.fit_loop.max_epochs = 6
    with pytest.raises(MisconfigurationException, match="begins at epoch 4, after the epochs in which"):
        fit.fit(ToyModule(), loader())


class Evaluated(ToyModule):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)


def test_evaluating_a_checkpoint_leaves_the_fit_as_it_is(tmp_path: Path) -> None:
    callback = pruner()
    best = ModelCheckpoint(dirpath=tmp_path, monitor="val_loss", mode="max", save_on_train_epoch_end=False)
    torch.manual_seed(0)
    module, fit = Evaluated(), trainer([callback, best], 5, enable_checkpointing=True)
    fit.fit(module, loader(), loader(24))
    history, report = list(callback.history), callback.report
    fit.test(module, loader(24), ckpt_path="best", verbose=False, weights_only=False)
    assert callback.history == history
    assert callback.report == report
    other = ChannelPruning(warmup_epochs=1, learn_epochs=2, finetune_epochs=2)
    fit = trainer([other, best], 5, enable_checkpointing=True)
    fit.test(module, loader(24), ckpt_path=best.best_model_path, verbose=False, weights_only=False)
    fit.fit(Evaluated(), loader(), loader(24))
    assert [r["epoch"] for r in other.history] == [0, 1, 2, 3, 4], (
        "a new fit takes nothing from an evaluation"
    )
