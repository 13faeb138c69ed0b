"""The live rows and columns of a weight side by side, and back: what indexing gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prune import ops

OP = torch.ops.lightning_prune
pytestmark = pytest.mark.skipif(not ops.extension_available(), reason="no compiled extension")


@st.composite
def lists(draw: st.DrawFn, size: int) -> list[int] | None:
    return draw(st.none() | st.sets(st.integers(0, size - 1)).map(sorted))


@given(data=st.data(), last=st.booleans(), dtype=st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=60, deadline=None)
def test_there_and_back(data: st.DataObject, last: bool, dtype: torch.dtype) -> None:
    shape = [data.draw(st.integers(1, size)) for size in (70, 70, 3, 3)]
    rows, columns = (data.draw(lists(size)) for size in shape[:2])
    memory_format = torch.channels_last if last else torch.contiguous_format
    weight = torch.randn(shape, dtype=dtype).contiguous(memory_format=memory_format)
    r, c = (None if n is None else torch.tensor(n, dtype=torch.int64) for n in (rows, columns))
    own = [list(range(size)) if n is None else n for n, size in zip((rows, columns), shape, strict=False)]
    block = OP.live_block(weight, r, c)
    assert torch.equal(block, weight[own[0]][:, own[1]])
    whole = torch.full_like(weight, float("nan"))
    OP.spread_block(block, whole, r, c)
    expected = torch.zeros_like(weight)
    for row in own[0]:
        expected[row, own[1]] = weight[row, own[1]]
    assert torch.equal(whole, expected)


def test_errors() -> None:
    weight = torch.zeros(4, 3, 2, 2)
    with pytest.raises(RuntimeError, match=r"live_block: weight must be float32 or float64 .* got float16"):
        OP.live_block(weight.half(), None, None)
    with pytest.raises(RuntimeError, match="rows"):
        OP.live_block(weight, torch.tensor([4]), None)
    with pytest.raises(RuntimeError, match=r"block must be float32 of shape \(1, 3, 2, 2\); got"):
        OP.spread_block(weight, weight.clone(), torch.tensor([0]), None)
    with pytest.raises(RuntimeError, match="contiguous or channels_last"):
        OP.spread_block(weight, torch.zeros(4, 3, 2, 4)[..., ::2], None, None)
