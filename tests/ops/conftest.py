"""Fixtures of the operator tests: every CPU level, every device."""

from __future__ import annotations

import pytest
import torch

from lightning_prune import ops
from tests.ops.conv_cases import LEVELS

_TARGETS = [("cpu", level) for level in LEVELS] + [("cuda", None)]


@pytest.fixture(
    params=[pytest.param(t, marks=pytest.mark.cuda) if t[0] == "cuda" else t for t in _TARGETS],
    ids=["-".join(part for part in t if part) for t in _TARGETS],
)
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device on which the compiled operators run; on the CPU once per instruction set."""
    device, level = request.param
    if not ops.extension_available():
        pytest.skip(f"no compiled extension: {ops.unavailable_reason()}")
    if device == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        if not ops.availability.cuda_built():
            pytest.fail("a CUDA device is visible but the extension was built without CUDA kernels")
    else:
        monkeypatch.setenv("LIGHTNING_PRUNE_CPU_LEVEL", level)
    return torch.device(device)
