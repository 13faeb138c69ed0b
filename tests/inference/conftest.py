"""No test reads or writes the user's measurements."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own for each test."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("LIGHTNING_PRUNE_CACHE", str(folder))
    monkeypatch.delenv("LIGHTNING_PRUNE_BACKEND", raising=False)
    return folder
