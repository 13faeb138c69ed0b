"""Real fits in miniature: the shared warmup changes nothing, every method runs, compute is counted right."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from lightning_prune.compaction import CompactionPlan
from lightning_prune.errors import BudgetError
from lightning_prune.experiments import Setting, Trial, run_trial
from lightning_prune.experiments.runner import Fit, check_trial, pruning_callback, seed_data, shared_warmup
from lightning_prune.experiments.settings import article_settings, cluttered_digits
from lightning_prune.profiling import profile

pytest.importorskip("sklearn")

DATA = functools.partial(cluttered_digits, samples=192, canvas=16, batch_size=32)


def settings() -> dict[str, Setting]:
    return article_settings(
        DATA, {"samples": 192}, (6, 6, 8, 8, 12), epochs=(2, 1, 2), lr=5e-3, l1=1e-5, l2=1e-4
    )


@pytest.mark.parametrize("method", ["l1", "l0", "magnitude", "magnitude_one_shot"])
def test_a_fit_from_the_shared_warmup_equals_the_uninterrupted_one(tmp_path: Path, method: str) -> None:
    """Dropout, order of batches, optimizer, schedule, gates: every weight is the same, bit by bit."""
    setting, trial = settings()["article"], Trial("article", method, 0.4, 1)
    data = seed_data(setting.make_data, trial.seed)
    models = []
    for warmup in (None, shared_warmup(setting, trial, data, tmp_path)):
        fit = Fit(setting, trial, data, warmup)
        module, pruning = fit.module(), pruning_callback(setting, trial, data)
        fit.train(module, [pruning])
        assert pruning.compact_model is not None
        assert len(pruning.history) == setting.total_epochs - (0 if warmup is None else setting.epochs[0])
        models.append(pruning.compact_model)
    assert list(tmp_path.iterdir()) == [shared_warmup(setting, trial, data, tmp_path)]
    uninterrupted, resumed = (model.state_dict() for model in models)
    assert uninterrupted.keys() == resumed.keys()
    assert all(torch.equal(uninterrupted[name], resumed[name]) for name in uninterrupted)


def test_warmups_of_other_seeds_settings_and_losses_are_others(tmp_path: Path) -> None:
    both = settings()
    trials = [
        Trial("article", "l1", 0.5, 0),
        Trial("article", "l1", 0.5, 1),
        Trial("article", "l1", 0.5, 0, 10.0),
    ]
    paths = {shared_warmup(both["article"], t, seed_data(DATA, t.seed), tmp_path) for t in trials}
    paths.add(shared_warmup(both["article+bn"], trials[0], seed_data(DATA, 0), tmp_path))
    assert len(paths) == 4


def test_baselines_and_equal_compute(tmp_path: Path) -> None:
    setting = settings()["article"]
    trial = Trial("article", "l1", 0.3, 0)
    pruned = run_trial(setting, trial, tmp_path)
    dense = run_trial(setting, Trial("article", "dense", 1.0, 0), tmp_path)
    warmup, learn, finetune = setting.epochs
    assert dense.macs == dense.dense_macs == pruned.dense_macs
    assert dense.train_macs == dense.macs * setting.total_epochs
    assert pruned.macs <= 0.3 * dense.macs or pruned.params <= 0.3 * dense.params
    assert pruned.train_macs == dense.macs * (warmup + learn) + pruned.macs * finetune
    assert pruned.plan is not None
    assert pruned.widths == CompactionPlan.from_json(pruned.plan).widths

    one_shot = run_trial(setting, Trial("article", "magnitude_one_shot", 0.3, 0), tmp_path)
    assert one_shot.train_macs == dense.macs * warmup + one_shot.macs * (learn + finetune)

    equal = run_trial(setting, Trial("article", "from_scratch", 0.3, 0), tmp_path, pruned)
    compute = run_trial(setting, Trial("article", "from_scratch_compute", 0.3, 0), tmp_path, pruned)
    assert equal.epochs == setting.total_epochs
    assert (equal.macs, equal.params) == (compute.macs, compute.params) == (pruned.macs, pruned.params)
    assert abs(compute.epochs * compute.macs - pruned.train_macs) <= compute.macs / 2
    assert compute.train_macs == compute.epochs * compute.macs
    with pytest.raises(ValueError, match="needs the plan of"):
        run_trial(setting, Trial("article", "from_scratch", 0.3, 0), tmp_path)


def test_accuracy_and_sizes_are_those_of_the_compact_network(tmp_path: Path) -> None:
    """Against a count by hand: the test part through the compact network of the same fit."""
    setting, trial = settings()["article"], Trial("article", "random", 0.5, 0)
    found = run_trial(setting, trial, tmp_path)
    data = seed_data(setting.make_data, 0)
    fit = Fit(setting, trial, data, shared_warmup(setting, trial, data, tmp_path))
    module, pruning = fit.module(), pruning_callback(setting, trial, data)
    fit.train(module, [pruning])
    model, test = pruning.compact_model, data.part("test")
    assert model is not None
    with torch.no_grad():
        right = sum(int(model(x[None]).argmax() == y) for x, y in zip(test.inputs, test.labels, strict=True))
    assert found.accuracy == right / len(test)
    assert found.macs == profile(model, test.inputs[:1]).macs
    assert found.params == sum(p.numel() for p in model.parameters())


def test_what_cannot_work_says_so(tmp_path: Path) -> None:
    setting = settings()["article"]
    with pytest.raises(BudgetError, match="cannot be reached"):
        check_trial(setting, Trial("article", "l1", 1e-5, 0))
    with pytest.raises(ValueError, match="batch norm"):  # slimming on the network without norms
        run_trial(setting, Trial("article", "slimming", 0.5, 0), tmp_path)
