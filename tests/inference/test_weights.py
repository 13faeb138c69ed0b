"""A segment's weights lie in one tensor; whoever changes, exchanges, copies or saves them sees ordinary modules."""

from __future__ import annotations

import copy
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import ops
from lightning_prune.inference import weights as weights_file
from lightning_prune.inference.weights import GatheredWeights
from lightning_prune.nn import CompactConv2d
from tests.inference.test_segment import Branches, segmented, segments, unit

pytestmark = pytest.mark.skipif(not ops.extension_available(), reason="no compiled extension")


def network() -> tuple[nn.Module, Tensor]:
    x = torch.randn(1, 3, 24, 24)
    return segmented(Branches().eval(), x)[0], x


def layer_by_layer(model: nn.Module, x: Tensor) -> Tensor:
    """What the modules compute now."""
    twin = copy.deepcopy(model)
    for segment in segments(twin):
        segment.shape = (0, 0, 0)
    with torch.no_grad():
        y: Tensor = twin(x)
    return y


def convolutions(model: nn.Module) -> list[CompactConv2d]:
    return [module for module in model.modules() if isinstance(module, CompactConv2d)]


@torch.no_grad()
def test_one_tensor_that_begins_every_weight_on_a_cache_line() -> None:
    model, x = network()
    before = [module.packed.clone() for module in convolutions(model)]
    model(x)
    found = convolutions(model)
    assert all(torch.equal(module.packed, packed) for module, packed in zip(found, before, strict=True))
    assert len({module.packed.untyped_storage().data_ptr() for module in found}) == 1
    assert all(module.packed.data_ptr() % 64 == 0 for module in found)
    assert not any(module.packed.is_inference() for module in found)


@pytest.mark.parametrize("how", ["in place", "buffer", "module", "state", "called with others"])
@torch.no_grad()
def test_changed_weights_are_used(how: str) -> None:
    model, x = network()
    before = model(x)
    segment = segments(model)[0]
    conv = convolutions(segment)[1]
    assert conv.bias is not None
    if how == "in place":
        conv.bias.add_(1)
    elif how == "buffer":
        conv._buffers["bias"] = conv.bias + 1
    elif how == "module":
        other = copy.deepcopy(conv)
        other.bias += 1
        name = next(name for name, module in segment.layers.named_children() if module is conv)
        setattr(segment.layers, name, other)
    elif how == "state":
        state = model.state_dict()
        name = next(name for name, module in model.named_modules() if module is conv)
        state[f"{name}.bias"] = conv.bias + 1
        model.load_state_dict(state)
    else:
        name = next(name for name, module in model.named_modules() if module is conv)
        others = {f"{name}.bias": conv.bias + 1}
        changed = torch.func.functional_call(model, others, (x,))
        assert torch.equal(model(x), before)
        conv.bias.add_(1)
        assert torch.allclose(changed, layer_by_layer(model, x), atol=1e-5)
    after = model(x)
    assert not torch.allclose(after, before, atol=1e-3)
    assert torch.allclose(after, layer_by_layer(model, x), atol=1e-5)


@torch.no_grad()
def test_saved_and_copied_weights_are_not_larger_than_they_were() -> None:
    model, x = network()
    size, twin = len(pickle.dumps(model)), copy.deepcopy(model)
    expected = model(x)
    assert len(pickle.dumps(model)) == size
    assert all(
        t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in model.state_dict().values()
    )
    one = copy.deepcopy(convolutions(model)[0])
    assert one.packed.untyped_storage().nbytes() == one.packed.numel() * 4
    for conv in convolutions(model):
        conv.packed.zero_()
    assert torch.equal(twin(x), expected)


@torch.no_grad()
def test_segments_of_the_same_layers_share_them() -> None:
    """Candidates are made of the same modules: none takes the weights away from another."""
    x = torch.randn(8, 3, 40, 40)
    body = [*unit(3, 9), nn.ReLU(), *unit(9, 9, 3, 2), *unit(9, 10, 3, 2), *unit(10, 7), *unit(7, 7)]
    candidates = segmented(nn.Sequential(*body).eval(), x)
    whole, cut = candidates[0], candidates[-1]
    assert len(segments(cut)) == 2
    expected = cut(x)
    assert torch.allclose(whole(x), expected, atol=1e-5)
    assert torch.equal(cut(x), expected)
    held = [segment._weights for segment in (*segments(whole), *segments(cut))]
    assert len({weights.values.data_ptr() for weights in held if weights is not None}) == 1
    again = [
        segment._weights
        for segment in (*segments(whole), *segments(cut))
        if whole(x) is not None and cut(x) is not None
    ]
    assert all(a is b for a, b in zip(held, again, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("how", ["packed here", "copied", "saved"])
def test_large_weights_lie_in_huge_pages(how: str) -> None:
    if not weights_file._PAGES.wanted(1 << 30):
        pytest.skip("no huge pages on request")
    x = torch.randn(1, 256, 8, 8)
    model = segmented(
        nn.Sequential(*unit(256, 256), nn.ReLU(), *unit(256, 256), nn.ReLU(), *unit(256, 8)).eval(), x
    )[0]
    expected = model(x)
    if how == "copied":
        model = copy.deepcopy(model)
    elif how == "saved":
        model = pickle.loads(pickle.dumps(model))
    assert torch.equal(model(x), expected)
    (weights,) = [segment._weights for segment in segments(model)]
    assert weights is not None
    begin = weights.values.data_ptr()
    assert begin % (2 << 20) == 0
    assert len({m.packed.untyped_storage().data_ptr() for m in convolutions(model)} | {begin}) == 1
    assert "hg" in mapping_flags(begin)
    assert torch.equal(model(x), expected)
    assert segments(model)[0]._weights is weights


def mapping_flags(address: int) -> list[str]:
    """What the system was told about the memory there (VmFlags; hg: advised to use huge pages)."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []


def test_two_first_calls_at_once() -> None:
    for _ in range(10):
        model, x = network()
        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(lambda _: model(x).detach(), range(4)))  # noqa: B023
        assert all(torch.equal(y, results[0]) for y in results)


def test_a_layer_that_stands_twice() -> None:
    conv = CompactConv2d.from_conv(nn.Conv2d(4, 4, 1))
    modules: dict[str, nn.Module | None] = {
        "a": conv,
        "b": CompactConv2d.from_conv(nn.Conv2d(4, 4, 1, bias=False)),
        "c": conv,
    }
    weights = GatheredWeights(modules, ["a", "b", "c"])
    assert weights.current()
    assert torch.equal(weights.places[:2], weights.places[4:])
    assert weights.places[3].tolist() == [0, 0]
    begin, size = weights.places[0].tolist()
    assert torch.equal(weights.values[begin : begin + size], conv.packed)
    modules["c"] = CompactConv2d.from_conv(nn.Conv2d(4, 4, 1))
    assert not weights.current()


@pytest.mark.parametrize("places", [[0, 10**6], [-1, 3], [3, -1], [2**62, 2**62], [10**6, 0]])
def test_places_outside_of_the_weights_are_refused(places: list[int]) -> None:
    model, x = network()
    segment = segments(model)[0]
    segment(x)
    weights = segment._weights
    assert weights is not None
    weights.places[2] = torch.tensor(places)
    with pytest.raises(RuntimeError, match="must lie in the"):
        segment(x)
    weights.places = weights.places.flatten()
    with pytest.raises(RuntimeError, match="places must be"):
        segment(x)
