"""Do filters of a first layer end up as duplicates of one another?

Nothing in a loss forbids two filters to be equal. Networks with 1, 2, 4, 8 and 16 filters of 3x1 in their first layer learn the
8x8 digits, from several seeds and initialisations; then :func:`lightning_prune.find_duplicate_channels` counts the filters
that repeat another one: exactly, or with a cosine over 0.99 or over 0.95. Constant initialisation is the control: filters that
start alike get the same gradients and must stay alike.

    python benchmarks/duplicates.py            # under three minutes on one core
    python benchmarks/duplicates.py --quick
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_prune import find_duplicate_channels, trace_channels
from lightning_prune.data import DigitsDataModule
from lightning_prune.init import INITS, reinitialise
from lightning_prune.report import to_text, write_json

WIDTHS = (1, 2, 4, 8, 16)
CONTROL = "constant"
#: how alike filters are called duplicates: argument of ``find_duplicate_channels``
LEVELS: dict[str, dict[str, float]] = {
    "exact": {"tolerance": 0.0},
    "cosine > 0.99": {"cosine": 0.99},
    "cosine > 0.95": {"cosine": 0.95},
}
RESULTS = Path(__file__).parent / "results"


def network(filters: int, init: str, seed: int) -> nn.Sequential:
    """Conv 3x1, ReLU, pool, conv 3x3, ReLU, pool, linear; biases start at zero."""
    net = nn.Sequential(
        nn.Conv2d(1, filters, (3, 1), padding=(1, 0)), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(filters, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(16 * 4, 10),
    )  # fmt: skip
    if init == CONTROL:  # alike in the first layer: equal filters, and equal weights in what reads them
        reinitialise(net, "he_normal", seed=seed)
        with torch.no_grad():
            net[0].weight.fill_(0.1)
            net[3].weight.copy_(net[3].weight[:, :1].expand_as(net[3].weight).clone())
        return net
    return reinitialise(net, init, seed=seed, **({"std": 0.1} if init == "gaussian" else {}))


def train(net: nn.Module, inputs: Tensor, labels: Tensor, epochs: int, seed: int) -> None:
    """Adam on cross-entropy, batches of 64."""
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(inputs), generator=generator).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(inputs[batch]), labels[batch]).backward()
            optimizer.step()


def measure(net: nn.Sequential, example: Tensor) -> dict[str, int]:
    """Filters of the first layer that repeat another one, per level."""
    if net[0].out_channels == 1:
        return dict.fromkeys(LEVELS, 0)
    graph = trace_channels(net, example)
    return {
        name: sum(d.group == "0" for d in find_duplicate_channels(net, example, graph=graph, **options))
        for name, options in LEVELS.items()
    }


def run(epochs: int, seeds: int, widths: tuple[int, ...]) -> dict[str, object]:
    """Every initialisation, width and seed."""
    data = DigitsDataModule()
    part, test = data.part("train"), data.part("test")
    records = []
    for init in (*INITS, CONTROL):
        for filters in widths:
            for seed in range(seeds):
                net = network(filters, init, seed)
                before = measure(net, test.inputs[:2])
                train(net, part.inputs, part.labels, epochs, seed)
                with torch.no_grad():
                    accuracy = float((net(test.inputs).argmax(1) == test.labels).float().mean())
                alive = sum(bool(a.any()) for a in F.relu(net[0](test.inputs)).detach().unbind(1))
                records.append(
                    {
                        "init": init, "filters": filters, "seed": seed, "accuracy": accuracy,
                        "duplicates": measure(net, test.inputs[:2]), "duplicates_before": before, "active": alive,
                        "filter_weights": net[0].weight.detach().flatten(1).tolist(),
                    }
                )  # fmt: skip
    return {"epochs": epochs, "seeds": seeds, "widths": list(widths), "levels": LEVELS, "fits": records}


def table(result: dict) -> Table:
    """Means over seeds; for duplicates also the seed with most."""
    view = Table(
        title=f"filters that repeat another, after {result['epochs']} epochs, mean (most) of {result['seeds']} seeds"
    )
    for column in ("init", "filters", "accuracy, %", "active", *LEVELS, "0.95, before training"):
        view.add_column(column, justify="left" if column == "init" else "right")
    for init in dict.fromkeys(r["init"] for r in result["fits"]):
        for filters in result["widths"]:
            fits = [r for r in result["fits"] if (r["init"], r["filters"]) == (init, filters)]

            def count(level: str, key: str = "duplicates", fits: list = fits) -> str:
                values = [r[key][level] for r in fits]
                return f"{statistics.fmean(values):.1f} ({max(values)})"

            accuracy = 100 * statistics.fmean(r["accuracy"] for r in fits)
            active = statistics.fmean(r["active"] for r in fits)
            view.add_row(init, str(filters), f"{accuracy:.1f}", f"{active:.1f}", *map(count, LEVELS),
                         count("cosine > 0.95", "duplicates_before"))  # fmt: skip
    return view


def check_control(result: dict) -> None:
    """All filters that started alike must have stayed alike, or the experiment measures something else."""
    for r in result["fits"]:
        expected = r["filters"] - 1
        if r["init"] == CONTROL and r["duplicates"]["exact"] != expected:
            raise RuntimeError(
                f"constant initialisation, {r['filters']} filters, seed {r['seed']}: {expected} exact duplicates expected, "
                f"found {r['duplicates']['exact']}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="2 seeds, 3 widths, 5 epochs; writes nothing")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    result = run(5, 2, (2, 4, 16)) if args.quick else run(args.epochs, args.seeds, WIDTHS)
    view = table(result)
    Console().print(view)
    check_control(result)
    if not args.quick:
        write_json(RESULTS / "duplicates.json", result)
        (RESULTS / "duplicates.md").write_text(f"```\n{to_text(view)}\n```\n")
    print(f"{time.perf_counter() - start:.0f} s, {time.process_time():.0f} s of processor time")


if __name__ == "__main__":
    main()
