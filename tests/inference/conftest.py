"""No test reads or writes the user's measurements; every CPU level."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ops.conv_cases import LEVELS


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own for each test."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("LIGHTNING_PRUNE_CACHE", str(folder))
    monkeypatch.delenv("LIGHTNING_PRUNE_BACKEND", raising=False)
    return folder


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An instruction set that the kernels are held to."""
    monkeypatch.setenv("LIGHTNING_PRUNE_CPU_LEVEL", request.param)
    return str(request.param)
