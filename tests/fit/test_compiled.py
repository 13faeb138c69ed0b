"""Networks that torch.compile has compiled before gates are hung on them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import ChannelPruning, PruneError, trace_channels
from lightning_prune.gates import attach
from lightning_prune.gates.attach import GateHooks
from lightning_prune.gates.measured import APoZGates
from tests.fit.toys import ToyModule, ToyNet, loader, trainer

# Where a graph begins at a map, torch.compile asks for its gradient.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
X = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Module(ToyModule):
    """Compiled as ``how`` says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        if how == "compile":
            self.net.compile(backend="eager")
        elif how == "part":
            self.net.fc1.compile(backend="eager")
            self.net.conv2.compile(backend="aot_eager")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])  # self.log does not compile

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def fit(how: str, prunes: bool = True, **options: Any) -> ChannelPruning:
    torch.manual_seed(0)
    settings = {"target": 0.5, "warmup_epochs": 1, "learn_epochs": 3, "finetune_epochs": 1, "gate_lr": 0.05}
    callback = ChannelPruning(**(settings | options))  # type: ignore[arg-type]
    trainer([callback] if prunes else [], 5, precision="64-true").fit(Module(how), loader(), loader(24))
    return callback


OPTIONS: list[dict[str, Any]] = [
    {},
    {"dead_channel_skipping": False},
    {"method": "taylor"},
    {"reentry_until": 0.5},
    {"method": "apoz"},
]


@pytest.mark.parametrize(
    ("options", "baseline"), [(options, False) for options in OPTIONS] + [(OPTIONS[0], True)]
)
def test_masks_are_those_of_the_network_as_it_is(options: dict[str, Any], baseline: bool) -> None:
    """Also when a network of the same class has been trained before, compiled and dense."""
    expected = fit("", **options)
    if baseline:
        fit("compile", prunes=False)
    for how in ("compile", "part") if options == {} else ("compile",):
        found = fit(how, **options)
        assert found.plan == expected.plan, how
        live = [[record["live_channels"] for record in c.history] for c in (found, expected)]
        assert live[0] == live[1]
        gates = [[record["gates"] for record in c.history] for c in (found, expected)]
        for a, b in zip(*gates, strict=True):
            for name, values in a.items():
                assert values == pytest.approx(b[name], rel=1e-5, abs=1e-5)


def test_gates_come_and_go_with_their_hooks() -> None:
    net = ToyNet().eval()
    expected = net(X)
    net.compile(backend="eager")
    torch.testing.assert_close(net(X), expected)
    graph = trace_channels(net, X)
    hooks = GateHooks(net, graph, lambda training: torch.zeros(graph.num_channels))
    hooks.attach()
    torch.testing.assert_close(net(X), net.fc2.bias.expand(2, -1))
    hooks.detach()
    torch.testing.assert_close(net(X), expected)


def test_gates_that_the_loss_does_not_reach_are_not_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attach, "forget_compiled", lambda: None)
    with pytest.raises(PruneError, match="no gradient in the first 18 steps"):
        fit("compile", dead_channel_skipping=False)


def test_distillation_hears_a_network_that_was_compiled_before() -> None:
    fit("compile", prunes=False)
    callback = fit("compile", distill=0.5, plan=fit("").plan)
    assert callback.history[-1]["distill"] == pytest.approx(
        fit("", distill=0.5, plan=callback.plan).history[-1]["distill"]
    )


@pytest.mark.parametrize("soft", [False, True])
def test_reads_are_watched_in_a_network_that_was_compiled_before(soft: bool) -> None:
    net = ToyNet()
    graph = trace_channels(net, X)
    net.compile(backend="eager")
    net(X)
    gates = APoZGates(net, graph, torch.ones(graph.num_channels, dtype=torch.bool), lr=0.1)
    gates.soft = soft
    gates.attach()
    net(X)
    assert gates._reads.any()
    gates.detach()
    gates._reads.zero_()
    net(X)
    assert not gates._reads.any()
