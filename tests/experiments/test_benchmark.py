"""The accuracy benchmark: its verdicts, its peer, its run in miniature."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_prune.experiments import Setting, Trial, TrialResult
from lightning_prune.experiments.summary import summarise

pytest.importorskip("sklearn")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def fake(accuracies: dict[tuple[str, float], list[float]]) -> tuple[list, dict]:
    """Rows of made-up results; one setting."""
    results = {
        trial: TrialResult(trial, value, 100 * target, 100.0, 10.0, 20.0, 3, 1.0, 1.0)
        for (method, target), values in accuracies.items()
        for seed, value in enumerate(values)
        for trial in [Trial("article", method, target, seed)]
    }
    setting = Setting("article", lambda seed: None, lambda shape, n: None, (1, 1, 1))  # type: ignore[arg-type, return-value]
    return summarise(results, list(results)), {"article": setting}


def test_verdicts_follow_from_paired_differences() -> None:
    from accuracy_claims import claims, markdown

    spread = [0.0, 0.1, 0.2]  # large, but shared by the seeds: pairing removes it

    def shifted(by: float, noise: float = 0.001) -> list[float]:
        return [0.5 + s + by + noise * (-1) ** i for i, s in enumerate(spread)]

    rows, settings = fake(
        {
            ("dense", 1.0): shifted(0.2),
            ("l1", 0.5): shifted(0.0),
            ("l1", 0.1): shifted(0.0),
            ("random", 0.5): shifted(-0.1, -0.001),
            ("vib", 0.5): shifted(0.1, -0.001),
            ("taylor", 0.5): shifted(0.0, -0.02),
            ("magnitude_one_shot", 0.5): shifted(0.0, -0.02),
            ("magnitude_one_shot", 0.1): shifted(0.0, -0.02),
        }
    )
    found = claims(rows, settings)
    verdicts = {(c["method"], c["target"]): (c["verdict"], c["holds"]) for c in found}
    assert verdicts == {
        ("random", 0.5): ("wins", True),
        ("vib", 0.5): ("loses", False),
        ("taylor", 0.5): ("tie", True),
        ("magnitude_one_shot", 0.5): ("tie", True),
        ("magnitude_one_shot", 0.1): ("tie", False),  # there it has to win
    }
    environment = {"torch": "2", "cpu": "a cpu"}
    text = markdown(
        rows, found, settings, {"environment": environment, "failed": {"x": "why"}, "missing": ["y"]}
    )
    assert "1 wins, 3 ties (the paired interval holds zero), 1 losses" in text
    assert "| l1 >= vib | article | 50% | -9.9 ± 0.6 ✗ |" in text
    assert "## Failed\n\n- x why" in text
    assert "## Missing\n\n- y" in text


def test_one_seed_proves_nothing() -> None:
    from accuracy_claims import claims

    rows, settings = fake({("l1", 0.1): [0.9], ("random", 0.1): [0.1]})
    assert [(c["verdict"], c["holds"]) for c in claims(rows, settings)] == [("one seed only", False)]


@pytest.mark.parametrize("network", ["article", "resnet20"])
def test_the_peer_meets_the_budget_with_the_same_optimizer_and_schedule(tmp_path: Path, network: str) -> None:
    pytest.importorskip("torch_pruning")
    import accuracy
    from accuracy_peer import METHOD, GroupNormPruning, run_with_peer

    setting = accuracy.settings(True, (1, 1, 2))[network]
    found = run_with_peer(setting, Trial(network, METHOD, 0.3, 0), tmp_path)
    assert 0.25 < found.macs_share <= 0.3
    assert found.epochs == 4
    assert found.train_macs == 2 * found.dense_macs + 2 * found.macs

    from lightning_prune.experiments.runner import Fit, seed_data, shared_warmup

    trial = Trial(network, METHOD, 0.3, 0)
    data = seed_data(setting.make_data, 0)
    fit = Fit(setting, trial, data, shared_warmup(setting, trial, data, tmp_path))
    module, rates = fit.module(), []

    class Watch(GroupNormPruning):
        def on_train_batch_end(self, trainer: object, *_: object) -> None:
            optimizer = trainer.optimizers[0]
            rates.append(optimizer.param_groups[0]["lr"])
            assert {id(p) for p in optimizer.param_groups[0]["params"]} == {
                id(p) for p in module.parameters()
            }

    fit.train(module, [Watch(setting, 0.3, data.part("test").inputs[:1])])
    steps = 4 * len(data.train_dataloader())
    optimizer = torch.optim.Adam([torch.zeros(1)], lr=setting.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    expected = []
    for _ in range(steps):
        optimizer.step()
        schedule.step()
        expected.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx(expected[-len(rates) :])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "l7"], "methods must be one of"),
        (["--targets", "1.5"], "between 0 and 1"),
        (["--seeds", "-1"], "at least 1"),
        (["--epochs", "1", "0", "1"], "epochs of learn"),
    ],
)
def test_bad_arguments_fail_before_anything_is_trained(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    import accuracy

    monkeypatch.setattr(sys, "argv", ["accuracy.py", *arguments, "--runs", str(tmp_path / "runs")])
    with pytest.raises(SystemExit):
        accuracy.main()
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_the_whole_benchmark_in_miniature(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "accuracy.py"), "--quick", "--runs", str(tmp_path), "--jobs", "2",
               "--networks", "article", "--targets", "0.5", "--methods", "l1", "l0", "slimming", "random", "group_norm",
               "from_scratch_compute"]  # fmt: skip
    first = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert first.returncode == 0, first.stderr
    folder = tmp_path / "quick"
    data = json.loads((folder / "accuracy.json").read_text())
    assert not data["missing"]
    assert len(data["trials"]) == 2 * (2 + 6 + 2)  # seeds x (dense twice, six methods, l0 at two loss scales)
    assert "l0 with the loss multiplied" in (folder / "accuracy.md").read_text()
    assert (folder / "accuracy.png").stat().st_size > 10_000
    again = subprocess.run([*command, "--report"], capture_output=True, text=True, timeout=120)
    assert json.loads((folder / "accuracy.json").read_text())["trials"] == data["trials"]
    assert "seed 0:" not in again.stdout  # nothing was trained
