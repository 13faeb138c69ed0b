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
    # Where zeros are known to be, only the rows that live are written.
    OP.spread_block(2 * block, whole, r, c, False)
    assert torch.equal(whole, 2 * expected)


@given(data=st.data(), last=st.booleans(), dtype=st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=60, deadline=None)
def test_several_at_once_in_memory_that_is_there(data: st.DataObject, last: bool, dtype: torch.dtype) -> None:
    """Each in its own memory format; rows that do not live are left as they are."""
    shape = [data.draw(st.integers(1, size)) for size in (40, 70, 3, 3)]
    rows, columns = (data.draw(lists(size)) for size in shape[:2])
    own = [list(range(size)) if n is None else n for n, size in zip((rows, columns), shape, strict=False)]
    r, c = (None if n is None else torch.tensor(n, dtype=torch.int64) for n in (rows, columns))
    formats = [torch.channels_last if last else torch.contiguous_format, torch.contiguous_format]
    wholes = [torch.randn(shape, dtype=dtype).contiguous(memory_format=f) for f in formats]
    before = [w.clone() for w in wholes]
    blocks = [
        torch.empty(len(own[0]), len(own[1]), *shape[2:], dtype=dtype).contiguous(memory_format=f)
        for f in formats
    ]
    OP.gather_blocks(wholes, blocks, r, c)
    for whole, block in zip(wholes, blocks, strict=True):
        assert torch.equal(block, whole[own[0]][:, own[1]])
        block.neg_()
    OP.spread_blocks(blocks, wholes, r, c)
    for whole, old in zip(wholes, before, strict=True):
        expected = old.clone()
        for row in own[0]:
            expected[row] = 0
            expected[row, own[1]] = -old[row, own[1]]
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
    with pytest.raises(RuntimeError, match="gather_blocks: got 1 tensors and blocks for 0"):
        OP.gather_blocks([weight], [], None, None)
    with pytest.raises(RuntimeError, match="spread_blocks: got 1 blocks and tensors for 2"):
        OP.spread_blocks([weight], [weight, weight], None, None)
    with pytest.raises(
        RuntimeError, match=r"gather_blocks: block must be float32 of shape \(2, 3, 2, 2\); got"
    ):
        OP.gather_blocks([weight], [weight.clone()], torch.tensor([0, 3]), None)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_opcheck(memory_format: torch.memory_format) -> None:
    whole = torch.randn(6, 5, 3, 3).contiguous(memory_format=memory_format)
    rows, columns = torch.tensor([0, 4]), torch.tensor([1, 2, 3])
    block = OP.live_block(whole, rows, columns)
    for op, arguments in (
        (OP.live_block, (whole, rows, columns)),
        (OP.live_block, (whole, None, columns)),
        (OP.spread_block, (block, whole, rows, columns)),
        (OP.gather_blocks, ([whole, whole], [block.clone(), block.clone()], rows, columns)),
        (OP.spread_blocks, ([block], [whole], rows, columns)),
    ):
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_a_few_elements_tell_the_live_part_of_a_tensor() -> None:
    whole = torch.randn(20, 30, 3, 3, dtype=torch.float64)
    rows, columns = torch.tensor([3, 7, 8, 19]), torch.tensor([0, 29])
    block = OP.live_block(whole, rows, columns)
    assert OP.is_live_part(whole, block, rows, columns)
    assert not OP.is_live_part(whole, 2 * block, rows, columns)
    assert not OP.is_live_part(torch.full_like(whole, float("nan")), block, rows, columns)
    assert not OP.is_live_part(
        torch.zeros_like(whole), torch.zeros_like(block), rows, columns
    )  # tells nothing
    none = torch.empty(0, dtype=torch.int64)
    assert not OP.is_live_part(whole, whole[:0], none, None)
    nothing = torch.ones(2, 2, 0, 3)
    assert not OP.is_live_part(nothing, nothing, None, None)
