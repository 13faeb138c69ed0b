"""python -m lightning_prune.info."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from lightning_prune import ops
from lightning_prune.info import collect, render


def run_info(**environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "lightning_prune.info"],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_collect_and_render() -> None:
    facts = collect()
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["extension"]["loaded"] == ops.extension_available()
    assert (facts["extension"]["reason"] is None) == ops.extension_available()
    if ops.extension_available():
        assert facts["cpu"]["level_used"] in facts["cpu"]["levels_built"]
        assert facts["extension"]["built_for"]["torch"]
    text = render(facts)
    assert torch.__version__ in text
    assert "built for" in text or not ops.extension_available()


def test_command_shows_the_level_in_use() -> None:
    if not ops.extension_available():
        pytest.skip("no compiled extension")
    assert "level used      portable" in run_info(LIGHTNING_PRUNE_CPU_LEVEL="portable")


def test_command_says_why_the_extension_is_not_used() -> None:
    text = run_info(LIGHTNING_PRUNE_DISABLE_EXT="1")
    assert "NO, pure-torch fallback" in text
    assert "LIGHTNING_PRUNE_DISABLE_EXT" in text
    assert "level used      none" in text
