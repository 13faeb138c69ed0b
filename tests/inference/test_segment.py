"""Runs of layers as one call: the same numbers as torch in float64, whatever the network, slice, threads and input."""

from __future__ import annotations

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_prune import ops, optimize_for_inference
from lightning_prune.inference import optimize
from lightning_prune.inference import segment as segment_module
from lightning_prune.inference.segment import CompactSegment
from lightning_prune.inference.symbolic import SymbolicBlueprint

pytestmark = pytest.mark.skipif(not ops.extension_available(), reason="no compiled extension")


#: of the largest output: float32 rounding of a few layers' sums, whose last ones may cancel
TOLERANCE = 5e-6


def unit(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=groups == 1)
    norm = nn.BatchNorm2d(outputs)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    nn.init.normal_(norm.running_mean)
    return [conv, norm]


class Branches(nn.Module):
    """Pool, residual sums with and without a convolution in the shortcut, depthwise, an early map that is read late."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*unit(3, 19, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.body = nn.Sequential(*unit(19, 13), nn.ReLU(), *unit(13, 19))
        self.down = nn.Sequential(
            *unit(19, 37, 1), nn.ReLU6(), *unit(37, 37, 3, 2, 37), nn.ReLU6(), *unit(37, 21, 1)
        )
        self.shortcut = nn.Sequential(*unit(19, 21, 1, 2))
        self.head = nn.Linear(21, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(self.body(x) + x)
        x = torch.relu(self.down(x) + self.shortcut(x))
        y: Tensor = self.head(x.mean((2, 3)))
        return y


def segmented(model: nn.Module, x: Tensor) -> list[nn.Module]:
    """All networks with segments, slices ascending."""
    blueprint = SymbolicBlueprint(copy.deepcopy(model.eval()), x)
    networks = optimize._segmented(blueprint, blueprint.sites, None)
    return [network.eval() for network in networks]


def segments(network: nn.Module) -> list[CompactSegment]:
    return [module for module in network.modules() if isinstance(module, CompactSegment)]


def error(network: nn.Module, model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(x.double())
        return float((network(x).double() - expected).abs().max() / expected.abs().max())


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("batch", [1, 5])
def test_equals_float64_for_every_slice(batch: int) -> None:
    model, x = Branches().eval(), torch.randn(batch, 3, 30, 34)
    found = segmented(model, x)
    slices = [[s.slice for s in segments(network)] for network in found]
    assert slices == ([[1]] if batch == 1 else [[1], [2], [5], [1, 5], [2, 5]])
    for network in found:
        for given_x in (x, x.contiguous(memory_format=torch.channels_last), torch.randn(3, 3, 30, 34)):
            assert error(network, model, given_x) < TOLERANCE
        assert network(torch.randn(0, 3, 30, 34)).shape == (0, 5)


def test_teams_of_any_size_and_number() -> None:
    """Members may come late or not at all, and several callers may lead teams at once: always the same numbers."""
    model, x = Branches().eval(), torch.randn(2, 3, 30, 34)
    network = next(n for n in segmented(model, x) if [s.slice for s in segments(n)] == [2])
    before = torch.get_num_threads()

    def calls(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)  # of the calling thread's pool
        with torch.no_grad():
            return [network(x) for _ in range(20)]

    try:
        expected = calls(1)[0]
        with ThreadPoolExecutor(2) as pool:
            for results in pool.map(calls, (2, 3)):
                assert all(torch.allclose(y, expected, rtol=1e-5, atol=1e-6) for y in results)
        assert all(torch.allclose(y, expected, rtol=1e-5, atol=1e-6) for y in calls(4))
    finally:
        torch.set_num_threads(before)
    assert error(network, model, x) < TOLERANCE


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_threads_do_not_change_the_numbers(batch: int) -> None:
    x = torch.randn(batch, 3, 24, 24)
    for network in segmented(Branches().eval(), x):
        expected = network(x)
        try:
            torch.set_num_threads(2)
            found = network(x)
        finally:
            torch.set_num_threads(1)
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["size", "double", "gradient"])
def test_what_the_program_was_not_made_for_runs_layer_by_layer(case: str) -> None:
    model, x = Branches().eval(), torch.randn(2, 3, 24, 24)
    network = segmented(model, x)[0]
    if case == "size":
        assert error(network, model, torch.randn(2, 3, 40, 28)) < TOLERANCE
    elif case == "double":
        assert network.double()(x.double()).dtype == torch.float64
        assert error(network, model, x.double()) < TOLERANCE
        assert error(network.float(), model, x) < TOLERANCE
    else:
        leaf = x.clone().requires_grad_()
        twin = x.clone().requires_grad_()
        network(leaf).square().sum().backward()
        model.requires_grad_(False)(twin).square().sum().backward()
        assert leaf.grad is not None
        assert twin.grad is not None
        assert torch.allclose(leaf.grad, twin.grad, rtol=1e-4, atol=1e-5)


def test_a_map_that_is_read_outside_ends_the_segment() -> None:
    class Tapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(*[nn.Conv2d(8, 8, 3, padding=1) for _ in range(4)])
            self.second = nn.Sequential(*[nn.Conv2d(8, 8, 1) for _ in range(3)])

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            early = self.first(x)
            return early, self.second(early)

    model, x = Tapped().eval(), torch.randn(2, 8, 9, 9)
    for network in segmented(model, x):
        with torch.no_grad():
            for mine, expected in zip(network(x), model(x), strict=True):
                assert torch.allclose(mine, expected, atol=1e-5)
        assert segments(network)


def test_an_image_for_segments_alone_is_not_converted() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*unit(3, 7, 3, 2), *unit(7, 7), *unit(7, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x) + nn.functional.avg_pool2d(x, 2)

    x = torch.randn(2, 3, 34, 38)
    for model, taken in ((Pooled().layers, "contiguous"), (Pooled(), "channels_last")):
        for network in segmented(model, x):
            assert segments(network)
            assert getattr(network, "memory_format") == taken  # noqa: B009
            assert error(network, model, x) < TOLERANCE


def test_weights_that_are_loaded_or_moved_are_used() -> None:
    model, x = Branches().eval(), torch.randn(2, 3, 24, 24)
    network = segmented(model, x)[0]
    other = segmented(Branches().eval(), x)[0]
    with torch.no_grad():
        expected = other(x)
        network.load_state_dict(other.state_dict())
        assert torch.equal(network(x), expected)
        for twin in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
            assert torch.equal(twin(x), expected)
        buffer = io.BytesIO()
        torch.save(other, buffer)
        buffer.seek(0)
        assert torch.equal(torch.load(buffer, weights_only=False)(x), expected)


def test_is_a_candidate_and_wins_where_calls_cost_more_than_work() -> None:
    model = nn.Sequential(*[m for _ in range(12) for m in (*unit(9, 9), nn.ReLU())]).eval()
    fast = optimize_for_inference(model, torch.randn(1, 9, 6, 6))
    assert segments(fast)
    assert error(fast, model, torch.randn(3, 9, 6, 6)) < 1e-5


def test_nothing_ours_in_a_network_that_must_be_the_vendors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_PRUNE_BACKEND", "vendor")
    assert not segments(optimize_for_inference(Branches().eval(), torch.randn(1, 3, 24, 24)))


@pytest.mark.parametrize("word", range(10 + 26))
def test_a_damaged_program_is_refused_or_harmless(word: int) -> None:
    network = nn.Sequential(*[nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)]).eval()
    x = torch.randn(1, 4, 8, 8)
    segment = segments(segmented(network, x)[0])[0]
    good = segment.program.clone()
    for value in (-7, 10**6, 2**58):  # 64 pixels as many floats apart: modulo 2**64 they take no room
        segment.program = good.clone()
        segment.program[word] = value
        # A large arena, a long slice; the tile, which the operator fills in.
        if (word == 8 and value == 10**6) or (word == 9 and value > 0) or word == 10 + 25:
            segment(x)
        else:
            with pytest.raises(RuntimeError, match="program|x must"):
                segment(x)
    segment.program = good[:-1].clone()
    with pytest.raises(RuntimeError, match="program is damaged"):
        segment(x)


@pytest.mark.usefixtures("level")
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    widths=st.lists(st.integers(1, 70), min_size=3, max_size=3),
    stride=st.integers(1, 2),
    size=st.tuples(st.integers(3, 11), st.integers(3, 11)),
    batch=st.integers(1, 3),
)
def test_lanes_behind_the_channels_reach_nobody(
    widths: list[int], stride: int, size: tuple[int, int], batch: int
) -> None:
    """Ragged maps have room up to a cache line; what an earlier call left there does not matter."""
    torch.manual_seed(0)
    first, inner, last = widths
    model = nn.Sequential(
        *unit(first, inner, 1), nn.ReLU6(), *unit(inner, inner, 3, stride, inner), nn.Hardswish(),
        *unit(inner, last, 1), *unit(last, last, 3, 1, last), *unit(last, first),
    ).eval()  # fmt: skip
    x = torch.randn(batch, first, *size)
    for network in segmented(model, x):
        for segment in segments(network):
            steps = segment.program[10:].view(-1, 26)
            inside, channels, apart = steps[:, 2] >= 0, steps[:, 10], steps[:, 23]
            assert bool((apart[inside] % 8 == 0).all())
            assert bool((apart[inside] < channels[inside] + 16).all())
            out = steps[:, 2] == -3
            assert bool((apart[out] == channels[out]).all())
        with torch.no_grad():
            network(torch.full_like(x, torch.nan))
        assert error(network, model, x) < TOLERANCE


def test_no_segment_of_a_mean_alone() -> None:
    """The first small map that leads to all that follows is the one before the mean."""
    model = nn.Sequential(*unit(3, 8), nn.ReLU(), *unit(8, 8), nn.AdaptiveAvgPool2d(1)).eval()
    x = torch.randn(4, 3, 12, 13)
    for network in segmented(model, x):
        assert error(network, model, x) < TOLERANCE


def test_large_and_small_maps_may_go_through_in_other_slices() -> None:
    model = nn.Sequential(
        *unit(3, 9), nn.ReLU(), *unit(9, 9, 3, 2), nn.ReLU(), *unit(9, 10, 3, 2), *unit(10, 7), *unit(7, 7)
    )
    x = torch.randn(8, 3, 40, 40)
    found = segmented(model, x)
    slices = [[s.slice for s in segments(network)] for network in found]
    assert slices == [[1], [2], [4], [8], [1, 8], [2, 8]]
    assert [len(s._names) for s in segments(found[-1])] == [3, 2]
    for network in found:
        assert error(network, model, x) < TOLERANCE


class Inverted(nn.Module):
    """Inverted residuals with and without expansion and sum, behind an ordinary convolution."""

    def __init__(self, widths: list[int], stride: int, activation: type[nn.Module]) -> None:
        super().__init__()
        first, inner, last = widths
        self.stem = nn.Sequential(*unit(3, first), nn.ReLU())
        self.plain = nn.Sequential(*unit(first, first, 3, 1, first), activation(), *unit(first, last, 1))
        self.down = nn.Sequential(
            *unit(last, inner, 1), activation(), *unit(inner, inner, 3, stride, inner), activation(),
            *unit(inner, last, 1), nn.ReLU(),
        )  # fmt: skip
        self.body = nn.Sequential(
            *unit(last, inner, 1), activation(), *unit(inner, inner, 3, 1, inner), activation(), *unit(inner, last, 1)
        )  # fmt: skip
        self.last = nn.Sequential(*unit(last, 5, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(self.plain(self.stem(x)))
        y: Tensor = self.last(self.body(x) + x)
        return y


@pytest.mark.usefixtures("level")
@settings(max_examples=7, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    widths=st.lists(st.integers(2, 70), min_size=3, max_size=3),
    stride=st.integers(1, 2),
    activation=st.sampled_from([nn.ReLU6, nn.Hardswish, nn.Identity]),
    size=st.tuples(st.integers(1, 33), st.integers(1, 33)),
    batch=st.integers(1, 3),
    threads=st.integers(1, 2),
)
def test_depth_first_is_the_same(
    widths: list[int],
    stride: int,
    activation: type[nn.Module],
    size: tuple[int, int],
    batch: int,
    threads: int,
) -> None:
    torch.manual_seed(0)
    model, x = Inverted(widths, stride, activation).eval(), torch.randn(batch, 3, *size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segment_module, "_FEW", 1)
        found = segmented(model, x)
    inside = [sum(int((s.program[10:].view(-1, 26)[:, 2] == -4).sum()) for s in segments(n)) for n in found]
    assert inside[0] == 0
    assert inside[len(found) // 2] >= 3
    try:
        torch.set_num_threads(threads)
        for network in found:
            with torch.no_grad():
                network(torch.full_like(x, torch.nan))
            assert error(network, model, x) < TOLERANCE
    finally:
        torch.set_num_threads(1)


def test_depth_first_needs_no_room_for_wide_maps() -> None:
    model = Inverted([16, 96, 16], 1, nn.ReLU6).eval()
    plain, depth_first = (segments(n)[0] for n in segmented(model, torch.randn(1, 3, 40, 40)))
    assert int(depth_first.program[8]) * 2 < int(plain.program[8])  # floats of the arena


@pytest.mark.parametrize("layer", range(8))
@pytest.mark.parametrize("what", ["in", "out", "residual", "kernel", "groups"])
def test_maps_inside_join_nothing_else(layer: int, what: str) -> None:
    model, x = Inverted([16, 24, 16], 1, nn.ReLU6).eval(), torch.randn(1, 3, 14, 14)
    segment = segments(segmented(model, x)[1])[0]
    steps = segment.program[10:].view(-1, 26)[1:9]
    assert steps[:, 2].tolist() == [-4, steps[1, 2], -4, -4, steps[4, 2], -4, -4, steps[7, 2]]
    step, joined = steps[layer], {"in": int(steps[layer, 1]) == -4, "out": int(steps[layer, 2]) == -4}
    if what in joined:
        at, apart = (1, 22) if what == "in" else (2, 23)
        step[at], step[apart] = (0, 32) if joined[what] else (-4, 0)
    elif what == "residual":
        step[3], step[24] = -4, 0
    elif what == "kernel":
        step[13] += 2
    else:
        step[21] = 2
    with pytest.raises(RuntimeError, match="program is damaged"):
        segment(x)


def test_hooks_and_dispatch_modes_see_every_layer() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model, x = Branches().eval(), torch.randn(2, 3, 24, 24)
    network = segmented(model, x)[0]
    expected = network(x)
    shapes: list[tuple[int, ...]] = []
    handle = segments(network)[0].layers.layer_2.register_forward_hook(
        lambda m, a, y: shapes.append(tuple(y.shape))
    )  # type: ignore[union-attr,operator]
    assert torch.allclose(network(x), expected, atol=1e-6)
    assert shapes == [(2, 13, 6, 6)]
    handle.remove()
    with FlopCounterMode(display=False) as counter:
        network(x)
    names = {str(op) for ops_of in counter.get_flop_counts().values() for op in ops_of}
    assert not any("segment" in name for name in names)


def test_maps_of_a_step_do_not_share_cache_sets() -> None:
    """Maps of 56x56 whole lines take a multiple of 4 KB: one behind the other they would lie in the same sets."""
    body = [layer for _ in range(3) for layer in (*unit(16, 16, 1), nn.ReLU())]
    model = nn.Sequential(*unit(3, 16), nn.ReLU(), *body, *unit(16, 16)).eval()
    found = segments(segmented(model, torch.randn(1, 3, 56, 56))[0])
    numbers = found[0].program.tolist()
    width = (len(numbers) - 10) // numbers[1]
    steps = [numbers[10 + i * width :][:4] for i in range(numbers[1])]
    apart = [given - made for _, given, made, _ in steps if given >= 0 and made >= 0]
    assert len(apart) >= 3
    assert all(floats % 1024 for floats in apart)
