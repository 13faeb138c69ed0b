"""Two processes must decide alike, and as one process with the whole batch does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def run(devices: int, folder: Path, every: int = 0) -> list[dict[str, object]]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name in ("PYTEST_XDIST_WORKER", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-m", "tests.fit.ddp_script", str(devices), str(folder), str(every)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{devices}-{every}-{rank}.pt", weights_only=True) for rank in range(devices)]


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
