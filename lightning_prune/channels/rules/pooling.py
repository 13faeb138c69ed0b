"""Pooling and resampling: leading dimensions pass through, spatial ones are fixed."""

from __future__ import annotations

from ..flow import Flow
from .registry import Call, rule

_SPATIAL = {"1d": 1, "2d": 2, "3d": 3}


def _pass_leading(flow: Flow, call: Call, spatial: int) -> None:
    x = call.args[0]
    labels = flow.get(x)
    for d in range(x.dim() - spatial, x.dim()):
        flow.space.freeze(labels[d], f"{call.name} moves along this dimension")
        labels[d] = None
    for out in call.outputs():
        flow.set(out, labels)


def _register(name: str, spatial: int) -> None:
    @rule(name)
    def pooling(flow: Flow, call: Call) -> None:
        """Leading dimensions keep their labels."""
        _pass_leading(flow, call, spatial)


for _suffix, _n in _SPATIAL.items():
    for _name in (
        "max_pool{}_with_indices", "avg_pool{}", "adaptive_avg_pool{}", "_adaptive_avg_pool{}", "adaptive_max_pool{}",
        "max_pool{}", "mkldnn_max_pool{}", "reflection_pad{}", "replication_pad{}", "fractional_max_pool{}",
    ):  # fmt: skip
        _register(_name.format(_suffix), _n)
for _kind, _n in (("nearest1d", 1), ("nearest2d", 2), ("nearest3d", 3), ("_nearest_exact1d", 1), ("linear1d", 1),
                  ("bilinear2d", 2), ("bicubic2d", 2), ("trilinear3d", 3)):  # fmt: skip
    _register(f"upsample_{_kind}", _n)
    _register(f"_upsample_{_kind}_aa", _n)
_register("_upsample_nearest_exact2d", 2)
_register("_upsample_nearest_exact1d", 1)


@rule("grid_sampler_2d", "grid_sampler_3d")
def grid_sampler(flow: Flow, call: Call) -> None:
    """Channels of the sampled map pass; the grid is a set of positions."""
    flow.freeze_tensor(call.args[1], "used as sampling positions")
    _pass_leading(flow, call, call.args[0].dim() - 2)
