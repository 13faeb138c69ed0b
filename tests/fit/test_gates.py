"""Gates against explicit arithmetic, and the learner's parts one by one."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_prune import CostModel, trace_channels
from lightning_prune.budget import RAMPS, PenaltyController, ramped_target
from lightning_prune.gates import GateHooks, L1Gates
from lightning_prune.gates.attach import _Runs
from lightning_prune.weights import WeightKeeper
from tests.fit.toys import ToyNet, toy_data


class Branches(nn.Module):
    """Concat of two producers, a residual add, a grouped convolution and a flatten; sigmoid so that f(0) != 0."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 6, 3, padding=1)
        self.b = nn.Conv2d(2, 6, 1)
        self.c = nn.Conv2d(12, 12, 1)
        self.g = nn.Conv2d(12, 8, 3, padding=1, groups=2)
        self.f = nn.Linear(8 * 4, 5)

    def parts(self, x: Tensor, m: dict[str, Tensor]) -> Tensor:
        """The same function with explicit multiplications in front of every consumer."""
        h = torch.sigmoid(torch.cat([self.a(x), self.b(x)], 1))
        stream = h + self.c(h * m["h"])
        z = F.silu(self.g(stream * m["h"]))
        return self.f((z * m["z"]).flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        one = x.new_ones(1)
        return self.parts(x, {"h": one, "z": one})


def test_gated_weights_equal_gated_activations_and_so_do_their_gradients() -> None:
    torch.manual_seed(1)
    net, x = Branches().double(), torch.randn(3, 2, 2, 2, dtype=torch.float64)
    graph = trace_channels(net, x)
    gates = torch.rand(graph.num_channels, dtype=torch.float64, requires_grad=True)
    hooks = GateHooks(net, graph, lambda training: gates)
    hooks.attach()
    gated = net(x)
    (gradient,) = torch.autograd.grad(gated.square().sum(), gates)
    hooks.detach()

    # the truth: the channel of every position, read off the graph's members of the consumers
    columns = {
        (m.tensor, i): g.start + c
        for g in graph
        for m in g.by_role("in")
        for c, row in enumerate(m.index)
        for i in row
    }
    h = torch.tensor([columns["c.weight", i] for i in range(12)])
    z = torch.tensor([columns["f.weight", 4 * i] for i in range(8)])
    explicit = net.parts(x, {"h": gates[h].view(1, -1, 1, 1), "z": gates[z].view(1, -1, 1, 1)})
    torch.testing.assert_close(gated, explicit, rtol=1e-12, atol=1e-12)
    (expected,) = torch.autograd.grad(explicit.square().sum(), gates)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(net(x), net.parts(x, {"h": torch.ones(1), "z": torch.ones(1)}))


def test_folding_is_exact() -> None:
    torch.manual_seed(2)
    net, x = Branches().double().eval(), torch.randn(3, 2, 2, 2, dtype=torch.float64)
    graph = trace_channels(net, x)
    gates = torch.rand(graph.num_channels, dtype=torch.float64)
    hooks = GateHooks(net, graph, lambda training: gates)
    hooks.attach()
    expected = net(x)
    hooks.detach()
    WeightKeeper(net, graph).fold(gates)
    torch.testing.assert_close(net(x), expected, rtol=1e-13, atol=1e-13)


def test_runs_of_gates_are_those_of_the_present_step() -> None:
    runs = _Runs({(1, 3), (4, 2), (5, 3)}, 9)
    gates = torch.randn(9, dtype=torch.float64).requires_grad_()
    for _ in range(3):  # several backward passes for one value of the gates, then another value
        for _ in range(2):
            with torch.no_grad():  # what validation reads in between has no gradient
                runs.piece(gates, (4, 2))
            pieces = runs.piece(gates, (1, 3)), runs.piece(gates, (4, 2))
            assert pieces[0] is not None
            assert pieces[1] is not None
            assert torch.equal(torch.cat(pieces), gates[1:6])
            copied = copy.deepcopy(runs)  # as hooks are copied with their module
            assert copied.piece(gates, (1, 3)) is not None
            gates.grad = None
            (pieces[0].square().sum() + 3 * pieces[1].sum() + pieces[1].prod()).backward()
            expected = torch.zeros(9, dtype=torch.float64)
            expected[1:4], expected[4:6] = 2 * gates.detach()[1:4], 3 + gates.detach()[4:6].flip(0)
            assert gates.grad is not None
            torch.testing.assert_close(gates.grad, expected)
        with torch.no_grad():
            gates.sub_(0.1 * gates.grad)
    assert runs.piece(gates, (5, 3)) is None  # shares channels with another run
    assert runs.piece(gates * 1, (1, 3)) is None


def test_a_forward_that_raises_leaves_no_gated_weight() -> None:
    net, x = ToyNet(), toy_data(2).tensors[0]
    graph = trace_channels(net, x)
    gates = torch.ones(graph.num_channels, requires_grad=True)
    hooks = GateHooks(net, graph, lambda training: gates)
    hooks.attach()
    with pytest.raises(RuntimeError):
        net.conv2(torch.zeros(1, 5, 6, 6))
    assert "weight" not in net.conv2.__dict__
    assert isinstance(net.conv2.weight, nn.Parameter)


def l1_gates(channels: int, lr: float, snap_threshold: float = 0.0) -> L1Gates:
    """Gates on the hidden channels of a two-layer network."""
    net = nn.Sequential(nn.Linear(2, channels), nn.ReLU(), nn.Linear(channels, 2))
    graph = trace_channels(net, torch.zeros(1, 2))
    return L1Gates(net, graph, torch.ones(channels, dtype=torch.bool), lr, snap_threshold)


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_proximal_step_is_the_minimiser(seed: int) -> None:
    """prox of t|b| at v minimises (b - v)^2 / 2 + t|b|: compared with a fine grid."""
    generator = torch.Generator().manual_seed(seed)
    gates = l1_gates(8, lr=0.1)
    with torch.no_grad():
        gates.values.copy_(torch.randn(8, generator=generator))
    gates.values.grad = torch.zeros(8)  # Adam does not move on a zero gradient: only the penalty acts
    before = gates.values.detach().clone()
    strength = 5 * torch.rand(8, generator=generator)
    gates.update(strength)
    grid = torch.linspace(-4, 4, 80_001, dtype=torch.float64)
    for value, start, t in zip(gates.values.detach(), before, 0.1 * strength, strict=True):
        best = grid[torch.argmin((grid - start) ** 2 / 2 + t * grid.abs())]
        assert abs(value - best) <= 1e-3


def test_what_stays_is_folded_with_at_least_a_quarter() -> None:
    gates = l1_gates(6, lr=0.1)
    gates.trainable[5] = False
    with torch.no_grad():
        gates.values.copy_(torch.tensor([0.0, -0.1, 0.6, -1.7, 0.01, 1.0]))
    gates.snap(torch.tensor([4]))
    assert torch.equal(gates.final(), torch.tensor([0.25, -0.25, 0.6, -1.7, 0.0, 1.0]))


def test_gates_reach_exact_zero_and_snapped_ones_never_move() -> None:
    gates = l1_gates(4, lr=0.1, snap_threshold=0.05)
    gates.trainable[2] = False
    target = torch.tensor([0.0, 2.0, 5.0, 0.0])
    gates.snap(torch.tensor([3]))
    for _ in range(400):
        gates.values.grad = 2 * (gates.values.detach() - target)
        gates.update(torch.full((4,), 0.5))
    assert gates.values[0] == 0
    assert gates.values[1] > 1.5
    assert gates.values[2] == 1, "not trainable"
    assert gates.values[3] == 0
    assert gates.candidates().tolist() == [0]


def test_gates_do_not_depend_on_the_scale_of_the_loss() -> None:
    ends = []
    for scale in (0.1, 1.0, 10.0):
        gates = l1_gates(6, lr=0.05)
        generator = torch.Generator().manual_seed(0)
        for _ in range(100):
            gates.values.grad = scale * (torch.randn(6, generator=generator) - torch.arange(6) / 3)
            gates.update(torch.full((6,), 0.3))
        ends.append(gates.values.detach().clone())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ends[2], ends[1], rtol=1e-3, atol=1e-3)


def test_controller_pushes_until_the_target_and_lets_go_below_it() -> None:
    controller = PenaltyController(lr=0.05)
    cost, strengths = 1.0, []
    for step in range(400):
        strength = controller.step(cost, ramped_target(0.5, step / 400))
        cost = max(0.0, cost - 0.01 * strength + 0.001)  # a plant that drifts up without a penalty
        strengths.append(strength)
    assert cost == pytest.approx(0.5, abs=0.05)
    assert min(strengths) >= 0
    again = PenaltyController(lr=0.05)
    again.load_state_dict(controller.state_dict())
    assert again.step(0.6, 0.5) == controller.step(0.6, 0.5)


def test_ramp() -> None:
    halfway = {"linear": 0.65, "cubic": 0.3 + 0.7 / 8, "exponential": math.sqrt(0.3)}
    assert set(halfway) == set(RAMPS)
    for shape, value in halfway.items():
        assert ramped_target(0.3, 0.0, shape) == 1.0
        assert ramped_target(0.3, 0.375, shape) == pytest.approx(value)
        assert ramped_target(0.3, 0.75, shape) == pytest.approx(0.3)
        assert ramped_target(0.3, 1.0, shape) == pytest.approx(0.3)


def test_weight_penalty_is_the_gradient_of_l1_and_l2() -> None:
    net, x = ToyNet(), toy_data(4).tensors[0]
    graph = trace_channels(net, x)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    names = [n for n, _ in net.named_parameters()]
    l1, l2 = 0.03, 0.2

    def gradients(penalty: bool) -> list[Tensor]:
        optimizer.zero_grad()
        loss = net(x).square().mean()
        if penalty:
            for name, p in net.named_parameters():
                if name in {"net.conv1.weight", "conv1.weight", "conv2.weight", "fc1.weight", "fc2.weight"}:
                    loss = loss + l1 * p.abs().sum() + l2 / 2 * p.square().sum()
        loss.backward()
        return [p.grad.clone() for p in net.parameters()]

    expected = gradients(True)
    gradients(False)
    WeightKeeper(net, graph).penalise(optimizer, l1, l2)
    for name, p, g in zip(names, net.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g, msg=name)


def test_cost_model_counts_what_a_smaller_network_has() -> None:
    net, x = ToyNet(), toy_data(1).tensors[0]
    graph = trace_channels(net, x)
    mask = np.ones(graph.num_channels, dtype=bool)
    rng = np.random.default_rng(0)
    for group in graph:
        mask[group.start + rng.choice(group.size, group.size // 3, replace=False)] = False
    a, b, c = (int(mask[g.ids].sum()) for g in graph)
    macs = 36 * 9 * a + 9 * 9 * a * b + 9 * b * c + 3 * c
    params = 9 * a + a + 2 * a + 9 * a * b + b + 9 * b * c + c + 3 * c + 3
    assert CostModel(graph, "macs").cost(mask) == macs
    assert CostModel(graph, "params").cost(mask) == params
    cost = CostModel(graph, "macs")
    step = np.zeros(graph.num_channels)
    for channel in (0, 15, 40):
        step[:] = mask
        step[channel] += 1e-3
        slope = (cost.cost(step) - cost.cost(mask)) / 1e-3
        assert cost.marginal(mask)[channel] == pytest.approx(slope, rel=1e-6)
