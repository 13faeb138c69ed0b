"""Memory of the maps of training steps: never of two tensors at a time, given out again, given back on request."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_prune import ops
from lightning_prune.ops.map_memory import release_maps

pytestmark = pytest.mark.skipif(not ops.extension_available(), reason="no compiled extension")


def new_map(floats: int, fill: float) -> Tensor:
    """A map of at least so many floats, all of one value, in memory of ours."""
    size = -(-floats // 16)
    x = torch.ones(1, 16, size, 1).contiguous(memory_format=torch.channels_last)
    y = ops.masked_batch_norm_act(x, torch.zeros(16), torch.ones(16), training=False)
    assert y.is_contiguous(memory_format=torch.channels_last)
    return y.fill_(fill)


@given(
    steps=st.lists(st.tuples(st.integers(1, 1 << 21), st.integers(0, 9)), min_size=1, max_size=30),
    release=st.booleans(),
)
@settings(max_examples=20, deadline=None)
def test_no_two_maps_share_memory(steps: list[tuple[int, int]], release: bool) -> None:
    held: dict[int, Tensor] = {}
    for at, (floats, place) in enumerate(steps):
        held.pop(place, None)
        if release:
            release_maps()
        held[place] = new_map(floats, float(at))
        held[place + 10] = held[place][:, :1]  # a view holds the memory too
    values = {place: float(y.flatten()[0]) for place, y in held.items()}
    for place, y in held.items():
        assert bool((y == values[place]).all())
        assert values[place] in range(len(steps))
        assert y.untyped_storage().nbytes() >= y.numel() * 4


def test_memory_is_given_out_again_and_back() -> None:
    release_maps()
    large = 3 << 22  # of an arena of its own
    first = new_map(large, 1.0)
    place = first.data_ptr()
    kept = first[:, 3]
    del first
    assert new_map(large, 2.0).data_ptr() != place
    assert bool((kept == 1).all())
    del kept
    assert new_map(large, 3.0).data_ptr() == place
    assert mapped(place) is not False
    release_maps()
    assert mapped(place) is not True


def mapped(address: int) -> bool | None:
    """Whether an address belongs to the process, None where that is not told."""
    if sys.platform != "linux":
        return None
    ranges = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(begin, 16) <= address < int(end, 16) for begin, end in ranges)


def test_maps_come_and_go_in_several_threads() -> None:
    wrong: list[float] = []

    def work(own: int) -> None:
        maps: list[Tensor] = []
        for i in range(40):
            maps.append(new_map(20_000 + 7_000 * (i % 5), float(own)))
            if len(maps) > 4:
                wrong.extend(maps.pop(0).flatten()[[0, -1]].sub(own).abs().tolist())

    threads = [threading.Thread(target=work, args=(own,)) for own in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 4 * 36 * 2
    assert max(wrong) == 0
