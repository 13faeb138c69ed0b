"""By default dead channels are cut out when channels are selected: steps of the masked network, in nobody's way."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback, StochasticWeightAveraging
from torch import Tensor, nn

from lightning_prune import ChannelPruning
from lightning_prune.compaction import resize
from tests.fit.reconfiguring import Module, Watch, pruner
from tests.fit.test_reconfigure import assert_full_size, assert_same_states, saving, twins
from tests.fit.toys import loader, trainer

SELECTED = 6 * 4  # steps before the selection: epochs of warmup and learning


class Quiet(Watch):
    """Passes for one of Lightning's own callbacks."""


Quiet.__module__ = "lightning.pytorch.callbacks.quiet"


def run(
    callback: ChannelPruning,
    module: pl.LightningModule,
    *others: pl.Callback,
    epochs: int = 6,
    **options: Any,
) -> Quiet:
    watch = Quiet()
    paths = {name: options.pop(name) for name in ("ckpt_path", "weights_only") if name in options}
    trainer([callback, watch, *others], epochs, **({"precision": "64-true"} | options)).fit(
        module, loader(), loader(24), **paths
    )
    return watch


@pytest.mark.parametrize(
    ("network", "optimizer"), [("plain", "adam"), ("residual", "sgd"), ("depthwise", "adam")]
)
def test_every_step_is_that_of_the_masked_network(network: str, optimizer: str) -> None:
    modules = twins(network, optimizer)
    callbacks = [pruner(0), pruner("auto")]  # type: ignore[arg-type]
    assert ChannelPruning().config.reconfigure_every_n_epochs == "auto"
    torch.manual_seed(0)
    first = run(callbacks[0], modules[0])
    torch.manual_seed(0)
    second = run(callbacks[1], modules[1])
    assert_same_states(first, second)
    assert max(second.sizes[SELECTED:]) < first.sizes[0]
    assert callbacks[0].plan == callbacks[1].plan
    assert_full_size(modules[1], network)
    for a, b in zip(*(c.compact_model.state_dict().values() for c in callbacks), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


class Compiled(Module):
    """One of whose parts is compiled, though nobody calls it here."""

    def __init__(self) -> None:
        super().__init__()
        self.net.fc1.compile(backend="eager", disable=True)


@pytest.mark.parametrize("kind", [Module, Compiled])
def test_what_dies_while_masks_are_learned_is_cut_at_the_end_of_the_epoch(kind: type[Module]) -> None:
    """Unless little has died, or the network would have to be compiled again."""
    torch.manual_seed(0)
    callback = pruner("auto", gate_lr=0.15)  # type: ignore[arg-type]
    watch = run(callback, module := kind())
    sizes = [watch.sizes[i] for i in range(0, SELECTED, 6)]
    macs = [record["macs"] for record in callback.history[:4]]
    assert macs[2] < 0.9 * macs[0], "enough has died before the selection"
    assert (sizes[3] < sizes[0]) == (kind is Module)
    for epoch in range(1, 4):
        if macs[epoch - 1] > 0.9 * macs[0]:
            assert sizes[epoch] == sizes[0]
    assert watch.sizes[SELECTED] < watch.sizes[0]
    assert_full_size(module)


def test_a_resumed_fit_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    """In single precision, in which a checkpoint is loaded."""
    options: dict[str, Any] = {"precision": "32-true", "enable_checkpointing": True}
    torch.manual_seed(0)
    first = run(pruner("auto"), Module(), saving(tmp_path), **options)  # type: ignore[arg-type]
    for epoch in (1, 4):
        path = str(tmp_path / f"epoch={epoch}.ckpt")
        again = saving(tmp_path, "x")
        second = run(pruner("auto"), Module(), again, ckpt_path=path, weights_only=False, **options)  # type: ignore[arg-type]
        for name, value in first.states[-1].items():
            torch.testing.assert_close(second.states[-1][name], value)
        assert second.sizes[-1] == first.sizes[-1] < first.sizes[0]


class Own(pl.Callback):
    """Anybody's."""


class Averages(Module):
    def on_before_zero_grad(self, optimizer: Any) -> None:
        pass


class ByHand(Module):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss := super().training_step(batch, batch_idx))
        optimizer.step()
        return loss


class Drops(Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.drop(x))


class Copies(Module):
    def __init__(self) -> None:
        super().__init__()
        self.average = copy.deepcopy(self.net)


class Noisy(torch.optim.SGD):
    pass


class Hooked(Module):
    def __init__(self) -> None:
        super().__init__()
        mask = torch.ones_like(self.net.conv1.weight)
        self.net.conv1.weight.register_hook(lambda grad: grad * mask.to(grad))


class OtherForward(Module):
    def __init__(self) -> None:
        super().__init__()
        self.net.fc1.forward = lambda x, own=self.net.fc1: type(own).forward(own, x)  # type: ignore[method-assign]


class OwnOptimizer(Module):
    def configure_optimizers(self) -> Any:
        return Noisy(self.parameters(), lr=0.01)


OBSTACLES: dict[str, tuple[Any, list[pl.Callback], dict[str, Any]]] = {
    "Own may keep": (Module, [Own()], {}),
    "LambdaCallback may keep": (Module, [LambdaCallback()], {}),
    "StochasticWeightAveraging may keep": (Module, [StochasticWeightAveraging(1e-3)], {}),
    "has its own on_before_zero_grad": (Averages, [], {}),
    "optimizes by hand": (ByHand, [], {}),
    "dropout would draw": (Drops, [], {}),
    "average looks like a copy": (Copies, [], {}),
    "net.fc1 has another forward": (OtherForward, [], {}),
    "a parameter has hooks": (Hooked, [], {}),
    "Noisy is not known": (OwnOptimizer, [], {}),
    "gradients are clipped": (Module, [], {"gradient_clip_val": 1.0}),
}


@pytest.mark.parametrize("why", sorted(OBSTACLES))
def test_the_network_stays_full_size_where_somebody_could_notice(
    why: str, caplog: pytest.LogCaptureFixture
) -> None:
    kind, others, options = OBSTACLES[why]
    callback = pruner("auto", method="magnitude", learn_epochs=None)  # type: ignore[arg-type]
    with caplog.at_level("INFO", "lightning_prune.fit"):
        watch = run(callback, kind(), *copy.deepcopy(others), epochs=3, **options)
    assert len(set(watch.sizes)) == 1
    assert why in caplog.text
    assert callback.compact_model is not None


def test_a_cut_that_would_change_the_network_is_not_made(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    callback = pruner("auto", method="magnitude", learn_epochs=None)  # type: ignore[arg-type]
    torch.manual_seed(0)
    module = Module("depthwise")
    with monkeypatch.context() as patch, caplog.at_level("INFO", "lightning_prune.fit"):
        patch.setattr(resize, "install", lambda model, fixes: [])  # sizes that the code spells out stay
        watch = run(callback, module, epochs=3)
    assert len(set(watch.sizes)) == 1
    assert "without its dead channels fails" in caplog.text
    assert_full_size(module, "depthwise")
    assert callback.compact_model is not None
