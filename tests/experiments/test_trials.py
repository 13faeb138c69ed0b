"""Trials, settings and summaries: pure data, checked against closed formulas and scipy's own tests."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from lightning_prune.experiments import (
    Estimate,
    Trial,
    TrialResult,
    check_methods,
    estimate,
    grid,
    paired_difference,
)
from lightning_prune.experiments.settings import article_settings, cluttered_digits, resnet20_setting
from lightning_prune.experiments.summary import summarise
from lightning_prune.experiments.trials import ExperimentModule

values = st.lists(st.floats(0, 1), min_size=2, max_size=9)


def result(trial: Trial, accuracy: float, **more: object) -> TrialResult:
    numbers = {
        "macs": 50.0,
        "dense_macs": 100.0,
        "params": 20.0,
        "dense_params": 80.0,
        "epochs": 3,
        "train_macs": 250.0,
    }
    return TrialResult(trial, accuracy, seconds=1.0, **{**numbers, **more})


def settings() -> dict:
    def data(seed: int) -> object:
        raise AssertionError("no data are needed")

    article = article_settings(data, {"samples": 1}, (4, 4, 4, 4, 4), epochs=(1, 1, 1))
    return {**article, **resnet20_setting(data, {"samples": 1}, 4, epochs=(1, 1, 1))}


@given(values)
def test_the_interval_is_that_of_a_one_sample_t_test(numbers: list[float]) -> None:
    found = estimate(numbers)
    assert found.mean == pytest.approx(np.mean(numbers))
    if np.std(numbers) > 1e-6:
        expected = stats.ttest_1samp(numbers, 0).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=9))
def test_differences_are_those_of_a_paired_t_test(pairs: list[tuple[float, float]]) -> None:
    first, second = ({seed: pair[i] for seed, pair in enumerate(pairs)} for i in (0, 1))
    found = paired_difference(
        {**first, 100: 0.5}, {**second, 200: 0.5}
    )  # seeds without a partner do not count
    assert found is not None
    assert found.n == len(pairs)
    if np.std([a - b for a, b in pairs]) > 1e-6:
        expected = stats.ttest_rel(list(first.values()), list(second.values())).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_one_value_has_no_interval() -> None:
    assert estimate([0.5]) == Estimate(0.5, math.inf, 1)
    assert estimate([0.5]).to_json()["half_width"] is None
    assert estimate([0.5]).percent() == "50.0"
    assert paired_difference({0: 1.0}, {1: 1.0}) is None
    with pytest.raises(ValueError, match="at least one value"):
        estimate([])


def test_every_trial_comes_after_the_one_it_needs() -> None:
    trials = grid(settings(), ["from_scratch", "random", "slimming"], [0.5, 0.1], [0, 1])
    assert len(set(trials)) == len(trials)
    for index, trial in enumerate(trials):
        assert trial.needs() is None or trial.needs() in trials[:index]
    # not asked for, but needed: the default method's widths; and slimming needs batch norms
    assert Trial("article", "l1", 0.1, 1) in trials
    assert Trial("article+bn", "slimming", 0.5, 0) in trials
    assert Trial("article", "slimming", 0.5, 0) not in trials
    assert Trial("resnet20", "slimming", 0.5, 0) in trials
    assert Trial("article+bn", "dense", 1.0, 0) in trials
    assert Trial("article", "l0", 0.5, 0, 10.0).needs() is None
    assert Trial("article", "from_scratch", 0.5, 0, 10.0).needs() == Trial("article", "l1", 0.5, 0, 10.0)


def test_trials_and_results_survive_json() -> None:
    trial = Trial("a", "l1", 0.25, 3, 10.0)
    assert Trial.from_key(trial.key) == trial
    full = result(trial, 0.9, widths={"conv": (3, 8)}, reached=0.3, plan={"format": "x"})
    assert TrialResult.from_json(full.to_json()) == full
    assert "plan" not in full.to_json(with_plan=False)
    with pytest.raises(ValueError, match="unknown entries"):
        TrialResult.from_json({**full.to_json(), "colour": "red"})


@pytest.mark.parametrize(
    ("names", "message"),
    [([], "at least one"), (["l1", "l1"], "once each"), (["l7"], "methods must be one of")],
)
def test_bad_methods_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_methods(names)


@pytest.mark.parametrize("trial", [("a", "l1", 0.0, 0), ("a", "l1", 1.5, 0), ("a", "l1", 0.5, -1)])
def test_bad_trials_are_refused(trial: tuple) -> None:
    with pytest.raises(ValueError, match="must be"):
        Trial(*trial)


def test_summaries_average_over_seeds_and_keep_loss_scales_apart() -> None:
    trials = [Trial("a", "l0", 0.5, seed, scale) for scale in (1.0, 10.0) for seed in (0, 1)]
    results = {t: result(t, 0.5 + 0.1 * t.seed + 0.01 * t.loss_scale, reached=0.6) for t in trials[:3]}
    rows = summarise(results, trials)
    assert [(row.loss_scale, row.accuracy.n) for row in rows] == [(1.0, 2), (10.0, 1)]
    assert rows[0].accuracy.mean == pytest.approx(0.56)
    assert rows[0].accuracies == pytest.approx({0: 0.51, 1: 0.61})
    assert rows[0].macs_share.mean == 0.5
    assert rows[0].params_share.mean == 0.25


def test_the_loss_is_scaled_and_penalised() -> None:
    net = nn.Linear(4, 3)
    module = ExperimentModule(net, lr=0.1, num_classes=3, l1=0.3, l2=0.7, loss_scale=10.0)
    x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    expected = (
        10 * torch.nn.functional.cross_entropy(net(x), y)
        + 0.3 * net.weight.abs().sum()
        + 0.7 * (net.weight**2).sum()
    )
    assert torch.allclose(module.training_step((x, y), 0), expected)


def test_the_digits_are_as_large_in_a_small_canvas() -> None:
    data = cluttered_digits(3, samples=8, canvas=16, batch_size=4)
    assert data.digit_size == (10.0, 14.0)
    assert data.part("train").inputs.shape == (8, 3, 16, 16)
    assert not torch.equal(
        data.part("train").inputs,
        cluttered_digits(4, samples=8, canvas=16, batch_size=4).part("train").inputs,
    )


def test_settings_of_another_size_are_another_experiment() -> None:
    a, b = (
        article_settings(None, {"samples": n}, (4, 4, 4, 4, 4), epochs=(1, 1, 1))["article"] for n in (1, 2)
    )
    assert a.fingerprint() != b.fingerprint()
    with pytest.raises(ValueError, match="epochs of learn"):
        article_settings(None, {}, (4, 4, 4, 4, 4), epochs=(1, 0, 1))
