"""Each learned method against its paper's equations."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn

from lightning_prune import ChannelPruning, trace_channels
from lightning_prune.criteria import saliency
from lightning_prune.gates import (
    LEARNED,
    APoZGates,
    Gates,
    L0Gates,
    OBDGates,
    SlimmingGates,
    TaylorGates,
    VIBGates,
    learned,
)
from lightning_prune.gates.l0 import hard_concrete, probability_nonzero
from lightning_prune.gates.vib import kl_divergence
from tests.fit.toys import ToyModule, ToyNet, loader, toy_data, toy_fit, trainer


def make(kind: type[Gates], net: nn.Module | None = None, x: Tensor | None = None, **options: Any) -> Any:
    net = net if net is not None else ToyNet()
    x = x if x is not None else toy_data(4).tensors[0]
    graph = trace_channels(net, x)
    gates = kind(net, graph, torch.ones(graph.num_channels, dtype=torch.bool), 0.05, **options)
    return net, graph, gates


# ---- hard concrete -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_alpha", [-3.0, -1.0, 0.0, 2.5])
@pytest.mark.parametrize("beta", [2 / 3, 0.05, 1.5])
def test_hard_concrete_probability_against_monte_carlo(log_alpha: float, beta: float) -> None:
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(400_000, generator=generator, dtype=torch.float64).clamp(1e-9, 1 - 1e-9)
    z = hard_concrete(u, torch.tensor(log_alpha, dtype=torch.float64), beta)
    expected = float(probability_nonzero(torch.tensor(log_alpha), beta))
    assert float((z > 0).double().mean()) == pytest.approx(expected, abs=4 * 0.5 / math.sqrt(len(u)))
    assert z.min() >= 0
    assert z.max() <= 1


def test_hard_concrete_gradient() -> None:
    u = torch.linspace(0.3, 0.7, 9, dtype=torch.float64)
    log_alpha = torch.linspace(-0.5, 0.5, 9, dtype=torch.float64, requires_grad=True)
    inner = hard_concrete(u, log_alpha.detach(), 2 / 3)
    keep = (inner > 0.02) & (inner < 0.98)  # away from the corners of the clamp
    assert keep.sum() >= 4
    assert torch.autograd.gradcheck(lambda a: hard_concrete(u[keep], a[keep], 2 / 3), (log_alpha,))


def test_the_constants_of_the_published_code() -> None:
    assert float(probability_nonzero(torch.tensor(0.0), 2 / 3)) == pytest.approx(
        1 / (1 + math.exp(-1.5986)), abs=1e-4
    )


@pytest.mark.parametrize("penalty", ["exact", "hard_sigmoid"])
@pytest.mark.parametrize("parametrization", ["log", "raw"])
def test_l0_penalty_step_follows_the_penalty(penalty: str, parametrization: str) -> None:
    _, _, gates = make(L0Gates, penalty=penalty, parametrization=parametrization)
    start = torch.linspace(-3.5, 3.5, len(gates.alpha))
    with torch.no_grad():
        gates.alpha.copy_(start.exp() if parametrization == "raw" else start)
    moving = torch.ones_like(gates.dead)
    with torch.no_grad():
        gates.shrink(torch.full_like(start, 0.1), moving)
    moved = (start - gates.log_alpha().detach()).double()
    a = start.double().requires_grad_()
    value = probability_nonzero(a, 2 / 3) * 4 if penalty == "exact" else F.hardtanh(a, -4, 4)
    (slope,) = torch.autograd.grad(value.sum(), a)
    torch.testing.assert_close(moved, 0.05 * 0.1 * slope, rtol=2e-3, atol=1e-6)


def test_l0_options() -> None:
    _, _, gates = make(L0Gates, beta=1.0, beta_end=0.05, steps=10, init=2.5)
    _, _, raw = make(L0Gates, parametrization="raw", init=2.5)
    torch.testing.assert_close(raw.log_alpha(), gates.log_alpha())
    assert gates.beta == 1.0
    first = gates.multipliers(training=True)
    assert torch.equal(first, gates.multipliers(training=True)), "one draw per step, alike for all consumers"
    for _ in range(5):
        gates.alpha.grad = torch.zeros_like(gates.alpha)
        gates.update(torch.zeros(len(gates.alpha)))
    assert gates.beta == pytest.approx(0.525)
    assert not torch.equal(first, gates.multipliers(training=True))
    evaluated = gates.multipliers(training=False)
    expected = (1.2 * torch.sigmoid(gates.alpha.detach()) - 0.1).clamp(0, 1)
    torch.testing.assert_close(evaluated.detach(), expected)
    assert torch.equal(gates.final(), torch.ones_like(evaluated))
    _, _, soft = make(L0Gates, binary=False)
    torch.testing.assert_close(soft.final(), soft.multipliers(training=False).detach())
    with pytest.raises(ValueError, match="parametrization must be one of log, raw; got 'exp'"):
        make(L0Gates, parametrization="exp")


def test_polarisation_pushes_away_from_one_half() -> None:
    _, _, plain = make(L0Gates)
    _, _, polar = make(L0Gates, polarize=0.9)
    half = 2 / 3 * math.log(0.1 / 1.1)  # log alpha at which P = 1/2
    for gates in (plain, polar):
        with torch.no_grad():
            gates.alpha.copy_(half + torch.linspace(-1, 1, len(gates.alpha)))
            gates.shrink(torch.full_like(gates.alpha, 0.5), torch.ones_like(gates.dead))
    difference = polar.alpha.detach() - plain.alpha.detach()
    n = len(difference)
    assert (difference[: n // 2 - 1] < 0).all()
    assert (difference[n // 2 + 1 :] > 0).all()


# ---- the others ----------------------------------------------------------------------------------------------------


def test_vib_divergence_is_the_kl_to_the_best_zero_mean_prior() -> None:
    mu = torch.tensor([0.1, 1.0, 2.0, -0.7], dtype=torch.float64)
    log_sigma2 = torch.tensor([-9.0, -1.0, 0.5, -3.0], dtype=torch.float64)
    sigma = (0.5 * log_sigma2).exp()
    prior = torch.distributions.Normal(torch.zeros(4, dtype=torch.float64), (mu**2 + sigma**2).sqrt())
    expected = torch.distributions.kl_divergence(torch.distributions.Normal(mu, sigma), prior)
    torch.testing.assert_close(kl_divergence(mu, log_sigma2), expected, rtol=1e-3, atol=1e-6)


def test_vib_penalty_step_follows_the_divergence() -> None:
    _, _, gates = make(VIBGates)
    with torch.no_grad():
        gates.mu.copy_(torch.linspace(0.2, 1.5, len(gates.mu)))
        gates.log_sigma2.copy_(torch.linspace(-6, 0, len(gates.mu)))
    mu = gates.mu.detach().double().requires_grad_()
    log_sigma2 = gates.log_sigma2.detach().double().requires_grad_()
    d_mu, d_sigma = torch.autograd.grad(kl_divergence(mu, log_sigma2).sum(), (mu, log_sigma2))
    before = gates.mu.detach().clone(), gates.log_sigma2.detach().clone()
    with torch.no_grad():
        gates.shrink(torch.full_like(gates.mu, 0.01), torch.ones_like(gates.dead))
    push = 0.05 * 0.01
    torch.testing.assert_close(
        (before[0] - gates.mu.detach()).double(), push * d_mu * mu.detach(), rtol=1e-2, atol=1e-7
    )
    torch.testing.assert_close(
        (before[1] - gates.log_sigma2.detach()).double(), 9 * push * d_sigma, rtol=1e-2, atol=1e-6
    )


def test_vib_noise_is_per_sample_and_has_the_learned_moments() -> None:
    _, graph, gates = make(VIBGates)
    with torch.no_grad():
        gates.mu.fill_(0.8)
        gates.log_sigma2.fill_(math.log(0.25))
    draws = gates.samples(4000).detach()
    assert draws.shape == (4000, graph.num_channels)
    assert float(draws.mean()) == pytest.approx(0.8, abs=0.01)
    assert float(draws.std()) == pytest.approx(0.5, abs=0.01)


def test_vib_gates_multiply_each_sample_of_the_consumers_inputs() -> None:
    net, graph, gates = make(VIBGates)
    x = toy_data(3).tensors[0]
    fixed = torch.rand(3, graph.num_channels)
    gates.samples = lambda batch: fixed
    gates.attach()
    net.train()
    found = net(x)
    gates.detach()
    a, b, c = (fixed[:, g.ids] for g in graph)
    h = F.relu(net.bn(net.conv1(x))) * a[:, :, None, None]
    h = torch.sigmoid(net.conv2(h)) * b[:, :, None, None]
    torch.testing.assert_close(found, net.fc2(F.relu(net.fc1(h.flatten(1))) * c), rtol=1e-4, atol=1e-5)


def test_taylor_is_the_squared_gradient_of_a_gate_at_one() -> None:
    net, graph, gates = make(TaylorGates)
    net.eval()
    x, y = toy_data(8).tensors
    gates.attach()
    F.cross_entropy(net(x), y).backward()
    gates.update(torch.zeros(graph.num_channels))
    gates.detach()
    values = gates.saliency()
    # central differences of the loss in the gate of one channel per group, in float64
    net = net.double()
    for group in graph:
        channel = group.start + 1
        losses = []
        for g in (1 + 1e-4, 1 - 1e-4):
            scaled = torch.ones(graph.num_channels, dtype=torch.float64)
            scaled[channel] = g
            gates.multipliers = lambda training=True, s=scaled: s
            gates._hooks._multipliers = gates.multipliers
            gates.attach()
            losses.append(float(F.cross_entropy(net(x.double()), y).detach()))
            gates.detach()
        slope = (losses[0] - losses[1]) / 2e-4
        assert float(values[channel]) == pytest.approx(slope**2, rel=1e-2, abs=1e-10)


def test_obd_sums_half_h_w_squared_over_a_channels_weights() -> None:
    net, graph, gates = make(OBDGates)
    x, y = toy_data(8).tensors
    F.cross_entropy(net(x), y).backward()
    gates.update(torch.zeros(graph.num_channels))
    group = graph["conv1"]
    weight = net.conv1.weight
    expected = (
        0.5 * ((weight.grad * weight) ** 2).flatten(1).sum(1)
        + 0.5 * (net.conv1.bias.grad * net.conv1.bias) ** 2
    )
    torch.testing.assert_close(gates.saliency()[group.ids], expected.detach())


def test_apoz_counts_what_consumers_read_as_zero() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).train()
    x = torch.randn(50, 4)
    _, graph, gates = make(APoZGates, net, x)
    gates.attach()
    net(x)
    gates.detach()
    gates.update(torch.zeros(6))
    read = (F.relu(net[0](x)) > 0).float().mean(0)
    torch.testing.assert_close(gates.saliency(), read / read.mean())
    assert graph.num_channels == 6


def test_slimming_shrinks_scales_exactly_and_needs_a_norm() -> None:
    net, graph, gates = make(SlimmingGates)
    with torch.no_grad():
        net.bn.weight.copy_(torch.linspace(-1, 1, 12))
    before = net.bn.weight.detach().clone()
    gates.update(torch.full((graph.num_channels,), 2.0))
    torch.testing.assert_close(net.bn.weight.detach(), before.sign() * (before.abs() - 0.1).clamp_min(0))
    assert gates.trainable.sum() == 12, "channels without a norm are kept"
    with pytest.raises(ValueError, match="no prunable channel passes a batch norm"):
        make(SlimmingGates, nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(2, 4))


def test_fpgm_is_the_sum_of_distances() -> None:
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    graph = trace_channels(net, torch.randn(1, 3))
    w = net[0].weight.detach().double()
    sums = np.array([sum(float((a - b).norm()) for b in w) for a in w])
    np.testing.assert_allclose(saliency("fpgm", net, graph), sums / sums.mean(), rtol=1e-9)


# ---- in a fit ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", sorted(LEARNED))
def test_every_learned_method_meets_its_budget(method: str) -> None:
    options: dict[str, Any] = (
        {"include": "net.conv1", "target": 0.6} if method == "slimming" else {"target": 0.4}
    )
    callback = ChannelPruning(method=method, warmup_epochs=1, learn_epochs=3, finetune_epochs=1, **options)
    module = toy_fit([callback])
    share = callback.report.macs_compact / callback.report.macs_dense
    assert options["target"] - 0.06 <= share <= options["target"]
    for name, child in module.named_modules():
        assert not child._forward_pre_hooks, name


@pytest.mark.parametrize("method", ["l0", "taylor", "obd"])
def test_resuming_other_methods_is_exact(method: str, tmp_path: Path) -> None:
    def pruner() -> ChannelPruning:
        return ChannelPruning(target=0.4, method=method, warmup_epochs=1, learn_epochs=2, finetune_epochs=1)

    whole, first, second = pruner(), pruner(), pruner()
    reference = toy_fit([whole], max_epochs=4)
    kept = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, filename="{epoch}", save_on_train_epoch_end=True)
    toy_fit([first, kept], max_epochs=4, enable_checkpointing=True)
    module = ToyModule()
    again = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, filename="{epoch}", save_on_train_epoch_end=True)
    fit = trainer([second, again], 4, enable_checkpointing=True)
    fit.fit(module, loader(), loader(24), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert second.plan == whole.plan
    for a, b in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", ["l1", "l0"])
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_the_penalty_reaches_the_target_at_any_scale_of_the_loss(method: str, scale: float) -> None:
    class Scaled(ToyModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return scale * F.cross_entropy(self(batch[0]), batch[1])

    callback = ChannelPruning(target=0.5, method=method, warmup_epochs=2, learn_epochs=20, finetune_epochs=0)
    open_gates: list[float] = []

    class Watch(Callback):
        def on_train_epoch_end(self, *unused: Any) -> None:
            if (learner := callback._fit.learner) is not None:
                assert callback.plan is None, "before the hard selection"
                gates = learner.gates.multipliers(training=False).detach() != 0
                open_gates.append(learner.cost.cost(gates.cpu().numpy()) / learner.cost.dense)

    torch.manual_seed(0)
    trainer([callback, Watch()], 22).fit(Scaled(), loader())
    last = callback.history[-1]
    assert last["phase"] == "learn"
    # one channel is 5 % of this network: the last one that would undercut the budget is left to the selection
    assert 0.499 <= last["macs"] / callback.report.macs_dense <= 0.56, "snapped by the penalty alone"
    assert open_gates[0] == 1
    assert open_gates[-1] <= 0.56, "gates that the penalty drove to zero, snapped or not"


def test_a_users_own_method_plugs_in_by_name() -> None:
    @learned("last_first")
    class LastFirst(Gates):
        def saliency(self) -> Tensor:
            return -torch.arange(len(self.trainable), dtype=torch.float32)

        def candidates(self) -> Tensor:
            return torch.empty(0, dtype=torch.int64)

    try:
        callback = ChannelPruning(target=0.5, method="last_first", warmup_epochs=0, learn_epochs=1)
        toy_fit([callback], max_epochs=2)
        for group, removed in callback.plan.removed.items():
            size = callback.plan.groups[group].size
            assert removed == list(range(size - len(removed), size))
    finally:
        del LEARNED["last_first"]


class Normed(nn.Module):
    """A layer norm over one group (no gate can hang there), and a plain group behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Linear(6, 16), nn.LayerNorm(16)
        self.b, self.c = nn.Linear(16, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(F.relu(self.norm(self.a(x))))))


def test_channels_without_a_gate_go_last_and_by_magnitude() -> None:
    class Module(ToyModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Normed()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.flatten(1)[:, :6])

    callback = ChannelPruning(target=0.3, warmup_epochs=0, learn_epochs=2)
    torch.manual_seed(0)
    module = Module()
    trainer([callback], 3).fit(module, loader())
    widths = callback.report.widths
    assert widths["net.b"][0] < 10
    assert widths["net.a"][0] < 16, "the gated group alone cannot pay for this target"
    assert callback.report.macs_compact <= 0.3 * callback.report.macs_dense
    assert callback.report.max_relative_error <= 1e-5
