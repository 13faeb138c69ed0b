"""Distillation from the dense network: against a loop written by hand, through every way Lightning takes a step."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_prune import ChannelPruning, CompactionPlan, mask_channels, prune_channels
from lightning_prune.distillation import distillation_loss
from tests.fit.test_callback import flat, pruner
from tests.fit.toys import ToyModule, loader, toy_data, toy_fit, trainer


class Plain(ToyModule):
    """Plain gradient descent: what the steps are is easy to write down."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class CallsNet(Plain):
    """Calls the network past ``self``, and returns a dict."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": F.cross_entropy(self.net(batch[0]), batch[1]), "extra": 1}


def half_plan() -> CompactionPlan:
    return prune_channels(ToyModule(), toy_data(2).tensors[0], target=0.5, method="random").plan


def by_hand(
    module: nn.Module, plan: CompactionPlan, weight: float, temperature: float, accumulate: int, epochs: int
) -> nn.Module:
    """Gradient descent on cross-entropy plus the distillation loss, from definitions, in float64."""
    teacher = copy.deepcopy(module).double().eval()
    x = toy_data(2).tensors[0].double()
    student = mask_channels(copy.deepcopy(module).double(), x, plan).train()
    live = [(p != 0).double() if p.dim() > 1 else None for p in student.parameters()]
    removed = {name: torch.tensor(ids, dtype=torch.long) for name, ids in plan.removed.items()}
    for _ in range(epochs):
        for i, (x, y) in enumerate(loader()):
            logits = student(x.double())
            p, q = (z.div(temperature).softmax(1) for z in (teacher(x.double()).detach(), logits))
            divergence = (p * (p / q).log()).sum(1).mean() * temperature**2
            ((F.cross_entropy(logits, y) + weight * divergence) / accumulate).backward()
            if (i + 1) % accumulate == 0:
                with torch.no_grad():
                    for parameter, keep in zip(student.parameters(), live, strict=True):
                        parameter -= 0.05 * parameter.grad
                        parameter.grad = None
                        if keep is not None:
                            parameter *= keep
                    for name, ids in removed.items():
                        student.get_submodule(name).bias[ids] = 0
                    student.net.bn.weight[removed["net.conv1"]] = 0
                    student.net.bn.bias[removed["net.conv1"]] = 0
    return student


@pytest.mark.parametrize(("kind", "accumulate"), [(Plain, 1), (Plain, 3), (CallsNet, 1)])
def test_finetuning_is_the_loop_written_by_hand(kind: type[ToyModule], accumulate: int) -> None:
    torch.manual_seed(0)
    module = kind()
    plan = half_plan()
    expected = by_hand(module, plan, 0.7, 3.0, accumulate, 2)
    callback = ChannelPruning(plan=plan, distill=0.7, distill_temperature=3.0, compact_on_fit_end=False)
    fit = trainer([callback], 2, precision="64-true", accumulate_grad_batches=accumulate)
    fit.fit(module, loader())
    torch.testing.assert_close(flat(module).double(), flat(expected), rtol=1e-9, atol=1e-10)
    without = ChannelPruning(plan=plan, compact_on_fit_end=False)
    torch.manual_seed(0)
    other = kind()
    trainer([without], 2, precision="64-true", accumulate_grad_batches=accumulate).fit(other, loader())
    assert (flat(other) - flat(module)).abs().max() > 1e-4, "the loss must make a difference"
    assert callback.history[-1]["distill"] > 0


def test_the_loss_and_its_gradient_against_their_definition() -> None:
    z, t = torch.randn(5, 4, 3, dtype=torch.float64, requires_grad=True), torch.randn(5, 4, 3).double()
    p, q = (t / 2).softmax(1), (z / 2).softmax(1)
    expected = 4 * (p * (p.log() - q.log())).sum(1).mean()
    found = distillation_loss(z, t, 2.0)
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found, z)
    torch.testing.assert_close(gradient, (2 * (q - p) / 15).detach())  # T (q - p), mean over 15 positions


def test_the_teacher_is_the_network_before_learning_also_after_rewinding() -> None:
    callback = pruner(distill=0.5, rewind_to=3, finetune_epochs=1)
    seen: dict[str, Tensor] = {}

    class Watch(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch == 1:
                seen.update({k: v.clone() for k, v in pl_module.state_dict().items()})

    module = toy_fit([callback, Watch()], max_epochs=4)
    teacher = callback._fit.distiller.teacher
    assert seen
    assert all(torch.equal(value, seen[name]) for name, value in teacher.state_dict().items())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert set(module.state_dict()) == set(seen), "the teacher is no part of the module"


@pytest.mark.parametrize("stop", ["epoch=1", "epoch=3"], ids=["learning", "finetuning"])
def test_a_resumed_fit_keeps_its_teacher(tmp_path: Path, stop: str) -> None:
    def make() -> ChannelPruning:
        return pruner(distill=0.5, finetune_epochs=2)

    whole = make()
    reference = toy_fit([whole], max_epochs=5)
    options = {"dirpath": tmp_path, "save_top_k": -1, "filename": "{epoch}", "save_on_train_epoch_end": True}
    toy_fit([make(), ModelCheckpoint(**options)], max_epochs=5, enable_checkpointing=True)
    module, resumed = ToyModule(), make()
    fit = trainer([resumed, ModelCheckpoint(**options)], 5, enable_checkpointing=True)
    fit.fit(module, loader(), loader(24), ckpt_path=tmp_path / f"{stop}.ckpt")
    torch.testing.assert_close(flat(module), flat(reference), rtol=1e-6, atol=1e-7)
    assert resumed.history[-1]["distill"] == pytest.approx(whole.history[-1]["distill"], rel=1e-4)


def test_mixed_precision_one_shot_and_compaction() -> None:
    callback = ChannelPruning(method="magnitude", warmup_epochs=1, distill=1.0)
    module = toy_fit([callback], max_epochs=3, precision="bf16-mixed")
    assert callback.compact_model is not None
    assert "training_step" not in module.__dict__
    assert 0 < callback.history[-1]["distill"] < 10


def test_loss_scaling_scales_the_distillation_with_the_loss() -> None:
    plan = half_plan()
    ends = {}
    for name, weight in (("plain", 5.0), ("scaled", 5.0), ("none", 0.0)):
        torch.manual_seed(0)
        module = Plain()
        options: dict[str, Any] = {}
        if name == "scaled":
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            options["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler=scaler)]
        callback = ChannelPruning(plan=plan, distill=weight, compact_on_fit_end=False)
        trainer([callback], 2, **options).fit(module, loader())
        ends[name] = flat(module)
    effect = (ends["plain"] - ends["none"]).norm()
    assert (ends["scaled"] - ends["plain"]).norm() < 0.2 * effect


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # dynamo looks at it itself
@pytest.mark.parametrize("what", ["module", "network"])
def test_compiled(what: str) -> None:
    class Silent(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])  # self.log does not compile

    ends = []
    for compiled in (False, True):
        torch.manual_seed(0)
        module: Any = Silent()
        if compiled and what == "module":
            module = torch.compile(module, backend="eager")
        elif compiled:
            module.net.compile(backend="eager")
        callback = ChannelPruning(
            method="random",
            warmup_epochs=0,
            distill=5.0,
            compact_on_fit_end=False,
            dead_channel_skipping=False,
        )
        trainer([callback], 2).fit(module, loader())
        ends.append(flat(module))
        assert callback.history[-1]["distill"] > 0
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-6)


def test_copies_made_during_the_fit_are_plain() -> None:
    copies: list[nn.Module] = []

    class Copy(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any) -> None:
            if trainer.current_epoch == 2 and not copies:
                assert "training_step" in pl_module.__dict__
                attached, pl_module._trainer = pl_module._trainer, None
                copies.extend([copy.deepcopy(pl_module), pickle.loads(pickle.dumps(pl_module))])
                pl_module._trainer = attached

    callback = ChannelPruning(method="magnitude", warmup_epochs=1, distill=1.0, dead_channel_skipping=False)
    toy_fit([callback, Copy()], max_epochs=3)
    for copied in copies:
        assert copied.training_step.__self__ is copied
        assert copied.training_step.__func__ is ToyModule.training_step


class Pair(ToyModule):
    def forward(self, x: Tensor) -> Any:
        return self.net(x), x

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0])[0], batch[1])


class OneScore(ToyModule):
    def forward(self, x: Tensor) -> Any:
        return self.net(x)[:, :1]


class ByHand(ToyModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class InPieces(ToyModule):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        net = self.net
        x = F.relu(net.bn(net.conv1(batch[0])))
        x = torch.sigmoid(net.conv2(x)).flatten(1)
        return F.cross_entropy(net.fc2(F.relu(net.fc1(x))), batch[1])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Pair, "must return a floating-point tensor of logits.*Pair.forward returned tuple"),
        (OneScore, r"at least 2 classes, but OneScore.forward returned a float32 tensor of shape \(2, 1\)"),
        (ByHand, "ByHand optimizes by hand"),
        (InPieces, r"found no call of the whole network.*self\(\.\.\.\), self.net\(\.\.\.\)"),
    ],
)
def test_what_cannot_be_distilled_is_refused(kind: type[ToyModule], message: str) -> None:
    module = kind()
    before = flat(module).clone()
    with pytest.raises(MisconfigurationException, match=message):
        trainer([pruner(distill=0.5)], 5).fit(module, loader())
    assert torch.equal(flat(module), before), "refused before the first step"
    assert "training_step" not in module.__dict__


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distill": -1.0}, "distill must be a non-negative number; got -1"),
        ({"distill_temperature": 0.0}, "distill_temperature must be a positive number; got 0"),
        ({"recalibrate": -1}, "recalibrate must be True, False or a number .* got -1"),
        ({"recalibrate": "yes"}, "recalibrate .* got 'yes'"),
        ({"reentry_until": 1.5}, r"reentry_until .* \[0, 1\]; got 1.5"),
        ({"reentry_until": 0.5, "method": "magnitude"}, "reentry_until=0.5 needs a learn phase"),
        ({"penalty_weights": {"net": 0.0}}, r"penalty_weights\['net'\] .* positive number; got 0"),
        ({"penalty_weights": {"(": 1.0}}, "penalty_weights='\\(' is not a valid regular expression"),
    ],
)
def test_arguments_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChannelPruning(**options)
