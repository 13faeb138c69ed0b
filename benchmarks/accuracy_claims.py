"""What the accuracy benchmark claims, checked; and its tables in markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning_prune.experiments import Estimate, Setting, paired_difference
from lightning_prune.experiments.present import by_method, networks
from lightning_prune.experiments.summary import Row
from lightning_prune.experiments.trials import DEFAULT_METHOD, FROM_SCRATCH


def claims(rows: Sequence[Row], settings: Mapping[str, Setting]) -> list[dict[str, Any]]:
    """Each claim with what was found. A tie (zero within the interval of the paired difference) is not a loss."""
    found = []
    for network in networks(rows, settings):
        each = by_method(rows, network, settings)
        default = {r.target: r for name in each for r in each[name] if r.method == DEFAULT_METHOD}
        for name, group in each.items():
            for row in group:
                if row.method in (DEFAULT_METHOD, "dense") or row.target not in default:
                    continue
                difference = paired_difference(default[row.target].accuracies, row.accuracies)
                if difference is not None:
                    found.append(_claim(network, row, name, difference))
    return found


def _claim(network: str, row: Row, name: str, difference: Estimate) -> dict[str, Any]:
    must_win = row.method == "magnitude_one_shot" and row.target <= 0.1
    text = f"{DEFAULT_METHOD} {'>' if must_win else '>='} {name}"
    if not math.isfinite(difference.half_width):
        verdict = "one seed only"
    elif difference.low > 0:
        verdict = "wins"
    elif difference.high < 0:
        verdict = "loses"
    else:
        verdict = "tie"
    holds = verdict == "wins" or (verdict == "tie" and not must_win)
    return {
        "network": network, "target": row.target, "claim": text, "method": row.method,
        "difference": difference.to_json(), "verdict": verdict, "holds": holds, "from_scratch": row.method in FROM_SCRATCH,
    }  # fmt: skip


def markdown(
    rows: Sequence[Row],
    checked: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Setting],
    data: Mapping[str, Any],
) -> str:
    """The whole report."""
    lines = ["# Accuracy of pruning methods at equal budgets", ""]
    env = data["environment"]
    lines += [
        "`make accuracy`; the fits are described in `benchmarks/accuracy.py`. Accuracy on test canvases that no fit has seen, "
        "in %, mean ± 95 % Student t interval over the seeds; differences are paired by seed (equal seeds share data, initial "
        f"weights and the whole warmup). Torch {env['torch']}, {env['cpu']}, one thread per fit.",
        "",
        "![accuracy against MACs removed](accuracy.png)",
        "",
    ]
    for network in networks(rows, settings):
        lines += _network(rows, network, checked, settings)
    lines += _scales(rows, settings)
    lines += _claims(checked)
    for title, found in (("Failed", data["failed"]), ("Missing", data["missing"])):
        if found:
            items = found.items() if isinstance(found, Mapping) else ((name, "") for name in found)
            lines += [f"## {title}", "", *(f"- {name} {why}".rstrip() for name, why in items), ""]
    return "\n".join(lines)


def _network(
    rows: Sequence[Row], network: str, checked: Sequence[Mapping[str, Any]], settings: Mapping[str, Setting]
) -> list[str]:
    each = by_method(rows, network, settings)
    setting = settings[network]
    targets = sorted(
        {r.target for group in each.values() for r in group if r.method != "dense"}, reverse=True
    )
    seeds = max(r.accuracy.n for group in each.values() for r in group)
    warmup, learn, finetune = setting.epochs
    sizes = ", ".join(f"{key} {value}" for key, value in setting.describe.items())
    lines = [
        f"## {network}",
        "",
        f"{sizes}; {warmup} epochs of warmup, {learn} of learning, {finetune} of finetuning; {seeds} seeds. "
        + "; ".join(
            f"{name} {group[0].accuracy.percent()} %"
            for name, group in each.items()
            if group[0].method == "dense"
        )
        + ".",
        "",
    ]
    gaps = {(c["method"], c["target"]): c for c in checked if c["network"] == network}
    accuracies = _table(
        each,
        targets,
        [f"{t:.0%} of the MACs | {DEFAULT_METHOD} minus this" for t in targets],
        lambda row: [row.accuracy.percent(), _gap(gaps.get((row.method, row.target)))],
    )
    costs = _table(
        each,
        targets,
        [f"{t:.0%}: MACs, params | epochs | seconds" for t in targets],
        lambda row: [
            f"{row.macs_share.mean:.1%}, {row.params_share.mean:.1%}",
            f"{row.epochs:.0f}",
            f"{row.seconds.mean:.0f}",
        ],
    )
    title = "MACs and parameters that are left, epochs, CPU seconds of a fit (the shared warmup included):"
    return [*lines, *accuracies, "", title, "", *costs, ""]


def _table(
    each: Mapping[str, Sequence[Row]],
    targets: Sequence[float],
    titles: Sequence[str],
    cells: Callable[[Row], list[str]],
) -> list[str]:
    """A line per method but the dense one; ``cells`` of its row at each target, as many as the title has columns."""
    columns = titles[0].count("|") + 1
    lines = ["| method | " + " | ".join(titles) + " |", "|---|" + "---|" * columns * len(targets)]
    for name, group in each.items():
        if group[0].method == "dense":
            continue
        at = {row.target: row for row in group}
        found = [cells(at[target]) if target in at else [""] * columns for target in targets]
        lines.append(f"| {name} | " + " | ".join(cell for some in found for cell in some) + " |")
    return lines


def _gap(claim: Mapping[str, Any] | None) -> str:
    if claim is None:
        return ""
    mean, half = claim["difference"]["mean"], claim["difference"]["half_width"]
    width = "" if half is None else f" ± {100 * half:.1f}"
    mark = {"wins": " ✓", "loses": " ✗"}.get(claim["verdict"], "")
    return f"{100 * mean:+.1f}{width}{mark}"


def _scales(rows: Sequence[Row], settings: Mapping[str, Setting]) -> list[str]:
    found = sorted(
        (r for r in rows if r.method == "l0" and r.reached is not None),
        key=lambda r: (r.network, -r.target, r.loss_scale),
    )
    if not any(r.loss_scale != 1 for r in found):
        return []
    lines = [
        "## l0 with the loss multiplied",
        "",
        "The same settings throughout; the loss is multiplied by the factor. Share of the dense MACs that the penalty "
        "itself had reached when learning ended (channels at exactly zero), and after the hard selection.",
        "",
        "| network | budget | factor | reached by the penalty, % | final, % | accuracy, % |",
        "|---|---|---|---|---|---|",
    ]
    for r in found:
        assert r.reached is not None
        lines.append(
            f"| {r.network} | {r.target:.0%} | {r.loss_scale:g} | {r.reached.percent()} | {r.macs_share.percent()} "
            f"| {r.accuracy.percent()} |"
        )
    return [*lines, ""]


def _claims(checked: Sequence[Mapping[str, Any]]) -> list[str]:
    if not checked:
        return []
    wins, ties, losses = (sum(c["verdict"] == v for c in checked) for v in ("wins", "tie", "loses"))
    lines = [
        "## Claims",
        "",
        f"{DEFAULT_METHOD}, the default, against every other method at every budget: {wins} wins, {ties} ties (the paired "
        f"interval holds zero), {losses} losses. At 10 % a tie with one-shot magnitude counts as not held.",
        "",
    ]
    open_claims = [c for c in checked if not c["holds"]]
    if open_claims:
        lines += ["| does not hold | network | budget | difference, points |", "|---|---|---|---|"]
        lines += [f"| {c['claim']} | {c['network']} | {c['target']:.0%} | {_gap(c)} |" for c in open_claims]
    else:
        lines.append("Every claim holds.")
    return [*lines, ""]
