"""Shared fixtures: one thread per worker, fixed seeds, the devices that this machine has."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

# `make test` draws the same examples every time, so that a change fails for what it changed; `make test-all` draws others.
settings.register_profile("same", derandomize=True)
settings.register_profile("random")
settings.load_profile("same")
# Workers of pytest-xdist share the cores; more than one thread each makes the suite slower.
torch.set_num_threads(1)
os.environ.setdefault("MPLBACKEND", "Agg")
# Modules are tested with the compiled kernels unless a test says otherwise, and nobody's measurements are read or written.
os.environ["LIGHTNING_PRUNE_BACKEND"] = "own"


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """Every test starts from the same global seed, whatever ran before it in the worker."""
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The CPU, and a CUDA device where there is one; there float32 is float32 and not tf32."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return torch.device(request.param)
