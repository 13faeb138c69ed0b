"""The command line: what it prints, what it refuses and how."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_prune.cli import UsageError, build_parser, load_model, main, parse_shape
from lightning_prune.compaction import load_compact

MODULE = """
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))

class Zoo:
    @staticmethod
    def wide():
        return nn.Conv2d(3, 16, 1)

model = nn.Linear(2, 2)
number = 3

def with_argument(width):
    return nn.Linear(width, 2)

def not_a_model():
    return "text"

def nothing_to_prune():
    return nn.ReLU()
"""


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the current folder, under a name of its own per test."""
    name = f"zoo_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return name


@pytest.mark.parametrize("text", ["1,3,32,32", "1x3x32x32", "1, 3, 32, 32"])
def test_shapes(text: str) -> None:
    assert parse_shape(text) == (1, 3, 32, 32)


@pytest.mark.parametrize("text", ["", "3,", "a,b", "1,0,3", "1,-3"])
def test_bad_shapes_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="1,3,32,32"):
        parse_shape(text)


def test_model_specs(zoo: str) -> None:
    assert isinstance(load_model(f"{zoo}:build"), nn.Sequential)
    assert load_model(f"{zoo}:Zoo.wide").out_channels == 16
    assert isinstance(load_model(f"{zoo}:model"), nn.Linear)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("build", "package.module:callable"),
        (":build", "package.module:callable"),
        ("{zoo}:", "package.module:callable"),
        ("no_such_module_here:build", "cannot import 'no_such_module_here'"),
        ("{zoo}:missing", "has no 'missing'"),
        ("{zoo}:number", "must be a callable"),
        ("{zoo}:with_argument", "without arguments"),
        ("{zoo}:not_a_model", "must return a torch.nn.Module, got str"),
    ],
)
def test_bad_model_specs(zoo: str, spec: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    spec = spec.format(zoo=zoo)
    with pytest.raises(UsageError, match=message):
        load_model(spec)
    assert main(["bench", spec, "--input-shape", "1,3,8,8"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("lightning-prune bench: ")
    assert message in captured.err


def test_inspect_lists_groups_and_layers(zoo: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", f"{zoo}:build", "--input-shape", "1,3,8,8", "--profile"]) == 0
    out = capsys.readouterr().out
    assert "0.weight[0]" in out
    assert "2.weight[1]" in out
    assert "an output of the network" in out
    macs = (3 * 8 + 8 * 4) * 9 * 64
    assert f"{macs:,}" in out


def test_bench_prints_milliseconds(zoo: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--input-shape", "1,3,8,8", "--threads", "1", "--repeats", "3", "--min-seconds", "0"]
    assert main(["bench", f"{zoo}:build", *arguments]) == 0
    assert "n=3" in capsys.readouterr().out


def test_bench_beside_the_optimized_model(
    zoo: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTNING_PRUNE_CACHE", "off")
    arguments = [
        "--input-shape",
        "1,3,8,8",
        "--threads",
        "1",
        "--repeats",
        "3",
        "--min-seconds",
        "0",
        "--optimize",
    ]
    assert main(["bench", f"{zoo}:build", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["model", "optimized"]
    assert all("n=3" in line for line in lines)


def test_prune_writes_a_checkpoint_that_loads(zoo: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "prune",
        f"{zoo}:build",
        "--input-shape",
        "1,3,8,8",
        "--target",
        "0.5",
        "--out",
        "out/small.safetensors",
    ]
    assert main(arguments) == 0
    assert "out/small.safetensors" in capsys.readouterr().out
    small = load_compact(load_model(f"{zoo}:build"), "out/small.safetensors")
    assert isinstance(small, nn.Sequential)
    assert 1 <= small[0].out_channels <= 4
    assert small[0].out_channels == small[2].in_channels
    assert small(torch.zeros(1, 3, 8, 8)).shape == (1, 4, 8, 8)


def test_prune_does_not_overwrite_without_force(zoo: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine").write_text("precious")
    arguments = ["prune", f"{zoo}:build", "--input-shape", "1,3,8,8", "--out", "mine"]
    assert main(arguments) == 2
    assert "--force" in capsys.readouterr().err
    assert Path("mine").read_text() == "precious"
    assert main([*arguments, "--force"]) == 0
    assert load_compact(load_model(f"{zoo}:build"), "mine") is not None


@pytest.mark.parametrize(
    "extra",
    [["--target", "1.5"], ["--target", "0"], ["--metric", "watts"], ["--method", "magnitud"]],
)
def test_prune_names_the_wrong_argument(
    zoo: str, extra: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["prune", f"{zoo}:build", "--input-shape", "1,3,8,8", "--out", "small.safetensors", *extra]
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert extra[0].removeprefix("--") in err
    assert extra[1] in err
    assert not Path("small.safetensors").exists()


def test_prune_refuses_a_model_without_prunable_layers(zoo: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", f"{zoo}:nothing_to_prune", "--input-shape", "1,3,8,8", "--out", "x"]) == 2
    assert "lightning-prune prune:" in capsys.readouterr().err
    assert not Path("x").exists()


def test_inspect_reports_an_input_that_does_not_fit(zoo: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", f"{zoo}:build", "--input-shape", "1,5,8,8"]) == 2
    assert "(1, 5, 8, 8)" in capsys.readouterr().err


def test_info_names_torch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    assert torch.__version__ in capsys.readouterr().out


def test_unknown_command_and_missing_shape_exit_with_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["fly"], [], ["bench", "a:b"], ["demo", "--datasets", "mnist"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        assert "usage: lightning-prune" in capsys.readouterr().err


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    for command in ("demo", "info", "inspect", "bench", "prune"):
        assert command in out
    assert build_parser().parse_args(["demo"]).seeds == 3


def test_module_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lightning_prune", "inspect", "nowhere:x", "--input-shape", "1,2"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "cannot import 'nowhere'" in done.stderr
    assert "Traceback" not in done.stderr
