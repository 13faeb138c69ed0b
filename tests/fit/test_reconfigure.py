"""A network that is cut while it trains takes the steps of the masked one, and nobody who looks at it from outside can tell."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_prune import ChannelPruning, CompactionError, CompactionPlan, ops, skipping, trace_channels
from lightning_prune.compaction import resize
from tests.fit.reconfiguring import NETWORKS, OPTIMIZERS, Module, Watch, fit, pruner
from tests.fit.toys import loader, trainer

#: hooks that a module may not have left
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks")


def twins(network: str = "plain", optimizer: str = "adam", **options: Any) -> tuple[Module, Module]:
    pair = []
    for _ in range(2):
        torch.manual_seed(0)
        pair.append(Module(network, optimizer, **options))
    return pair[0], pair[1]


def assert_same_states(first: Watch, second: Watch, tolerance: float = 1e-9) -> None:
    """After every step, all but the running variances of channels that are gone (whose outputs are zero anyway)."""
    assert len(first.states) == len(second.states) > 0
    assert first.rates == second.rates
    for a, b in zip(first.states, second.states, strict=True):
        for name, value in a.items():
            if name.endswith("running_var"):
                live = b[name.removesuffix("running_var") + "weight"] != 0
                torch.testing.assert_close(b[name][live], value[live], rtol=tolerance, atol=tolerance)
            else:
                torch.testing.assert_close(b[name], value, rtol=tolerance, atol=tolerance)


def assert_full_size(module: Module, network: str = "plain") -> None:
    fresh = Module(network)
    for (name, tensor), (_, mine) in zip(fresh.named_parameters(), module.named_parameters(), strict=True):
        assert tensor.shape == mine.shape, name
    for (name, a), (_, b) in zip(fresh.net.named_modules(), module.net.named_modules(), strict=True):
        assert type(a) is type(b), name
        for key in ("in_channels", "out_channels", "groups", "num_features", "in_features", "out_features"):
            assert getattr(a, key, None) == getattr(b, key, None), (name, key)
        assert not any(getattr(b, hooks) for hooks in HOOKS), name


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
@pytest.mark.parametrize("network", sorted(NETWORKS))
def test_every_step_is_that_of_the_masked_network(network: str, optimizer: str) -> None:
    callbacks = pruner(0), pruner(1)
    modules = twins(network, optimizer)
    parameters = list(modules[1].parameters())
    watches = [fit(callback, module, 5)[1] for callback, module in zip(callbacks, modules, strict=True)]
    assert watches[0].sizes[-1] == watches[0].sizes[0]
    assert watches[1].sizes[6 * 3] < watches[1].sizes[0], "cut at the latest where channels were selected"
    assert_same_states(*watches)
    assert callbacks[0].plan == callbacks[1].plan
    # afterwards: the same objects at full size, dead at zero, and the same small network
    assert all(a is b for a, b in zip(parameters, modules[1].parameters(), strict=True))
    assert_full_size(modules[1], network)
    for a, b in zip(*(c.compact_model.state_dict().values() for c in callbacks), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert sum(p.numel() for p in callbacks[1].compact_model.parameters()) <= watches[1].sizes[-1]


OPTIONS: dict[str, dict[str, Any]] = {
    "one-shot": {"method": "magnitude", "learn_epochs": None},
    "gradual": {"method": "fpgm", "method_options": {"interval": 2}},
    "taylor": {"method": "taylor", "method_options": {"interval": 2}},
    "obd": {"method": "obd", "reentry_until": 0.5, "method_options": {"interval": 2}},
    "apoz": {"method": "apoz", "method_options": {"interval": 2}},
    "slimming": {"method": "slimming", "ratios": {"net.fc1": 0.5}},
    "l0": {"method": "l0", "gate_lr": 0.3, "penalty_weights": {"net.conv1": 2.0}},
    "vib": {"method": "vib", "gate_lr": 0.1, "distill": 0.5},
    "reentry": {"reentry_until": 0.5, "gate_lr": 0.15, "recalibrate": 2},
    "push-pull": {"alternate_every_n_steps": 2, "gate_lr": 0.1, "rewind_to": 4},
    "sphere": {"sphere": True, "weight_l1": 1e-4, "reconstruct": True},
    "branches": {"remove_branches": True, "target": 0.1},
    "every other": {"every": 2},
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_with_every_option(name: str) -> None:
    options = dict(OPTIONS[name])
    every = options.pop("every", 1)
    learn = options.pop("learn_epochs", 2)
    modules = twins("residual" if name == "branches" else "plain")
    callbacks = [pruner(n, learn_epochs=learn, **options) for n in (0, every)]
    watches = [fit(callback, module, 4)[1] for callback, module in zip(callbacks, modules, strict=True)]
    assert watches[1].sizes[-1] < watches[1].sizes[0]
    assert_same_states(*watches)
    assert callbacks[0].plan == callbacks[1].plan
    assert callbacks[0].report.widths == callbacks[1].report.widths


def test_what_rests_is_not_cut() -> None:
    callback = pruner(
        1, method="magnitude", reentry_until=1.0, learn_epochs=2, method_options={"interval": 2}
    )
    _, watch = fit(callback, epochs=4)
    live = [record["live_channels"] for record in callback.history]
    assert live[2] < live[0], "the network computed with fewer"
    assert set(watch.sizes[: 6 * 3]) == {watch.sizes[0]}, "and kept them all until the point"
    assert watch.sizes[6 * 3] < watch.sizes[0]


def test_accumulated_gradients() -> None:
    callbacks = pruner(0), pruner(1)
    watches = [fit(c, m, 5, accumulate_grad_batches=4)[1] for c, m in zip(callbacks, twins(), strict=True)]
    assert watches[1].sizes[-1] < watches[1].sizes[0]
    assert_same_states(*watches)


def test_under_autocast() -> None:
    """bfloat16 sums of other lengths round otherwise: close, not equal."""
    callbacks = (
        pruner(0, method="magnitude", learn_epochs=None),
        pruner(1, method="magnitude", learn_epochs=None),
    )
    watches = [
        fit(c, m, 3, precision="bf16-mixed")[1] for c, m in zip(callbacks, twins("plain", "sgd"), strict=True)
    ]
    assert callbacks[0].plan == callbacks[1].plan
    assert watches[1].sizes[-1] < watches[1].sizes[0]
    assert_same_states(*watches, tolerance=5e-2)


# ---- what the user sees --------------------------------------------------------------------------------------------


class Look(pl.Callback):
    """Looks at the cut module in the third epoch, and may stop the fit there."""

    def __init__(self, fail: bool = False) -> None:
        self.fail = fail
        self.copies: list[Any] = []
        self.formats: list[bool] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 4:
            conv = pl_module.net.conv1
            assert conv.out_channels == conv.weight.shape[0] == pl_module.net.bn1.num_features < 12
            assert pl_module.net.fc1.in_features == pl_module.net.fc1.weight.shape[1]
            self.formats = [
                p.is_contiguous(memory_format=torch.channels_last)
                for m in (pl_module.net.conv1, pl_module.net.conv2)
                for p in (m.weight, trainer.optimizers[0].state[m.weight]["exp_avg"])
            ]
            self.copies = [copy.deepcopy(pl_module.net), pickle.loads(pickle.dumps(pl_module.net))]
            x = torch.randn(2, 1, 6, 6, dtype=torch.float64)
            for twin in self.copies:
                assert twin.state_dict()["conv1.weight"].shape == conv.weight.shape, "copies are plain"
                torch.testing.assert_close(twin.eval()(x), pl_module.net.eval()(x))
            pl_module.net.train()
            # a state dict of the module, or of any part, is full-size, and can be loaded again
            state = pl_module.net.conv1.state_dict()
            assert state["weight"].shape == (12, 1, 3, 3)
            before = conv.weight.detach().clone()
            pl_module.load_state_dict(pl_module.state_dict())
            torch.testing.assert_close(conv.weight.detach(), before, rtol=0, atol=0)
            saved = trainer.optimizers[0].state_dict()
            trainer.optimizers[0].load_state_dict(saved)
            if self.fail:
                raise KeyError("stop")


def test_the_module_in_the_middle_of_a_fit() -> None:
    watch, look = Watch(), Look()
    callbacks = pruner(0), pruner(1)
    modules = twins(channels_last=True)
    _, reference = fit(callbacks[0], modules[0])
    _, watch = fit(callbacks[1], modules[1], callbacks=[look])
    assert look.formats == [True] * 4
    assert len(look.copies) == 2
    assert_same_states(reference, watch)
    for name, parameter in modules[1].named_parameters():
        if parameter.dim() == 4:
            assert parameter.stride() == dict(modules[0].named_parameters())[name].stride()
    assert all(b.state_dict().keys() == a.state_dict().keys() for a, b in [modules])


def test_an_aborted_fit_leaves_a_full_size_module() -> None:
    torch.manual_seed(0)
    module = Module()
    with pytest.raises(KeyError, match="stop"):
        fit(callback := pruner(1), module, callbacks=[Look(fail=True)])
    assert_full_size(module)
    assert callback.plan is not None
    for piece in callback.plan.slices:
        tensor = module.state_dict()[piece.tensor]
        expected = 1.0 if piece.tensor.endswith("running_var") else 0.0
        assert (tensor.index_select(piece.dim, torch.tensor(piece.removed)) == expected).all()
    module.zero_grad()
    module.training_step((torch.randn(4, 1, 6, 6, dtype=torch.float64), torch.arange(4) % 3), 0).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in module.parameters())


def test_a_cut_that_would_change_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resize, "install", lambda model, fixes: [])  # sizes that the code spells out stay
    torch.manual_seed(0)
    module = Module("depthwise")
    with pytest.raises(
        CompactionError, match=r"without its dead channels fails.*reconfigure_every_n_epochs=0"
    ):
        fit(pruner(1), module)
    assert_full_size(module, "depthwise")


def test_a_given_plan_is_cut_at_once() -> None:
    graph = trace_channels(Module(), torch.zeros(1, 1, 6, 6))
    plan = CompactionPlan.from_mask(graph, np.arange(graph.num_channels) % 3 > 0)
    options: dict[str, Any] = {"plan": plan, "warmup_epochs": 0, "learn_epochs": None, "distill": 0.5}
    watches = [fit(pruner(n, **options), m, 2)[1] for n, m in zip((0, 1), twins(), strict=True)]
    assert len(set(watches[1].sizes)) == 1
    assert watches[1].sizes[0] < watches[0].sizes[0]
    assert_same_states(*watches)


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def saving(folder: Path, name: object = "", **options: Any) -> ModelCheckpoint:
    """Keeps every epoch as ``<name>epoch=<n>.ckpt``."""
    return ModelCheckpoint(
        dirpath=folder, save_top_k=-1, filename=f"{name}{{epoch}}", save_on_train_epoch_end=True, **options
    )


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
@pytest.mark.parametrize("options", [{}, {"method": "obd", "sphere": True, "reentry_until": 0.4}], ids=str)
def test_resuming_is_exact_and_either_way(options: dict[str, Any], optimizer: str, tmp_path: Path) -> None:
    """In single precision, in which a checkpoint is loaded."""
    fit_options: dict[str, Any] = {"precision": "32-true", "enable_checkpointing": True, "epochs": 5}
    whole = {}
    for every, module in zip((0, 1), twins(optimizer=optimizer), strict=True):
        whole[every] = fit(
            pruner(every, **options), module, callbacks=[saving(tmp_path, every)], **fit_options
        )[1]
    assert whole[1].sizes[-1] < whole[1].sizes[0]
    for epoch in (2, 3):  # in the learn phase, and when channels are just to be selected
        assert_dense(torch.load(tmp_path / f"1epoch={epoch}.ckpt", weights_only=False))
        for source, every in ((1, 1), (1, 0), (0, 1)):
            _, watch = fit(
                pruner(every, **options), Module(optimizer=optimizer), weights_only=False,
                ckpt_path=tmp_path / f"{source}epoch={epoch}.ckpt", callbacks=[saving(tmp_path, "x")], **fit_options,
            )  # fmt: skip
            assert len(watch.states) == 6 * (4 - epoch)
            for a, b in zip(watch.states, whole[every].states[-len(watch.states) :], strict=True):
                for name in a:
                    if source == every == 1:
                        assert torch.equal(a[name], b[name]), name
                    elif optimizer == "sgd" and not name.endswith(
                        "running_var"
                    ):  # Adam makes steps of rounding errors
                        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-5)
            if source == every == 1:
                assert watch.sizes == whole[1].sizes[-len(watch.sizes) :], "cut from its first step"


def assert_dense(content: dict[str, Any]) -> None:
    """A checkpoint that a module and its optimizer of the full size take."""
    module = Module()
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    assert {name: tensor.shape for name, tensor in content["state_dict"].items()} == shapes
    (optimizer,) = content["optimizer_states"]
    expected = [p.shape for d in (True, False) for p in module.parameters() if (p.dim() > 1) == d]
    for state, shape in zip(optimizer["state"].values(), expected, strict=True):
        assert {
            value.shape for value in state.values() if isinstance(value, torch.Tensor) and value.dim()
        } == {shape}


def test_weights_only_checkpoints_are_those_of_the_dense_code(tmp_path: Path) -> None:
    callback = saving(tmp_path, save_weights_only=True)
    _, watch = fit(pruner(1), callbacks=[callback], enable_checkpointing=True)
    content = torch.load(tmp_path / "epoch=4.ckpt", weights_only=True)
    assert "optimizer_states" not in content
    loaded = Module().double()
    loaded.load_state_dict(content["state_dict"])
    torch.testing.assert_close(loaded.state_dict(), watch.states[6 * 5 - 1], rtol=0, atol=0)
    assert loaded.eval()(torch.zeros(1, 1, 6, 6, dtype=torch.float64)).isfinite().all()


# ---- together with the compiled kernels ----------------------------------------------------------------------------


@pytest.mark.skipif(not ops.extension_available(), reason="no compiled extension")
@pytest.mark.parametrize("method", ["l1", "l0", "obd"])
def test_the_compiled_kernels_run_the_small_network(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[tuple[int, float]] = []

    def measure(layer: Any, *args: Any) -> skipping.Choice:
        shares.append((layer.module.weight.shape[0], layer.share))
        return skipping.Choice(1, 1, 1) if layer.share < 1 else skipping.Choice(2, 2, 2)

    monkeypatch.setattr(skipping, "_measure", measure)
    monkeypatch.setattr(skipping, "LEAST_MACS", 0)
    plain = pruner(0, method=method)
    ours = pruner(1, method=method, dead_channel_skipping=True)
    modules = twins(channels_last=True)
    watches = [fit(callback, module)[1] for callback, module in zip((plain, ours), modules, strict=True)]
    assert_same_states(*watches)
    assert any(rows not in (12, 16) for rows, _ in shares), "compared anew for the small network"
    assert shares[-1][1] == 1.0
    assert ours._fit.skipper is not None
    assert all(layer.share == 1.0 for layer in ours._fit.skipper._layers), "nothing is left to be skipped"
    assert_full_size(modules[1])


# ---- what cannot work ----------------------------------------------------------------------------------------------


def test_weights_that_somebody_else_averages() -> None:
    with pytest.raises(MisconfigurationException, match="StochasticWeightAveraging averages"):
        trainer([pruner(1), StochasticWeightAveraging(1e-2)], 3).fit(Module(), loader())


class Factored(Module):
    """An optimizer that keeps row and column means."""

    def configure_optimizers(self) -> Any:
        return torch.optim.Adafactor(self.parameters())


class Flat(Module):
    """An optimizer that lays all parameters side by side."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), max_iter=2)


@pytest.mark.parametrize(("kind", "name"), [(Factored, "Adafactor"), (Flat, "LBFGS")])
def test_optimizers_whose_state_cannot_be_cut(kind: type[Module], name: str) -> None:
    module, watch = kind(), Watch()
    with pytest.raises(CompactionError, match=rf"{name} keeps .*reconfigure_every_n_epochs=0"):
        trainer([watch, pruner(1)], 5).fit(module, loader())
    assert len(watch.states) == 1, "refused after the first step"
    trainer([pruner(0)], 5).fit(kind(), loader())


def test_the_argument_is_checked() -> None:
    with pytest.raises(
        ValueError, match="reconfigure_every_n_epochs must be an integer of at least 0; got -1"
    ):
        ChannelPruning(reconfigure_every_n_epochs=-1)
