"""Label arithmetic against brute force over single elements."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prune.channels.flow import Flow
from lightning_prune.channels.labels import FIXED, LabelSpace, connected_components
from lightning_prune.channels.rules.reshape import blocks, reshape_labels


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 30), st.data())
def test_connected_components_equal_a_flood_fill(n: int, data: st.DataObject) -> None:
    edges = data.draw(st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=40))
    neighbours: dict[int, set[int]] = {i: {i} for i in range(n)}
    for a, b in edges:
        neighbours[a].add(b)
        neighbours[b].add(a)
    expected = []
    for i in range(n):
        seen, todo = {i}, [i]
        while todo:
            for j in neighbours[todo.pop()] - seen:
                seen.add(j)
                todo.append(j)
        expected.append(min(seen))
    ends = np.array(edges, np.int64).reshape(-1, 2)
    assert connected_components(n, ends[:, 0], ends[:, 1]).tolist() == expected


def test_a_long_chain_is_one_component_in_few_passes() -> None:
    order = np.random.default_rng(0).permutation(20_000)
    assert (connected_components(20_000, order[:-1], order[1:]) == 0).all()


def _factorisations(data: st.DataObject, total: int) -> list[int]:
    shape = []
    while total > 1:
        factor = data.draw(st.sampled_from([d for d in range(2, total + 1) if total % d == 0]))
        shape.append(factor)
        total //= factor
    for _ in range(data.draw(st.integers(0, 2))):
        shape.insert(data.draw(st.integers(0, len(shape))), 1)
    return shape


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([1, 2, 12, 16, 30, 36, 48]), st.data())
def test_blocks_are_the_finest_common_cut(total: int, data: st.DataObject) -> None:
    source, target = _factorisations(data, total), _factorisations(data, total)
    pairs = blocks(source, target)
    assert [d for ins, _ in pairs for d in ins] == [d for d, n in enumerate(source) if n != 1]
    assert [d for _, outs in pairs for d in outs] == [d for d, n in enumerate(target) if n != 1]
    for ins, outs in pairs:
        assert math.prod(source[d] for d in ins) == math.prod(target[d] for d in outs)
        inner = {math.prod(source[d] for d in ins[:i]) for i in range(1, len(ins))}
        assert not inner & {math.prod(target[d] for d in outs[:i]) for i in range(1, len(outs))}


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([12, 16, 24, 36]), st.data())
def test_reshaped_labels_describe_single_elements(total: int, data: st.DataObject) -> None:
    """After a view every element carries (up to unions and freezes) the label it had before."""
    source, target = _factorisations(data, total), _factorisations(data, total)
    dims = [d for d, n in enumerate(source) if n > 1]
    dim = data.draw(st.sampled_from(dims))
    flow = Flow()
    own = flow.space.new(source[dim])
    labels = [own if d == dim else None for d in range(len(source))]
    result = reshape_labels(flow, labels, source, target)
    assert sum(v is not None for v in result) <= 1
    root, frozen = flow.space.classes()
    elements = np.broadcast_to(
        own.reshape([-1 if d == dim else 1 for d in range(len(source))]), source
    ).reshape(target)
    out = next((d for d, v in enumerate(result) if v is not None), None)
    if out is None:
        assert set(np.unique(root[own]).tolist()) <= set(frozen)
        return
    vector = result[out]
    assert vector is not None
    assert len(vector) == target[out]
    predicted = np.broadcast_to(vector.reshape([-1 if d == out else 1 for d in range(len(target))]), target)
    for before, after in zip(elements.ravel(), predicted.ravel(), strict=True):
        assert root[before] == root[after] or int(root[before]) in frozen
    # whatever may be removed leaves a full box of the reshaped tensor, and exactly its own elements go
    for r in set(root[own].tolist()) - set(frozen):
        keep = root[elements] != r
        flat = keep.any(axis=tuple(d for d in range(len(target)) if d != out))
        assert (
            keep == np.broadcast_to(flat.reshape([-1 if d == out else 1 for d in range(len(target))]), target)
        ).all()


def test_a_fixed_partner_freezes_the_class_and_keeps_the_first_reason() -> None:
    space = LabelSpace()
    a, b = space.new(3), space.new(3)
    space.unite(a, np.array([b[0], FIXED, b[2]]), "first")
    space.freeze(a[1:2], "second")
    root, frozen = space.classes()
    assert root[a[0]] == root[b[0]]
    assert root[a[1]] != root[b[1]]
    assert {r: f.reason for r, f in frozen.items()} == {int(root[a[1]]): "first"}


def test_unite_all_marks_rows_that_hold_a_fixed_label() -> None:
    space = LabelSpace()
    a = space.new(4).reshape(2, 2)
    a[1, 0] = FIXED
    assert space.unite_all(a).tolist() == [2, FIXED]
    root, frozen = space.classes()
    assert root[1] == root[2]
    assert set(frozen) == {int(root[4])}


def test_labels_of_another_shape_are_refused() -> None:
    space = LabelSpace()
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        space.unite(space.new(2), space.new(3))


def test_parameter_data_is_recognised_by_its_memory() -> None:
    flow = Flow()
    weight = torch.nn.Parameter(torch.rand(3, 2))
    own = [flow.space.new(3), flow.space.new(2)]
    flow.register("w", weight, own)
    assert flow.get(weight.data)[0] is own[0]
    assert flow.get(torch.rand(3, 2)) == [None, None]
