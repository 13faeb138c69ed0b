"""Tracing finds what really belongs together, leaves the model alone, and says why it froze the rest."""

from __future__ import annotations

import copy

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_prune.channels import ChannelGraph, trace_channels
from lightning_prune.errors import TraceError
from tests.channels.networks import NETWORKS, Block, Detector, HardCoded, Plain, build, conv, head, image


def members(graph: ChannelGraph, group: str) -> set[tuple[str, int]]:
    return {(m.tensor, m.dim) for m in graph[group].members}


def test_a_plain_network_has_one_group_per_convolution() -> None:
    graph = trace_channels(build("Plain"), image())
    assert [(g.name, g.size) for g in graph] == [
        ("features.0.0", 8),
        ("features.1.0", 12),
        ("features.4.0", 16),
    ]
    vectors = {(f"features.0.1.{n}", 0) for n in ("weight", "bias", "running_mean", "running_var")}
    assert members(graph, "features.0.0") == {
        ("features.0.0.weight", 0),
        ("features.1.0.weight", 1),
        *vectors,
    }
    assert {m.tensor: m.role for m in graph["features.0.0"].members if m.role != "vector"} == {
        "features.0.0.weight": "out",
        "features.1.0.weight": "in",
    }
    assert graph.frozen["head.2.weight[0]"].reason == "an output of the network"
    assert "features.0.0.weight[1]" in graph.frozen


def test_a_residual_stream_is_one_group() -> None:
    graph = trace_channels(build("Residual"), image())
    assert graph["stem.0"].is_stream
    assert {("a.conv2.weight", 0), ("stem.0.weight", 0), ("b.down.weight", 1)} <= members(graph, "stem.0")
    assert {("b.conv2.weight", 0), ("c.conv2.weight", 0), ("b.down.weight", 0)} <= members(graph, "b.conv2")
    assert not graph["a.conv1"].is_stream


class Multiplied(nn.Module):
    """An inverted residual block with squeeze and excitation, inside the branch or on the stream."""

    def __init__(self, on_stream: bool, scale_first: bool, layer_scale: bool) -> None:
        super().__init__()
        self.on_stream, self.scale_first = on_stream, scale_first
        self.stem, self.expand = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 24, 1)
        width = 8 if on_stream else 24
        self.squeeze, self.excite = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)
        self.project, self.head = nn.Conv2d(24, 8, 1), nn.Conv2d(8, 5, 1)
        self.gamma = nn.Parameter(torch.ones(8, 1, 1)) if layer_scale else None

    def weighted(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return scale * x if self.scale_first else x * scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.expand(x).relu()
        y = self.weighted(self.project(y)) if self.on_stream else self.project(self.weighted(y))
        if self.gamma is not None:
            y = self.gamma * y if self.scale_first else y * self.gamma
        return self.head(x + y)


@pytest.mark.parametrize("layer_scale", [False, True])
@pytest.mark.parametrize("scale_first", [False, True])
@pytest.mark.parametrize("on_stream", [False, True])
def test_what_is_multiplied_is_no_stream(on_stream: bool, scale_first: bool, layer_scale: bool) -> None:
    graph = trace_channels(Multiplied(on_stream, scale_first, layer_scale), image())
    assert {g.name: g.is_stream for g in graph} == {"stem": True, "expand": False, "squeeze": False}
    assert ("excite.weight", 0) in members(graph, "stem" if on_stream else "expand")


def test_gated_units_and_queries_are_no_streams() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(6, 8) for _ in range(3))
            self.query, self.key, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scores = (self.query(x) @ self.key(x).transpose(1, 2)).softmax(-1)
            return self.out(scores @ (self.a(x) * self.b(x).sigmoid() + self.c(x)))

    graph = trace_channels(Gated(), torch.randn(2, 5, 6))
    assert {g.name: g.is_stream for g in graph} == {"query": False, "a": True}, "c is added to the product"


def test_flatten_gives_each_channel_its_whole_map() -> None:
    graph = trace_channels(build("FlattenLinear"), image())
    (member,) = (m for m in graph["features.1.0"].members if m.tensor == "fc1.weight")
    assert np.array_equal(member.index, np.arange(8 * 16).reshape(8, 16))


def test_concatenation_keeps_parts_separate() -> None:
    graph = trace_channels(build("Dense"), image())
    assert [g.size for g in graph] == [8, 4, 4, 4]
    columns = [m.index.ravel().tolist() for g in graph for m in g.members if m.tensor == "head.2.weight"]
    assert columns == [list(range(8)), [8, 9, 10, 11], [12, 13, 14, 15], [16, 17, 18, 19]]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_has_groups_that_partition_their_tensors(name: str) -> None:
    model = build(name)
    graph = trace_channels(model, image())
    shapes = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert len(graph) >= 1
    owned: dict[tuple[str, int], list[int]] = {}
    for group in graph:
        assert group.size >= 2
        assert any(m.role == "out" for m in group.members)
        for m in group.members:
            assert m.index.shape[0] == group.size
            owned.setdefault((m.tensor, m.dim), []).extend(m.index.ravel().tolist())
    for (tensor, dim), positions in owned.items():
        assert len(positions) == len(set(positions))
        assert set(positions) <= set(range(shapes[tensor].shape[dim]))
    assert sum(g.size for g in graph) == graph.num_channels == len(graph.group_of())
    assert [g.start for g in graph] == np.cumsum([0, *(g.size for g in graph)])[:-1].tolist()


@pytest.mark.parametrize("name", NETWORKS)
def test_the_model_is_left_as_it_was(name: str) -> None:
    model = build(name).train()
    next(iter(model.children())).eval()
    before = copy.deepcopy(model.state_dict())
    flags = [m.training for m in model.modules()]
    attributes = {n: dict(vars(m)) for n, m in model.named_modules()}
    x = image()
    state = torch.get_rng_state()
    trace_channels(model, x)
    assert torch.equal(state, torch.get_rng_state())
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert all(set(vars(m)) == set(attributes[n]) for n, m in model.named_modules())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_two_inputs_and_a_nested_output() -> None:
    inputs = {"image": image(), "depth": torch.randn(2, 1, 16, 16)}
    graph = trace_channels(Detector(), inputs)
    assert [g.name for g in graph] == ["image.0", "neck.0"]
    assert graph["image.0"].is_stream
    assert {graph.frozen[f"{n}.weight[0]"].reason for n in ("boxes", "scores")} == {
        "an output of the network"
    }
    assert members(trace_channels(Detector(), tuple(inputs.values())), "neck.0") == members(graph, "neck.0")


def test_an_output_in_an_object_freezes_what_it_shows() -> None:
    class Shows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = conv(3, 6), conv(6, 8), head(8)

        def forward(self, x: Tensor) -> dict[str, list[Tensor]]:
            x = self.a(x)
            return {"out": [self.head(self.b(x)), x]}

    graph = trace_channels(Shows(), image())
    assert [g.name for g in graph] == ["b.0"]
    assert graph.frozen["a.0.weight[0]"].reason == "an output of the network"


def test_a_failing_forward_names_module_and_shapes() -> None:
    with pytest.raises(
        TraceError, match=r"Plain\.forward failed in 'features\.0\.0'.*\(2, 4, 16, 16\) float32"
    ):
        trace_channels(Plain(), torch.randn(2, 4, 16, 16))
    with pytest.raises(TraceError, match=r"must be an nn\.Module, got function"):
        trace_channels(lambda x: x, image())  # type: ignore[arg-type]


def test_a_failing_forward_leaves_the_model_as_it_was() -> None:
    model = Plain().train()
    with pytest.raises(TraceError):
        trace_channels(model, torch.randn(2, 4, 16, 16))
    assert all(m.training for m in model.modules())
    model(image())  # no mode or hook is left behind


def test_a_hard_coded_size_is_frozen_with_its_source_line() -> None:
    graph = trace_channels(HardCoded(), image())
    assert [g.name for g in graph] == ["b.0"]
    why = graph.frozen["a.0.weight[0]"]
    assert "expected 8 channels" in why.reason
    assert "networks.py:" in why.where
    assert [g.name for g in trace_channels(HardCoded(), image(), trial=False)] == ["a.0", "b.0"]


def test_an_op_without_a_rule_freezes_what_it_touches() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = conv(3, 6), conv(6, 6), head(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.b(torch.fft.ifft(torch.fft.fft(self.a(x), dim=1), dim=1).real))

    graph = trace_channels(Odd(), image())
    assert [g.name for g in graph] == ["b.0"]
    assert "no rule" in graph.frozen["a.0.weight[0]"].reason
    assert "test_trace.py:" in graph.frozen["a.0.weight[0]"].where


def test_a_reduction_over_channels_freezes_them() -> None:
    class Maximum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = conv(3, 6), conv(1, 6), head(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.b(self.a(x).amax(1, keepdim=True)))

    graph = trace_channels(Maximum(), image())
    assert [g.name for g in graph] == ["b.0"]
    assert graph.frozen["a.0.weight[0]"].reason == "aten.amax reduces over these channels"


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Plain()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_a_lightning_module_attached_to_a_trainer_and_a_compiled_model() -> None:
    model = Module()
    model.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    names = [g.name for g in trace_channels(model, image())]
    assert names == ["net.features.0.0", "net.features.1.0", "net.features.4.0"]
    assert model.trainer is not None
    compiled = torch.compile(Plain())
    assert [g.name for g in trace_channels(compiled, image())] == [n.removeprefix("net.") for n in names]


def test_tracing_costs_a_handful_of_forward_passes() -> None:
    """Everything, trial and check included."""
    model = nn.Sequential(conv(3, 8), Block(8, 8), Block(8, 12, 2), head(12))
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    handle = nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: count() if isinstance(module, nn.Linear) else None
    )
    try:
        trace_channels(model, image())
    finally:
        handle.remove()
    assert passes <= 6


def test_the_table_names_groups_shares_and_reasons() -> None:
    text = trace_channels(build("Residual"), image()).table()
    lines = text.splitlines()
    assert " ".join(lines[0].split()) == "group channels params MACs written by read by along with"
    assert any(line.startswith("stem.0 (stream)") and " 8 " in line for line in lines)
    assert "frozen:" in lines
    assert any("head.2.weight[0]" in line and "an output of the network" in line for line in lines)


def test_unknown_group_lists_the_known_ones() -> None:
    graph = trace_channels(build("Plain"), image())
    with pytest.raises(KeyError, match=r"nowhere.*features\.0\.0"):
        graph["nowhere"]


@pytest.mark.parametrize("made_inside", [False, True])
def test_inference_mode_hides_nothing(made_inside: bool) -> None:
    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4), nn.Flatten()
        )

    model = make()
    with torch.inference_mode():
        model = make() if made_inside else model
        found = trace_channels(model, torch.randn(1, 3, 8, 8))
    assert (
        [group.size for group in found.groups]
        == [group.size for group in trace_channels(make(), torch.randn(1, 3, 8, 8)).groups]
        == [8]
    )
