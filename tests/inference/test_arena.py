"""Maps that live at the same time lie apart; those that take each other's place have one middle."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prune.inference.arena import Arena


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 500), st.integers(1, 5)), min_size=1, max_size=20),
    st.sampled_from([1, 16]),
)
def test_maps_that_live_together_lie_apart(maps: list[tuple[int, int]], align: int) -> None:
    """Each map is (floats, steps that it lives)."""
    arena: Arena[int] = Arena(align)
    for step, (floats, _) in enumerate(maps):
        for earlier, (_, life) in enumerate(maps[:step]):
            if earlier + life == step:
                arena.free(earlier)
        arena.take(step, floats)
    places, size = arena.places()
    ends = [places[i] + floats for i, (floats, _) in enumerate(maps)]
    assert all(place >= 0 and place % align == 0 for place in places.values())
    assert max(ends) <= size
    for late in range(len(maps)):
        for early in range(late):
            together = early + maps[early][1] > late
            assert not together or ends[early] <= places[late] or ends[late] <= places[early]


def test_one_middle_for_all_maps_of_a_place() -> None:
    arena: Arena[str] = Arena(16)
    for name, floats in (("wide", 640), ("narrow", 128), ("medium", 320)):
        arena.take(name, floats)
        arena.free(name)
    places, size = arena.places()
    assert size == 640
    assert {places[name] + half for name, half in (("wide", 320), ("narrow", 64), ("medium", 160))} == {320}


def test_a_map_takes_the_tightest_place() -> None:
    arena: Arena[str] = Arena(16)
    for name, floats in (("large", 640), ("small", 64)):
        arena.take(name, floats)
    arena.free("large")
    arena.free("small")
    arena.free("nobody")
    arena.take("next", 64)
    places, size = arena.places()
    assert places["next"] == places["small"]
    assert size == 704
