"""Two processes must decide alike, and as one process with the whole batch does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_prune import ops

ROOT = Path(__file__).parents[2]


def run(devices: int, folder: Path, every: int = 0, kernels: str = "") -> list[dict[str, Any]]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name in ("PYTEST_XDIST_WORKER", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-m", "tests.fit.ddp_script", str(devices), str(folder), str(every), kernels],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    names = [f"{devices}-{every}-{kernels}-{rank}.pt" for rank in range(devices)]
    return [torch.load(folder / name, weights_only=True) for name in names]


def test_two_ranks_agree_with_each_other_and_with_one(tmp_path: Path) -> None:
    """Masked, and cut while they train."""
    (single,) = run(1, tmp_path)
    for every in (0, 1):
        first, second = run(2, tmp_path, every)
        assert first["removed"] == second["removed"]
        assert torch.equal(first["gates"], second["gates"])
        assert torch.equal(first["weights"], second["weights"])
        assert min(first["live"]) < 48
        # the mean over ranks of means over half batches is the whole batch's gradient, up to rounding
        torch.testing.assert_close(first["gates"], single["gates"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(first["weights"], single["weights"], rtol=1e-4, atol=1e-5)
        assert first["live"] == single["live"]
        assert first["removed"] == single["removed"]
        assert first["sizes"] == second["sizes"]
        assert (first["sizes"][-1] < single["sizes"][-1]) == (every > 0)


@pytest.mark.skipif(not ops.extension_available(), reason="no compiled extension")
def test_ranks_on_compiled_kernels_are_as_ranks_on_torch_s(tmp_path: Path) -> None:
    """With real norms, whose statistics are each rank's own; masked, and cut while they train."""
    plain = run(2, tmp_path, 0, "torch")
    for kernels, every in (("nchw", 0), ("nhwc", 1)):
        found = run(2, tmp_path, every, kernels)
        assert torch.equal(found[0]["weights"], found[1]["weights"])
        assert torch.equal(found[0]["gates"], found[1]["gates"])
        for own, expected in zip(found, plain, strict=True):
            assert own["removed"] == expected["removed"]
            assert min(own["live"]) < 48
            assert own["live"] == expected["live"]
            assert min(own["calls"].values()) > 0, own["calls"]
            torch.testing.assert_close(own["gates"], expected["gates"], rtol=1e-7, atol=1e-9)
            torch.testing.assert_close(own["weights"], expected["weights"], rtol=1e-7, atol=1e-9)
            if every == 0:  # else they are cut
                torch.testing.assert_close(own["buffers"], expected["buffers"], rtol=1e-7, atol=1e-9)
