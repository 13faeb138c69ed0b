"""Options of a fit: rewinding, reconstruction, ratios, and the warning for symmetric channels."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_prune import ChannelPruning, mask_channels
from tests.fit.test_callback import pruner
from tests.fit.toys import ToyModule, loader, toy_fit, trainer


def test_rewinding_returns_to_the_weights_of_a_step_with_the_masks_kept() -> None:
    callback = pruner(warmup_epochs=1, learn_epochs=2, finetune_epochs=1, rewind_to=4)
    early: dict[str, torch.Tensor] = {}
    at_selection: list[dict[str, torch.Tensor]] = []

    class Watch(pl.Callback):
        def on_train_batch_start(
            self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any
        ) -> None:
            state = {k: v.clone() for k, v in pl_module.state_dict().items()}
            if trainer.global_step == 4:
                early.update(state)
            if callback.plan is not None and not at_selection:
                at_selection.append(state)
                assert not trainer.optimizers[0].state

    toy_fit([callback, Watch()], max_epochs=4)
    ticket = ToyModule()
    ticket.load_state_dict(early)
    masked = mask_channels(ticket, None, callback.plan)
    for name, value in masked.state_dict().items():
        assert torch.equal(at_selection[0][name], value), name
    with pytest.raises(MisconfigurationException, match="rewind_to=99 is not reached"):
        toy_fit([pruner(rewind_to=99)])


def test_reconstruction_in_a_fit_starts_finetuning_from_a_better_place() -> None:
    losses = {}
    for reconstruct in (False, True):
        callback = ChannelPruning(target=0.3, method="random", warmup_epochs=4, reconstruct=reconstruct)
        first: list[float] = []

        class Watch(pl.Callback):
            def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, *rest: Any) -> None:
                if callback.plan is not None:  # noqa: B023  (used within this iteration)
                    first.append(float(outputs["loss"]))  # noqa: B023

        toy_fit([callback, Watch()], max_epochs=5)
        losses[reconstruct] = first[0]
        assert callback.compact_model is not None
    assert losses[True] < 0.9 * losses[False]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_symmetric_initialisation_is_warned_about() -> None:
    torch.manual_seed(0)
    module = ToyModule()
    torch.nn.init.zeros_(module.net.conv1.weight)
    torch.nn.init.zeros_(module.net.conv1.bias)
    torch.nn.init.zeros_(module.net.conv2.weight)
    fit = trainer([pruner()], 5)
    with pytest.warns(UserWarning, match="net.conv1 .12 channels."):
        fit.fit(module, loader())


def test_ratios_in_a_fit() -> None:
    callback = pruner(ratios={"net.fc1": 0.3}, target=0.6)
    toy_fit([callback])
    assert callback.report.widths["net.fc1"] == (6, 20)
    # without the last layer's small channels to fill up with, one channel is 7 % of this network
    assert 0.53 <= callback.report.macs_compact / callback.report.macs_dense <= 0.6
