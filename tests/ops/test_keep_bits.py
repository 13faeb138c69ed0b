"""Bits of many tensors in one call, against torch's ``bitwise_and_``."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prune import ops

pytestmark = pytest.mark.skipif(not ops.extension_available(), reason="no compiled extension")
OP = torch.ops.lightning_prune
INTEGERS = {
    torch.float32: torch.int32,
    torch.float64: torch.int64,
    torch.float16: torch.int16,
    torch.int8: torch.int8,
}


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_bits_are_those_of_torch(data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    tensors, keep = [], []
    for _ in range(data.draw(st.integers(1, 3))):
        dtype = data.draw(st.sampled_from(sorted(INTEGERS, key=str)))
        shape = data.draw(st.lists(st.integers(0, 4), max_size=5))
        tensor = torch.randint(-9, 9, shape, generator=generator).to(dtype)
        if len(shape) == 4 and data.draw(st.booleans()):
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        if len(shape) > 1 and data.draw(st.booleans()):
            tensor = tensor.transpose(0, 1)
        broadcast = [size if data.draw(st.booleans()) else 1 for size in tensor.shape]
        tensors.append(tensor)
        keep.append(torch.randint(-1, 2, broadcast, generator=generator).to(INTEGERS[dtype]))
    expected = [t.clone(memory_format=torch.preserve_format) for t in tensors]
    for tensor, bits in zip(expected, keep, strict=True):
        tensor.view(bits.dtype).bitwise_and_(bits)
    OP.keep_bits(tensors, keep)
    for tensor, other in zip(tensors, expected, strict=True):
        assert torch.equal(tensor.view(INTEGERS[tensor.dtype]), other.view(INTEGERS[tensor.dtype]))


def test_opcheck_and_bad_arguments() -> None:
    tensor, bits = torch.randn(3, 4), torch.tensor([[-1], [0], [-1]], dtype=torch.int32)
    torch.library.opcheck(OP.keep_bits, ([tensor], [bits]), test_utils=("test_schema", "test_faketensor"))
    with pytest.raises(RuntimeError, match=r"got 1 tensors and keep for 0"):
        OP.keep_bits([tensor], [])
    with pytest.raises(RuntimeError, match=r"keep\[0\] must broadcast.*shape \(3, 4\).*got shape \(2, 1\)"):
        OP.keep_bits([tensor], [bits[:2]])
