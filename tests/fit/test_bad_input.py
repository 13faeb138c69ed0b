"""Every mistake gets one error that names the argument and the fix, before the first step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_prune import BudgetError, ChannelPruning, PlanError, TraceError, prune_channels
from tests.fit.toys import ToyModule, loader, toy_data, trainer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 0.0}, r"target .* \(0, 1\]; got 0"),
        ({"target": 1.5}, r"target .* got 1.5"),
        ({"target": float("nan")}, "target"),
        ({"target": "half"}, "target .* got 'half'"),
        ({"metric": "flops"}, "metric must be one of macs, params, latency; got 'flops'"),
        ({"method": "l2"}, "method must be one of .*l1.*magnitude.*; got .l2."),
        ({"warmup_epochs": -1}, "warmup_epochs .* got -1"),
        ({"learn_epochs": 0}, "learn_epochs must be at least 1"),
        ({"round_to": 0}, "round_to .* got 0"),
        ({"min_channels": 0}, "min_channels .* got 0"),
        ({"weight_l2": -1.0}, "weight_l2 .* got -1"),
        ({"gate_lr": 0.0}, "gate_lr must be a positive number"),
        ({"patience": 0}, "patience"),
        ({"include": "conv("}, "include='conv\\(' is not a valid regular expression"),
        ({"plan": 7}, "plan must be a CompactionPlan or the path of one; got int"),
    ],
)
def test_arguments_are_checked_at_init(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChannelPruning(**options)


@pytest.mark.parametrize("content", [b"", b"{}", b"\x80\x04pickle", b'{"format": "other"}', b"[1, 2]"])
def test_corrupt_or_foreign_plan_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(PlanError, match="plan"):
        ChannelPruning(plan=path)
    assert path.read_bytes() == content
    with pytest.raises(PlanError, match="no plan file"):
        ChannelPruning(plan=tmp_path / "missing.json")


def test_a_plan_of_another_model_fails_at_setup(tmp_path: Path) -> None:
    other = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    plan = prune_channels(other, torch.randn(1, 1, 8, 8)).plan
    module = ToyModule()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(PlanError, match="made for a model with a tensor '0.weight'"):
        trainer([ChannelPruning(plan=plan)], 2).fit(module, loader())
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


class Wrapped(ToyModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net


@pytest.mark.parametrize(
    ("module", "callback", "error", "message"),
    [
        (Wrapped(nn.Flatten()), ChannelPruning(), TraceError, "no convolution or linear"),
        (ToyModule(), ChannelPruning(include="backbone"), TraceError, "include=.backbone. matches no.*net.conv1"),
        (ToyModule(), ChannelPruning(exclude=["net.conv9"]), TraceError, "exclude='net.conv9' matches no prunable layer"),
        (ToyModule(), ChannelPruning(target=0.001), BudgetError, "target=0.001 .* cannot be reached"),
        (ToyModule(), ChannelPruning(example_inputs=torch.zeros(1, 5, 6, 6)), TraceError,
         r"forward failed in 'net.conv1' on the example input \(\(1, 5, 6, 6\) float32\)"),
    ],
    ids=["nothing-to-prune", "include", "exclude", "unreachable", "forward-fails"],
)  # fmt: skip
def test_models_are_checked_at_setup(
    module: ToyModule, callback: ChannelPruning, error: type[Exception], message: str
) -> None:
    steps: list[int] = []
    module.training_step = lambda *a: steps.append(1)  # type: ignore[method-assign]
    before = {k: v.clone() for k, v in module.state_dict().items()}
    if not list(module.parameters()):
        module.unused = nn.Parameter(torch.zeros(1))
    with pytest.raises(error, match=message):
        trainer([callback], 5).fit(module, loader())
    assert not steps
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items() if k in before)


def test_phases_that_do_not_fit() -> None:
    callback = ChannelPruning(warmup_epochs=3, learn_epochs=3, finetune_epochs=1)
    with pytest.raises(MisconfigurationException, match="need 7 epochs, but the Trainer has max_epochs=5"):
        trainer([callback], 5).fit(ToyModule(), loader())
    with pytest.raises(MisconfigurationException, match="warmup_epochs must be given"):
        trainer([ChannelPruning()], -1).fit(ToyModule(), loader())


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy])
def test_sharding_strategies_are_refused(kind: type) -> None:
    fit = trainer([], 5)
    strategy = object.__new__(kind)
    fit.strategy.__class__, previous = kind, fit.strategy.__class__
    try:
        with pytest.raises(MisconfigurationException, match=f"{kind.__name__}.*strategy='ddp'"):
            ChannelPruning().setup(fit, ToyModule(), "fit")
    finally:
        fit.strategy.__class__ = previous
    assert isinstance(strategy, kind)


def test_batches_that_do_not_say_what_forward_takes() -> None:
    class Odd(ToyModule):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return super().training_step((batch["scan"], batch["label"]), batch_idx)

    data = [{"scan": x, "label": y} for x, y in toy_data(32)]
    odd = torch.utils.data.DataLoader(data, batch_size=8)
    with pytest.raises(TraceError, match=r"dict with keys \['label', 'scan'\].*example_inputs="):
        trainer([ChannelPruning()], 5).fit(Odd(), odd)
    callback = ChannelPruning(example_inputs=torch.zeros(1, 1, 6, 6))
    trainer([callback], 5).fit(Odd(), odd)
    assert callback.compact_model is not None


def test_monitor_that_nobody_logs() -> None:
    callback = ChannelPruning(method="magnitude", warmup_epochs=0, monitor="val/acc")
    with pytest.raises(
        MisconfigurationException, match="monitor='val/acc' is not among the logged metrics: .*val_loss"
    ):
        trainer([callback], 3).fit(ToyModule(), loader(), loader(24))


def test_a_checkpoint_without_our_state() -> None:
    with pytest.raises(PlanError, match="no state of ChannelPruning"):
        ChannelPruning().load_state_dict({"something": 1})


def test_yaml_configuration(tmp_path: Path) -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(pl.Callback, "callback")
    config = {
        "class_path": "lightning_prune.callback.ChannelPruning",
        "init_args": {
            "target": 0.25, "method": "magnitude", "learn_epochs": 4, "reentry_until": 0.5, "distill": 0.3,
            "distill_temperature": 2.0, "recalibrate": 16, "penalty_weights": {"net.conv1": 2},
        },
    }  # fmt: skip
    parsed = parser.parse_object({"callback": config})
    callback = parser.instantiate(parsed).callback
    assert isinstance(callback, ChannelPruning)
    assert callback.config.target == 0.25
    assert callback.config.recalibrate == 16
    assert callback.config.penalty_weights == {"net.conv1": 2}
    config["init_args"]["recalibrate"] = True
    assert parser.instantiate(parser.parse_object({"callback": config})).callback.config.recalibrate is True
    json.dumps(config)
