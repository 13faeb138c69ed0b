"""``lightning-prune sweep article``: what it refuses, what it writes, that a second call trains nothing."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from lightning_prune.cli import main
from lightning_prune.experiments.article import METHODS, ArticleSweep
from tests.test_cifar import write as write_cifar

pytest.importorskip("sklearn")


def test_the_defaults_are_the_articles() -> None:
    sweep = ArticleSweep()
    setting = sweep.settings()["article"]
    assert (setting.lr, sweep.batch_size, setting.l1, setting.l2) == (1.5e-3, 32, 5e-5, 2.5e-4)
    assert sweep.seeds >= 5
    assert set(METHODS) >= {
        "l1", "l0", "vib", "taylor", "slimming", "magnitude", "random", "first_k", "from_scratch", "from_scratch_compute",
    }  # fmt: skip
    assert setting.describe["widths"] == [32, 32, 64, 64, 128]
    trials = sweep.trials()
    assert len(trials) == 5 * (
        2 + len(METHODS) * len(sweep.targets)
    )  # two dense networks, with and without norms


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "l7"], "methods must be one of"),
        (["--methods", "l1", "l1"], "once each"),
        (["--targets", "1.5"], "targets"),
        (["--targets", "0.5", "0.5"], "once each"),
        (["--targets", "0.00001"], "cannot be reached"),
        (["--seeds", "0"], "seeds"),
        (["--epochs", "1", "0", "1"], "epochs of learn"),
        (["--storage", "study.db"], "storage must be"),
        (["--jobs", "0"], "jobs"),
        (["--widths", "4", "4", "4", "4", "0"], "widths"),
        (["--canvas", "18"], "multiple of 4"),
        (["--data-dir", "no-such-folder"], "no-such-folder"),
    ],
)
def test_bad_arguments_fail_before_anything_is_trained(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["sweep", "article", "--samples", "64", "--out", str(out), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.ckpt"))
    assert not list(tmp_path.rglob("*.db"))


def test_a_sweep_writes_its_results_and_a_second_call_trains_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["sweep", "article", "--quick", "--samples", "96", "--seeds", "2", "--targets", "0.5", "--out", str(tmp_path),
                 "--methods", "l1", "slimming", "from_scratch", "--storage", f"journal:{tmp_path}/study.log"]  # fmt: skip
    assert main([*arguments, "--report"]) == 1  # nothing there yet
    assert main(arguments) == 0
    assert "50% of weights removed" in " ".join(capsys.readouterr().out.split())
    data = json.loads((tmp_path / "results.json").read_text())
    assert len(data["trials"]) == 2 * 5
    assert not data["missing"]
    assert not data["failed"]
    rows = {(row["network"], row["method"]): row for row in data["summary"]}
    assert set(rows) == {
        ("article", "dense"), ("article", "l1"), ("article", "from_scratch"), ("article+bn", "dense"),
        ("article+bn", "slimming"),
    }  # fmt: skip
    assert rows["article", "l1"]["params_share"]["mean"] <= 0.5
    assert rows["article", "l1"]["params_share"] == rows["article", "from_scratch"]["params_share"]
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")

    def refuse(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr("lightning_prune.experiments.runner.train", refuse)
    assert main(arguments) == 0
    assert json.loads((tmp_path / "results.json").read_text())["trials"] == data["trials"]
    assert main([*arguments, "--l1", "0.1"]) == 2  # other settings are another experiment
    assert "begun with other settings" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["cifar-10-batches-py", "cifar-100-binary"])
def test_cifar_takes_the_place_of_the_digits(tmp_path: Path, layout: str) -> None:
    folder, _ = write_cifar(tmp_path / "data", layout)
    out = tmp_path / "out"
    arguments = [
        "sweep",
        "article",
        "--quick",
        "--batch-size",
        "4",
        "--seeds",
        "1",
        "--targets",
        "0.5",
        "--methods",
        "l1",
    ]
    assert main([*arguments, "--data-dir", str(folder), "--samples", "6", "--out", str(out)]) == 0
    data = json.loads((out / "results.json").read_text())
    classes = 10 if "10-" in layout else 100
    assert data["settings"][0]["data"] == f"CIFAR-{classes}"
    dense = next(t for t in data["trials"] if t["trial"]["method"] == "dense")
    # the article's network by hand, widths of --quick: four convolutions, two dense layers on 8 x 8 maps
    c = [3, 8, 8, 16, 16]
    by_hand = sum(9 * a * b + b for a, b in pairwise(c)) + (16 * 64 + 1) * 32 + 33 * classes
    assert dense["params"] == by_hand
    assert (dense["accuracy"] * 7) == pytest.approx(round(dense["accuracy"] * 7))  # seven test images
