"""How many architectures can be pruned exactly, by this package and by Torch-Pruning.

    python benchmarks/zoo.py            # the whole list (needs timm; Torch-Pruning when installed)
    python benchmarks/zoo.py --quick    # a dozen
    python benchmarks/zoo.py resnet50 swin_tiny_patch4_window7_224 --no-peer

Every model is built without weights and handled in a process of its own with a time limit. Per model: traced, exact or
refused (with the reason) after removing 30 % of every group at random, share of the parameters that prunable channels
control, and the time to trace in forward passes. The same through Torch-Pruning: its pruned network is compared with
the dense one whose removed channels are zero. Results: a table on stdout and ``results/zoo.json``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
TOLERANCE = 1e-5
FRACTION = 0.3


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="architectures; default: all")
    parser.add_argument("--quick", action="store_true", help="a dozen architectures")
    parser.add_argument("--no-peer", action="store_true", help="without Torch-Pruning")
    parser.add_argument("--limit", type=float, default=180.0, help="seconds per model")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "zoo.json")
    options = parser.parse_args()
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    from zoo_models import EXTRA, QUICK, ZOO

    names = options.names or (QUICK if options.quick else [name for name in ZOO if name not in EXTRA])
    rows = run_all(names, options)
    summary = summarize(rows)
    print(table(rows), "", *(f"{k:52} {v}" for k, v in summary.items()), sep="\n")
    write(options.output, {"summary": summary, "environment": environment(), "models": rows})
    return 1 if any(row["status"] in ("wrong", "crash") for row in rows) else 0


def run_all(names: list[str], options: argparse.Namespace) -> list[dict]:
    """Every model in a process of its own, forked after the imports, which take longer than most models."""
    import zoo_models
    import zoo_worker  # noqa: F401

    zoo_models.preload()
    context = multiprocessing.get_context("fork")
    pending, running, rows = list(names), {}, {}
    with tempfile.TemporaryDirectory() as folder:
        while pending or running:
            while pending and len(running) < options.jobs:
                name = pending.pop(0)
                arguments = (name, Path(folder) / name, not options.no_peer)
                process = context.Process(target=examine_one, args=arguments)
                process.start()
                running[name] = (process, time.monotonic())
            time.sleep(0.05)
            for name, (process, start) in list(running.items()):
                late = time.monotonic() - start > options.limit
                if process.is_alive() and not late:
                    continue
                process.kill()
                process.join()
                rows[name] = finished(name, Path(folder) / name, process.exitcode, late)
                print(one_line(rows[name]), file=sys.stderr, flush=True)
                del running[name]
    return [rows[name] for name in names]


def examine_one(name: str, path: Path, peer: bool) -> None:
    """In the child: one line of JSON, and a second one with the peer's result."""
    from zoo_worker import build, examine, examine_peer

    with path.open("w") as out:
        try:
            model, x = build(name)
            row = examine(name, model, x)
            print(json.dumps(row), file=out, flush=True)  # stands, should the peer crash or take for ever
            if peer:
                print(
                    json.dumps(row | {"peer": examine_peer(model, x, row.get("output_layers", []))}), file=out
                )
        except BaseException as error:
            print(f"{type(error).__name__}: {error}"[:300].replace("\n", " "), file=out)
            raise


def finished(name: str, path: Path, code: int | None, late: bool) -> dict:
    lines = path.read_text().splitlines() if path.exists() else []
    found = [line for line in lines if line.startswith("{")]
    reason = "time limit" if late else (lines or [""])[-1] if code else ""
    if found:
        row = json.loads(found[-1])
        # the peer's own failure; a row without one yet was cut off in it, after this package's part was done
        failed = {"status": "time limit" if late else "crash", "reason": reason[:120]}
        return row if code == 0 and not late else row | {"peer": failed}
    return {"name": name, "status": "crash", "reason": reason or f"exit code {code}"}


def one_line(row: dict) -> str:
    parts = [f"{row['name']:34}", f"{row['status']:8}"]
    if "share" in row:
        parts.append(
            f"share {row['share']:6.1%}  forwards {row['forwards']:5.1f}  err {row.get('error', float('nan')):.1e}"
        )
    if "peer" in row:
        parts.append(f"peer {row['peer']['status']}")
    return "  ".join([*parts, row.get("reason", "")[:150]])


def summarize(rows: list[dict]) -> dict[str, str]:
    n = len(rows)
    exact = [r for r in rows if r["status"] == "exact"]
    wide = [r for r in exact if r["share"] >= 0.8]
    within = [r for r in rows if "forwards" in r and r["trace_seconds"] <= 10 * r["forward_seconds"] + 1]
    result = {
        "architectures": str(n),
        "exact or refused with a reason": f"{sum(r['status'] in ('exact', 'refused') for r in rows)} of {n}",
        "exact": f"{len(exact)} of {n}",
        "prunable groups control >= 80 % of the parameters": f"{len(wide)} of {n}",
        "traced within 10 forward passes + 1 s": f"{len(within)} of {n}",
    }
    peaks = [(r["trace_peak_mib"], r["name"]) for r in rows if "trace_peak_mib" in r]
    if peaks:
        result["most memory above the model while tracing"] = "{:.0f} MiB ({})".format(*max(peaks))
    peers = [r["peer"] for r in rows if "peer" in r]
    if peers:
        for status in ("exact", "wrong", "unchanged", "crash", "time limit"):
            result[f"Torch-Pruning {status}"] = f"{sum(p['status'] == status for p in peers)} of {len(peers)}"
        both = [
            (r["trace_seconds"] + r["compact_seconds"], r["peer"]["seconds"])
            for r in exact
            if "seconds" in r.get("peer", {})
        ]
        if both:
            result["seconds, this package / Torch-Pruning"] = (
                f"{sum(b[0] for b in both):.0f} / {sum(b[1] for b in both):.0f}"
            )
    return result


def table(rows: list[dict]) -> str:
    lines = [
        f"{'architecture':34} {'result':8} {'error':>8} {'share':>6} {'forwards':>8} {'params':>13}  Torch-Pruning"
    ]
    for r in rows:
        if "share" not in r:
            lines.append(f"{r['name']:34} {r['status']:8} {r.get('reason', '')[:90]}")
            continue
        peer = r.get("peer", {})
        text = peer.get("status", "-") + (f" ({peer['reason'][:60]})" if peer.get("reason") else "")
        sizes = f"{r['params'] / 1e6:5.1f}->{r.get('compact_params', r['params']) / 1e6:.1f}M"
        lines.append(
            f"{r['name']:34} {r['status']:8} {r.get('error', float('nan')):8.1e} {r['share']:6.1%} "
            f"{r['forwards']:8.1f} {sizes:>13}  {text}"
        )
    return "\n".join(lines)


def environment() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    result = {"python": sys.version.split()[0], "cpus": str(os.cpu_count())}
    for package in ("torch", "timm", "torchvision", "torch-pruning"):
        try:
            result[package] = version(package)
        except PackageNotFoundError:  # noqa: PERF203
            result[package] = "absent"
    return result


def write(path: Path, data: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())
