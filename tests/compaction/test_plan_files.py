"""Plans and compact checkpoints on disk: round trips, fresh processes, damaged and foreign files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_prune.channels import trace_channels
from lightning_prune.compaction import CompactionPlan, compact, load_compact, save_compact
from lightning_prune.compaction.plan import GroupRemoval, TensorSlice
from lightning_prune.errors import PlanError
from tests.channels.networks import NETWORKS, build, image
from tests.compaction.test_compaction import random_plan

names = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=8)


@st.composite
def plans(draw: st.DrawFn) -> CompactionPlan:
    tensors = draw(
        st.dictionaries(names, st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple), max_size=4)
    )
    groups = {}
    for name, size in draw(st.dictionaries(names, st.integers(2, 12), max_size=4)).items():
        groups[name] = GroupRemoval(
            size, tuple(sorted(draw(st.sets(st.integers(0, size - 1), max_size=size - 1))))
        )
    slices = []
    for name, shape in tensors.items():
        dim = draw(st.integers(0, len(shape) - 1))
        removed = draw(st.sets(st.integers(0, shape[dim] - 1), max_size=shape[dim] - 1))
        if removed:
            slices.append(TensorSlice(name, dim, shape[dim], tuple(sorted(removed))))
    return CompactionPlan(groups, tuple(slices), tensors)


@settings(max_examples=60, deadline=None)
@given(plan=plans())
def test_any_plan_survives_a_round_trip(
    tmp_path_factory: pytest.TempPathFactory, plan: CompactionPlan
) -> None:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    plan.save(path)
    assert CompactionPlan.load(path) == plan
    assert json.loads(path.read_text())["version"] == 1


def test_mask_and_plan_are_inverse() -> None:
    graph = trace_channels(build("Residual"), image())
    rng = np.random.default_rng(0)
    for _ in range(10):
        mask = rng.random(graph.num_channels) < 0.6
        for group in graph:
            mask[group.start] = True
        assert np.array_equal(CompactionPlan.from_mask(graph, mask).mask(graph), mask)


def test_a_mask_must_fit_and_leave_something() -> None:
    graph = trace_channels(build("Plain"), image())
    with pytest.raises(PlanError, match=r"shape \(36,\), got \(3,\)"):
        CompactionPlan.from_mask(graph, np.ones(3, bool))
    mask = np.ones(36, bool)
    mask[graph["features.1.0"].ids] = False
    with pytest.raises(PlanError, match=r"all 12 channels of group 'features\.1\.0'"):
        CompactionPlan.from_mask(graph, mask)
    other = trace_channels(build("Residual"), image())
    with pytest.raises(PlanError, match="no such group"):
        random_plan(graph).mask(other)


DAMAGE = {
    "truncated": lambda text: text[: len(text) // 2],
    "not json": lambda text: "channels: 3",
    "binary": lambda text: "\x00\xff",
    "foreign json": lambda text: json.dumps({"model": "resnet"}),
    "a list": lambda text: "[1, 2]",
    "another version": lambda text: text.replace('"version": 1', '"version": 99'),
    "missing part": lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "slices"}),
    "wrong type": lambda text: text.replace('"size": 8', '"size": "many"'),
    "out of range": lambda text: text.replace('"size": 8', '"size": 1'),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_plan_files_are_refused_and_left_alone(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "plan.json"
    random_plan(trace_channels(build("Plain"), image())).save(path)
    damaged = DAMAGE[kind](path.read_text())
    assert damaged != path.read_text()
    path.write_text(damaged)
    with pytest.raises(PlanError, match=r"plan\.json"):
        CompactionPlan.load(path)
    assert path.read_text() == damaged
    assert list(tmp_path.iterdir()) == [path]


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"no plan file at .*nothing\.json"):
        CompactionPlan.load(tmp_path / "nothing.json")
    with pytest.raises(PlanError, match=r"no compact checkpoint at .*nothing"):
        load_compact(build("Plain"), tmp_path / "nothing")


def test_a_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    plan = random_plan(trace_channels(build("Plain"), image()))
    plan.save(path)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        random_plan(trace_channels(build("Plain"), image()), seed=5).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_compact_checkpoint_round_trip(tmp_path: Path, name: str) -> None:
    model, x = build(name), image()
    plan = random_plan(trace_channels(model, x))
    small = compact(model, x, plan).eval()
    save_compact(small, plan, tmp_path / "small")
    loaded = load_compact(NETWORKS[name], tmp_path / "small")
    with torch.no_grad():
        assert torch.equal(loaded(x), small(x))
    assert not loaded.training


def test_a_compact_checkpoint_loads_in_a_fresh_process(tmp_path: Path) -> None:
    model, x = build("Residual"), image()
    plan = random_plan(trace_channels(model, x))
    small = compact(model, x, plan).eval()
    save_compact(small, plan, tmp_path / "small")
    torch.save({"x": x, "y": small(x).detach()}, tmp_path / "data.pt")
    script = (
        "import sys, torch\n"
        "from lightning_prune.compaction import load_compact\n"
        "from tests.channels.networks import Residual\n"
        "data = torch.load(sys.argv[2], weights_only=True)\n"
        "model = load_compact(Residual(), sys.argv[1])\n"
        "assert torch.equal(model(data['x']), data['y'])\n"
        "print(sum(p.numel() for p in model.parameters()))\n"
    )
    arguments = [sys.executable, "-c", script, str(tmp_path / "small"), str(tmp_path / "data.pt")]
    done = subprocess.run(
        arguments, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2], check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == sum(p.numel() for p in small.parameters())


def test_foreign_checkpoints_are_refused(tmp_path: Path) -> None:
    import safetensors.torch

    model, x = build("Plain"), image()
    plan = random_plan(trace_channels(model, x))
    small = compact(model, x, plan)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(PlanError, match="not a readable compact checkpoint"):
        load_compact(model, tmp_path / "text")
    safetensors.torch.save_file({"a": torch.zeros(2)}, tmp_path / "plain")
    with pytest.raises(PlanError, match="without a compaction plan"):
        load_compact(model, tmp_path / "plain")
    save_compact(small, plan, tmp_path / "small")
    with pytest.raises(PlanError, match="the plan was made for"):
        load_compact(build("Residual"), tmp_path / "small")
    save_compact(nn.Linear(2, 2), plan, tmp_path / "mixed")
    with pytest.raises(PlanError, match="does not fit Plain"):
        load_compact(model, tmp_path / "mixed")
    (tmp_path / "small").write_bytes((tmp_path / "small").read_bytes()[:-40])
    with pytest.raises(PlanError, match="not a readable compact checkpoint"):
        load_compact(model, tmp_path / "small")
