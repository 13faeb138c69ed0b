"""Does a budget in latency hold on this machine? Asked for, predicted, measured while pruning, measured afterwards.

Networks are pruned in one shot to shares of their own measured latency (one CPU thread, channels_last); then dense and
compact network are timed again, in turn, with fresh copies and nothing of the selection's own measurements. A target is met
when the second measurement lies at most 3 % under it, and not above it by more than the noise floor: the spread of the
dense network timed against a copy of itself in the same way.

    python benchmarks/latency_budget.py           # about three minutes, to benchmarks/results/
    python benchmarks/latency_budget.py --quick   # one network, one target, on the screen
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from training_models import ResNet18, vgg16  # noqa: E402
from training_step import environment  # noqa: E402

from lightning_prune import prune_channels  # noqa: E402
from lightning_prune.files import write_atomically  # noqa: E402
from lightning_prune.latency import compare_latency  # noqa: E402
from lightning_prune.latency_budget import LATENCY_TOLERANCE  # noqa: E402
from lightning_prune.models import ArticleNet, resnet20  # noqa: E402
from lightning_prune.report import to_text, write_json  # noqa: E402

NETWORKS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "article": (lambda: ArticleNet(1, 32, (32, 32, 64, 64, 128), 10), (32, 1, 32, 32)),
    "resnet20": (lambda: resnet20(10, 3, 16), (32, 3, 32, 32)),
    "resnet18": (ResNet18, (8, 3, 64, 64)),
    "vgg16": (vgg16, (8, 3, 32, 32)),
}
TARGETS = (0.75, 0.5, 0.3)
RUNS = 5


def measured_ratios(first: nn.Module, second: nn.Module, x: Tensor, runs: int) -> list[float]:
    """Median time of ``second`` over that of ``first``, once per run, each with fresh copies."""
    found = []
    for _ in range(runs):
        models = {"first": copy.deepcopy(first), "second": copy.deepcopy(second)}
        times = compare_latency(models, x, repeats=15, min_seconds=0.2)
        found.append(times["second"].median / times["first"].median)
    return found


def run(name: str, target: float, runs: int) -> dict[str, Any]:
    """One network at one target."""
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = make().eval().to(memory_format=torch.channels_last)
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    start = time.perf_counter()
    result = prune_channels(model, x, target, "latency", prune_streams=True)
    seconds = time.perf_counter() - start
    budget = result.report.budget
    assert budget is not None
    again = measured_ratios(model, result.model, x, runs)
    noise = max(abs(ratio - 1.0) for ratio in measured_ratios(model, model, x, runs))
    share = statistics.median(again)
    return {
        "network": name, "batch": list(shape), "target": target, "predicted": budget.predicted, "measured": budget.share,
        "seconds": budget.seconds, "again": again, "noise": noise, "pruning_seconds": seconds,
        "met": target * (1 - LATENCY_TOLERANCE - noise) <= share <= target * (1 + noise),
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> Table:
    """Shares of the dense network's time, in %."""
    view = Table(title="latency budgets, % of the dense network's time")
    for column in (
        "network",
        "target",
        "predicted",
        "while pruning",
        "afterwards",
        "noise",
        "met",
        "took, s",
    ):
        view.add_column(column, justify="left" if column == "network" else "right")
    for row in rows:
        shares = (
            row["target"],
            row["predicted"],
            row["measured"],
            statistics.median(row["again"]),
            row["noise"],
        )
        cells = [f"{100 * share:.1f}" for share in shares]
        view.add_row(row["network"], *cells, "yes" if row["met"] else "no", f"{row['pruning_seconds']:.1f}")
    return view


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one network, one target; writes nothing")
    parser.add_argument("--networks", nargs="+", choices=tuple(NETWORKS), default=list(NETWORKS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    networks, targets, runs = (["article"], (0.5,), 1) if options.quick else (options.networks, TARGETS, RUNS)
    rows = []
    for name in networks:
        for target in targets:
            rows.append(run(name, target, runs))
            print(f"{name} at {target:.0%}: {100 * statistics.median(rows[-1]['again']):.1f} %", flush=True)
    view = table(rows)
    Console().print(view)
    if not options.quick:
        facts = environment() | {"clock": "wall time, medians of calls that take turns", "runs": runs}
        write_json(HERE / "results" / "latency_budget.json", {"environment": facts, "rows": rows})
        notes = [
            "# Budgets in latency\n",
            "Described in `benchmarks/latency_budget.py`.\n",
            "```",
            to_text(view),
            "```\n",
        ]
        write_atomically(HERE / "results" / "latency_budget.md", "\n".join(notes).encode())


if __name__ == "__main__":
    main()
