"""A global mean and the dense layer behind it inside a segment: as torch in float64, however they are written."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from lightning_prune import ops
from tests.inference.test_segment import error, segmented, segments, unit

pytestmark = pytest.mark.skipif(not ops.extension_available(), reason="no compiled extension")

Head = Callable[[Tensor], Tensor]


class Classifier(nn.Module):
    """Three convolutions, a mean over the map, a dense layer."""

    def __init__(self, width: int, classes: int, mean: Head, bias: bool = True) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *unit(3, 9, 3, 2), nn.ReLU(), *unit(9, 9), nn.ReLU(), *unit(9, width, 1), nn.ReLU()
        )
        self.mean, self.dropout = mean, nn.Dropout(0.5)
        self.classes = nn.Linear(width, classes, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.classes(self.dropout(self.mean(self.body(x))))
        return y


INSIDE: dict[str, Head] = {
    "modules": nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten()),
    "functions": lambda x: torch.flatten(F.adaptive_avg_pool2d(x, 1), 1),
    "methods": lambda x: F.adaptive_avg_pool2d(x, (1, 1)).flatten(start_dim=1),
    "mean": lambda x: x.mean((2, 3)),
    "mean, dimensions kept": lambda x: torch.mean(x, dim=[-1, -2], keepdim=True).flatten(1),
}
OUTSIDE: dict[str, Head] = {
    "mean over rows": lambda x: x.mean(2).mean(2),
    "two columns": lambda x: F.adaptive_avg_pool2d(x, (1, 2)).flatten(1)[:, ::2],
    "other type": lambda x: x.mean((2, 3), dtype=torch.float64).to(x.dtype),
    "mean over channels": lambda x: x.mean((1, 2))[:, :1].expand(-1, 13),
    "maximum": lambda x: F.adaptive_max_pool2d(x, 1).flatten(1),
}


def layers(network: nn.Module) -> int:
    """Layers in segments."""
    return sum(int(segment.program[1]) for segment in segments(network))


def outside(network: nn.Module) -> list[str]:
    """Modules that are called between segments."""
    inner = getattr(network, "network")  # noqa: B009
    assert isinstance(inner, fx.GraphModule)
    names = [str(n.target) for n in inner.graph.nodes if n.op == "call_module"]
    return [name for name in names if not name.startswith("segment")]


@pytest.mark.parametrize("how", INSIDE)
@pytest.mark.parametrize("bias", [True, False])
def test_head_is_in_the_segment(how: str, bias: bool) -> None:
    model, x = Classifier(13, 21, INSIDE[how], bias).eval(), torch.randn(1, 3, 20, 22)
    for network in segmented(model, x):
        assert layers(network) == 5
        assert not outside(network)
        for given_x in (
            x,
            torch.randn(3, 3, 20, 22),
            torch.randn(2, 3, 31, 18),
        ):  # the last one layer by layer
            assert error(network, model, given_x) < 2e-6
        assert network(torch.randn(0, 3, 20, 22)).shape == (0, 21)


@pytest.mark.parametrize("how", OUTSIDE)
def test_what_is_no_mean_over_the_map_stays_outside(how: str) -> None:
    model, x = Classifier(13, 21, OUTSIDE[how]).eval(), torch.randn(1, 3, 20, 22)
    for network in segmented(model, x):
        assert layers(network) == 3
        assert outside(network) == ["classes"]
        assert error(network, model, x) < 2e-6


def test_a_head_with_a_hook_stays_outside() -> None:
    model, x = Classifier(13, 21, INSIDE["functions"]).eval(), torch.randn(1, 3, 20, 22)
    model.classes.register_forward_hook(lambda module, args, output: output + 1)
    for network in segmented(model, x):
        assert layers(network) == 3
        assert error(network, model, x) < 2e-6


def test_many_images_share_the_weights_of_the_head_outside() -> None:
    model, x = Classifier(13, 21, INSIDE["functions"]).eval(), torch.randn(4, 3, 20, 22)
    for network in segmented(model, x):
        assert outside(network) == ["classes"]


def test_a_map_that_somebody_else_reads() -> None:
    class Two(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            pooled = F.adaptive_avg_pool2d(self.body(x), 1).flatten(1)
            y: Tensor = self.classes(pooled) + pooled.sum(1, keepdim=True)
            return y

    model, x = Two(13, 21, nn.Identity()).eval(), torch.randn(1, 3, 20, 22)
    for network in segmented(model, x):
        assert outside(network) == ["classes"]
        assert error(network, model, x) < 2e-6


def test_the_original_keeps_its_weights() -> None:
    model, x = Classifier(13, 21, INSIDE["modules"]).eval(), torch.randn(1, 3, 20, 22)
    network, twin = segmented(model, x)[0], copy.deepcopy(model)
    with torch.no_grad():
        expected = network(x)
        model.classes.weight.zero_()
        assert torch.equal(network(x), expected)
        assert torch.equal(copy.deepcopy(network)(x), expected)
    assert error(network, twin, x) < 2e-6


@settings(max_examples=25, deadline=None)
@given(
    width=st.integers(1, 150),
    classes=st.integers(1, 200),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    batch=st.integers(1, 3),
    threads=st.integers(1, 2),
)
def test_any_size(width: int, classes: int, size: tuple[int, int], batch: int, threads: int) -> None:
    model, x = Classifier(width, classes, INSIDE["mean"]).eval(), torch.randn(1, 3, *size)
    try:
        torch.set_num_threads(threads)
        for network in segmented(model, x):
            assert layers(network) == 5
            with torch.no_grad():
                network(torch.full_like(x, torch.nan))
            images = torch.randn(batch, 3, *size)
            with torch.no_grad():
                exact = copy.deepcopy(model).double()(images.double())
                # not relative: a few classes may all be close to zero
                assert float((network(images).double() - exact).abs().max()) < 1e-6 * max(
                    1.0, float(exact.abs().max())
                )
    finally:
        torch.set_num_threads(1)
