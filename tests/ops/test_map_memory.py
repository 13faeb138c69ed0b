"""Memory of the maps of training steps: never of two tensors at a time, given out again, bounded, given back on request."""

from __future__ import annotations

import ctypes
import gc
import itertools
import mmap
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_prune import ops
from lightning_prune.ops.map_memory import map_memory, release_maps

pytestmark = pytest.mark.skipif(not ops.extension_available(), reason="no compiled extension")
linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is kept on Linux only")

PAGE, SMALL = 2 << 20, mmap.PAGESIZE
LEAST = 1 << 14  # floats of the smallest map that lies in kept memory


@pytest.fixture(autouse=True)
def nothing_else() -> None:
    gc.collect()
    release_maps()
    assert map_memory().blocks == 0, "another test holds maps"


def new_map(floats: int, fill: float) -> Tensor:
    """A map of at least so many floats, all of one value, in memory of ours."""
    size = -(-floats // 16)
    x = torch.ones(1, 16, size, 1).contiguous(memory_format=torch.channels_last)
    y = ops.masked_batch_norm_act(x, torch.zeros(16), torch.ones(16), training=False)
    assert y.is_contiguous(memory_format=torch.channels_last)
    return y.fill_(fill)


def empty(floats: int) -> Tensor:
    """Likewise, without touching the memory."""
    y: Tensor = torch.ops.lightning_prune.empty_map(torch.empty(1, 1, 1, 1), [1, 1, 1, floats])
    return y


def demand(y: Tensor) -> int:
    """Bytes that the memory of a map takes: whole cache lines, and nine more so that neighbours begin at other places."""
    return (-(-y.numel() // 16) + 9) * 64


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


def test_a_map_larger_than_all_addresses_is_refused() -> None:
    """Its bytes modulo 2**64 are 160 KB."""
    side = 2**61 + 201
    with pytest.raises(RuntimeError, match=rf"no memory for a map of shape \(1, 1, {side}, {side}\)"):
        torch.ops.lightning_prune.empty_map(torch.empty(1, 1, 1, 1), [1, 1, side, side])


@linux
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["new", "new", "drop", "release"]),
            st.integers(LEAST, 12 << 20),
            st.integers(0, 99),
        ),
        max_size=60,
    )
)
@settings(max_examples=60, deadline=None)
def test_live_blocks_are_apart_and_counted(steps: list[tuple[str, int, int]]) -> None:
    release_maps()
    held: list[Tensor] = []
    peak, returning = 0, True
    for kind, floats, place in steps:
        if kind == "new":
            held.append(empty(floats))
        elif kind == "drop" and held:
            held.pop(place % len(held))
        elif kind == "release":
            release_maps()
        live = sum(map(demand, held))
        returning = kind != "new" and (returning or kind == "release")
        peak = live if returning else max(peak, live)
        state = map_memory()
        assert (state.live, state.blocks, state.peak) == (live, len(held), peak)
        assert live <= state.kept <= max(1.25 * peak + 16 * PAGE, live + 2 * PAGE * len(held))
        ranges = sorted((y.data_ptr(), y.data_ptr() + demand(y)) for y in held)
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(ranges))
        assert all(begin % 64 == 0 for begin, _ in ranges)


@linux
@pytest.mark.parametrize("pinned", [0, 12])
def test_random_sizes_do_not_add_up(pinned: int) -> None:
    """Hundreds of steps with other batch and image sizes each, some of whose maps are held for long."""
    generator = random.Random(pinned)
    pins: list[Tensor] = []
    live = peak = most = 0

    def count(change: int) -> None:
        nonlocal live, peak, most
        live += change
        peak = max(peak, live)
        state = map_memory()
        assert (state.live, state.peak) == (live, peak)
        assert state.kept <= max(1.25 * peak + 16 * PAGE, live + 2 * PAGE * state.blocks)
        most = max(most, state.kept)

    for _ in range(300):
        pixels = generator.randint(8, 128) * generator.randint(16, 48) ** 2
        outputs = []
        for depth in range(12):
            outputs.append(empty(max(LEAST, (16 << depth // 4) * pixels >> 2 * (depth // 4))))
            count(demand(outputs[-1]))
        if len(pins) < pinned:
            pins.append(outputs.pop(generator.randrange(12)))
        elif pins:
            freed = demand(pin := pins.pop(generator.randrange(pinned)))
            del pin
            count(-freed)
        while outputs:
            gradient = empty(outputs[-1].numel())
            count(demand(gradient))
            freed = demand(gradient) + demand(outputs.pop())
            del gradient
            count(-freed)
    assert most > peak / 2
    pins.clear()
    release_maps()
    assert map_memory() == (0, 0, 0, 0)


@linux
def test_what_is_kept_is_what_is_resident() -> None:
    """Every second of many maps goes, then larger ones come, which do not fit between the others."""
    maps = [new_map(3 << 18, float(i)) for i in range(60)]
    places = [(y.data_ptr(), y.numel() * 4) for y in maps]
    assert sum(resident(*place) for place in places) == 60 * (3 << 20)
    held = maps[::2]
    del maps
    larger = [new_map(1 << 20, 100.0 + i) for i in range(30)]
    state = map_memory()
    assert state.kept <= 1.25 * state.peak + 16 * PAGE < 60 * (3 << 20) + 30 * (4 << 20)
    places += [(y.data_ptr(), y.numel() * 4) for y in larger]
    assert len(set.union(*(pages(*place) for place in places))) * SMALL <= state.kept
    for i, y in enumerate(held):
        assert bool((y == 2 * i).all())
    for i, y in enumerate(larger):
        assert bool((y == 100 + i).all())


@linux
def test_memory_is_given_out_again_and_back() -> None:
    large = 3 << 22
    first = new_map(large, 1.0)
    place = first.data_ptr()
    kept = first[:, 3]
    del first
    assert new_map(large, 2.0).data_ptr() != place
    assert bool((kept == 1).all())
    del kept
    assert new_map(large, 3.0).data_ptr() == place
    assert resident(place, 4 * large) == 4 * large
    release_maps()
    assert resident(place, 4 * large) == 0


@linux
def test_a_tensor_that_outlives_the_release_gives_its_memory_back_at_once() -> None:
    outlives, other = new_map(1 << 20, 1.0), new_map(1 << 20, 2.0)
    places = outlives.data_ptr(), other.data_ptr()
    release_maps()
    del other
    assert resident(places[1] + PAGE, PAGE) == 0  # the huge page before holds the end of the other
    assert bool((outlives == 1).all())
    del outlives
    assert resident(places[0], PAGE) == 0
    assert map_memory() == (0, 0, 0, 0)


def pages(address: int, size: int) -> set[int]:
    """The small pages that lie wholly in a range and have memory behind them, told by the system."""
    first, last = -(-address // SMALL), (address + size) // SMALL
    with Path("/proc/self/pagemap").open("rb") as pagemap:
        pagemap.seek(first * 8)
        entries = pagemap.read((last - first) * 8)
    return {first + i for i, entry in enumerate(entries[7::8]) if entry >> 7}


def resident(address: int, size: int) -> int:
    """Bytes of a range that have memory behind them; the first and the last page count if all others do."""
    present = len(pages(address, size))
    return size if present == (address + size) // SMALL - -(-address // SMALL) else present * SMALL


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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_memory_of_its_own() -> None:
    """As a worker of a data loader: tensors of the parent go there, others come and are written to, all is given back."""
    maps = [new_map(1 << 19, float(i)) for i in range(8)]
    before = map_memory()
    child = os.fork()
    if child == 0:
        state = 1
        try:
            right = maps[5].data_ptr()
            del maps[::2]
            for _ in range(3):
                y = empty(3 << 18)
                ctypes.memset(y.data_ptr(), 0xFF, y.numel() * 4)
            release_maps()
            del y
            state = int(ctypes.c_float.from_address(right).value != 5.0)
        finally:
            os._exit(state)
    assert os.waitpid(child, 0)[1] == 0
    assert map_memory() == before
    for i, y in enumerate(maps):
        assert bool((y == i).all())


SCRIPT = """
import ctypes, resource
from pathlib import Path
import torch
from lightning_prune import ops
from lightning_prune.ops.map_memory import map_memory, release_maps

torch.set_num_threads(1)
{before}
x = torch.randn(1, 16, 1 << 19, 1).contiguous(memory_format=torch.channels_last)
shift, scale = torch.randn(16), torch.ones(16)
{limit}
y = ops.masked_batch_norm_act(x, shift, scale, training=False)
print(map_memory().blocks, map_memory().kept > 0)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_AS)[1]))
expected = (x - shift.view(1, -1, 1, 1)) / (1 + 1e-5) ** 0.5
assert float((y - expected).abs().max()) < 1e-5
release_maps()
assert y.is_contiguous(memory_format=torch.channels_last)
del y
assert map_memory() == (0, 0, 0, 0)
"""
NO_HUGE_PAGES = "assert ctypes.CDLL(None).prctl(41, 1, 0, 0, 0) == 0  # PR_SET_THP_DISABLE"
NO_ADDRESSES = """
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
hard = resource.getrlimit(resource.RLIMIT_AS)[1]
resource.setrlimit(resource.RLIMIT_AS, (size + x.numel() * 4 + (1 << 20), hard))
"""


@linux
@pytest.mark.parametrize(
    ("before", "limit", "expected"),
    [(NO_HUGE_PAGES, "", "1 True"), ("", NO_ADDRESSES, "0 False")],
    ids=["huge pages are off", "no addresses are left"],
)
def test_where_the_system_refuses_maps_lie_in_plain_memory(before: str, limit: str, expected: str) -> None:
    script = SCRIPT.format(before=before, limit=limit)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == expected
