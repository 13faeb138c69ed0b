"""Threads that share steps: every task runs once, after all of the step before, whoever comes late or not at all."""

from __future__ import annotations

import ctypes

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.test_cuda_index_emulation import compiled


def wrong(tasks: list[int], members: int, threads: int, late: int = 0, failing: int = -1) -> int:
    """Tasks that did not run exactly once and in order; where a member fails, those that ran more than once."""
    library = compiled("team_steps.cpp", "../../csrc/kernels/cpu/team.h")
    library.run_steps.argtypes = [*[ctypes.c_int64] * 2, ctypes.c_void_p, *[ctypes.c_int64] * 3]
    library.run_steps.restype = ctypes.c_int64
    numbers = (ctypes.c_int64 * len(tasks))(*tasks)
    return int(library.run_steps(members, threads, numbers, len(tasks), late, failing))


@settings(max_examples=60, deadline=None)
@given(
    tasks=st.lists(st.integers(0, 40), min_size=1, max_size=40),
    members=st.integers(1, 5),
    threads=st.integers(1, 3),
    late=st.sampled_from([0, 30, 300]),
)
def test_every_task_once_and_in_order(tasks: list[int], members: int, threads: int, late: int) -> None:
    """Fewer threads than members: they come one after the other, which is what a nested pool does."""
    assert wrong(tasks, members, min(threads, members), late) == 0


def test_many_steps() -> None:
    assert wrong([3, 1, 2, 7] * 500, 2, 2) == 0


@pytest.mark.parametrize("members", [1, 2])
def test_more_tasks_than_a_word_counts(members: int) -> None:
    assert wrong([5, 200_001, 65_535 * members, 3], members, members) == 0


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_nobody_waits_for_a_member_that_failed(failing: int) -> None:
    assert wrong([4] * 50, 3, 3, failing=failing) == 0
