"""The compact network equals the masked one, to rounding, and everything it was made from is left alone."""

from __future__ import annotations

import copy

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_prune.channels import ChannelGraph, trace_channels
from lightning_prune.compaction import CompactionPlan, apply_plan, compact, mask_channels
from lightning_prune.errors import CompactionError, PlanError
from tests.channels.networks import NETWORKS, Detector, HardCoded, Plain, build, image


def random_plan(graph: ChannelGraph, fraction: float = 0.4, seed: int = 1) -> CompactionPlan:
    rng = np.random.default_rng(seed)
    mask = np.ones(graph.num_channels, bool)
    for group in graph:
        gone = rng.permutation(group.size)[: max(1, int(group.size * fraction))]
        mask[group.start + gone] = False
    return CompactionPlan.from_mask(graph, mask)


def relative_error(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float(((a - b).abs().max() / a.abs().max()).detach())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NETWORKS)
def test_compact_equals_masked(name: str, seed: int) -> None:
    """Checked here with hand-masked activations' twin: the masked model's outputs, in float64 and float32."""
    model = build(name).double().eval()
    x = image().double()
    graph = trace_channels(model, x)
    plan = random_plan(graph, seed=seed)
    masked, small = mask_channels(model, x, plan), compact(model, x, plan)
    fresh = image(3).double()
    with torch.no_grad():
        assert relative_error(masked(fresh), small(fresh)) <= 1e-9
        assert relative_error(masked.float()(fresh.float()), small.float()(fresh.float())) <= 1e-5
    assert sum(p.numel() for p in small.parameters()) < 0.85 * sum(p.numel() for p in model.parameters())
    assert {n: (len(v), graph[n].size) for n, v in plan.removed.items()} == {
        n: (dense - live, dense) for n, (live, dense) in plan.widths.items()
    }


@pytest.mark.parametrize("name", ["Plain", "Residual", "Depthwise", "Grouped", "FlattenLinear", "Shuffle"])
def test_masking_is_zeroing_the_activation(name: str) -> None:
    """The masked network against one whose removed activations are zeroed by hooks: another meaning of 'removed'."""
    model = build(name).double().eval()
    x = image().double()
    graph = trace_channels(model, x)
    plan = random_plan(graph)
    hooked = copy.deepcopy(model)
    modules = dict(hooked.named_modules())
    for group in graph:
        gone = np.array(plan.groups[group.name].removed)
        for member in group.by_role("in"):
            positions = torch.from_numpy(member.index[gone].ravel())

            def zero(module: nn.Module, args: tuple[Tensor], positions: Tensor = positions) -> tuple[Tensor]:
                dim = 1 if args[0].dim() == 4 else -1
                groups = getattr(module, "groups", 1)
                per_group = args[0].shape[dim] // groups
                everywhere = torch.cat([positions + i * per_group for i in range(groups)])
                return (args[0].index_fill(dim, everywhere, 0.0),)

            modules[member.tensor.rpartition(".")[0]].register_forward_pre_hook(zero)
    with torch.no_grad():
        assert relative_error(hooked(x), mask_channels(model, x, plan)(x)) <= 1e-12


@pytest.mark.parametrize("name", NETWORKS)
def test_compacting_leaves_the_original_untouched(name: str) -> None:
    model = build(name).train()
    x = image()
    plan = random_plan(trace_channels(model, x))
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    small = compact(model, x, plan)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert all(m.training for m in model.modules())
    assert type(small) is type(model)
    assert small.training
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in small.parameters()}
    assert not shared


@pytest.mark.parametrize("name", ["Residual", "Depthwise", "Shuffle", "Tied", "WeightNorm"])
def test_a_compact_network_trains_and_copies(name: str) -> None:
    model, x = build(name), image(4)
    small = compact(model, x, random_plan(trace_channels(model, x))).train()
    twin = copy.deepcopy(small)
    optimizer = torch.optim.SGD(small.parameters(), 0.1)
    small(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())
    optimizer.step()
    assert any(not torch.equal(p, q) for p, q in zip(small.parameters(), twin.parameters(), strict=True))


def test_attributes_say_the_new_sizes() -> None:
    model, x = build("Depthwise"), image()
    graph = trace_channels(model, x)
    small = compact(model, x, random_plan(graph))
    for module in small.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
        if isinstance(module, nn.BatchNorm2d):
            assert module.num_features == module.running_mean.numel() == module.weight.numel()
        if isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)


def test_tied_tensors_stay_tied() -> None:
    model, x = build("Tied"), image()
    small = compact(model, x, random_plan(trace_channels(model, x)))
    assert small.encode.weight is small.twin.weight
    assert small.encode.out_features == small.encode.weight.shape[0] < 6


def test_every_output_of_a_detector_is_compared() -> None:
    model, inputs = Detector(), {"image": image(), "depth": torch.randn(2, 1, 16, 16)}
    plan = random_plan(trace_channels(model, inputs))
    small = compact(model, inputs, plan).eval()
    masked = mask_channels(model, inputs, plan).eval()
    a, b = masked(**inputs), small(**inputs)
    assert relative_error(a["first"].boxes, b["first"].boxes) <= 1e-5
    assert relative_error(a["first"].scores, b["first"].scores) <= 1e-5
    assert relative_error(a["all"][0], b["all"][0]) <= 1e-5


def test_a_hard_coded_size_is_an_error_that_names_the_module() -> None:
    model, x = HardCoded(), image()
    plan = random_plan(trace_channels(model, x, trial=False))
    with pytest.raises(CompactionError, match="expected 8 channels"):
        compact(model, x, plan)
    compact(model, x, random_plan(trace_channels(model, x)))


def test_a_difference_is_an_error_that_names_the_first_module() -> None:
    class Counts(nn.Module):
        """Divides by the number of channels it sees: same shapes, other values."""

        def forward(self, x: Tensor) -> Tensor:
            return x * x.shape[1]

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), Counts(), nn.Conv2d(8, 4, 3))
    plan = random_plan(trace_channels(model, image(), trial=False))
    with pytest.raises(CompactionError, match="first in module '2'") as caught:
        compact(model, image(), plan)
    assert caught.value.module == "2"
    assert len(trace_channels(model, image())) == 0


def test_a_nan_output_is_not_equal() -> None:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sqrt()

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), Root())
    plan = random_plan(trace_channels(model, image(), trial=False))
    with pytest.raises(CompactionError):
        compact(model, image(), plan)


def test_a_module_attached_to_a_trainer_is_copied_without_it() -> None:
    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Plain()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    model = Module()
    model.trainer = trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    small = compact(model, image(), random_plan(trace_channels(model, image())))
    assert small._trainer is None
    assert model.trainer is trainer


def test_memory_format_and_requires_grad_are_kept() -> None:
    model, x = build("Plain").to(memory_format=torch.channels_last), image()
    model.features[0][0].weight.requires_grad_(False)
    small = compact(model, x, random_plan(trace_channels(model, x)))
    assert small.features[1][0].weight.is_contiguous(memory_format=torch.channels_last)
    assert [p.requires_grad for p in small.parameters()] == [p.requires_grad for p in model.parameters()]


def test_a_foreign_model_is_refused() -> None:
    plan = random_plan(trace_channels(build("Plain"), image()))
    with pytest.raises(PlanError, match=r"features\.0\.0\.weight"):
        compact(build("Residual"), image(), plan)
    wider = Plain()
    wider.features[4][0] = nn.Conv2d(12, 20, 3)
    with pytest.raises(PlanError, match=r"shape \(16, 12, 3, 3\), this model has \(20, 12, 3, 3\)"):
        apply_plan(wider, plan)
    extra = Plain()
    extra.more = nn.Linear(2, 2)
    with pytest.raises(PlanError, match=r"does not know: more\.bias"):
        mask_channels(extra, None, plan)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_smaller_tensors_have_the_strides_of_fresh_ones(memory_format: torch.memory_format) -> None:
    """With one input channel, or one that is left, a weight is contiguous in both formats: strides must tell them apart."""
    net = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 5, 3, padding=1), nn.ReLU())
    net = nn.Sequential(*net, nn.Conv2d(5, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 3)).to(
        memory_format=memory_format
    )
    x = torch.randn(2, 1, 8, 8).to(memory_format=memory_format)
    graph = trace_channels(net, x)
    mask = np.ones(graph.num_channels, dtype=bool)
    for group, width in zip(graph.groups, (3, 1), strict=False):
        mask[group.ids.start + width : group.ids.stop] = False
    small = compact(net, x, CompactionPlan.from_mask(graph, mask))
    weights = [p for p in small.parameters() if p.dim() == 4]
    assert [tuple(w.shape[:2]) for w in weights] == [(3, 1), (1, 3), (4, 1)]
    for weight in weights:
        assert weight.stride() == torch.empty(weight.shape, memory_format=memory_format).stride()
    assert small[:1](x).is_contiguous(memory_format=memory_format)
