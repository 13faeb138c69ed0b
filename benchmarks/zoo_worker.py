"""One architecture: trace, thin, compare; then the same through Torch-Pruning."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from zoo_models import ZOO

from lightning_prune.channels import ChannelGraph, trace_channels
from lightning_prune.channels.trial import random_mask
from lightning_prune.compaction import CompactionPlan, compact, mask_channels
from lightning_prune.compaction.verify import max_relative_error
from lightning_prune.errors import CompactionError, PruneError

#: the second one judges networks that amplify their own float32 rounding beyond the first
FRACTION, TOLERANCE, TOLERANCE64 = 0.3, 1e-5, 1e-9


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    factory, shape = ZOO[name]
    model = factory().eval()
    # untrained networks end in constants (zero-initialised last norms, tiny layer scales): make every path count
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    for p in model.parameters():
        if p.dim() <= 1 and p.numel() > 1 and float(p.detach().abs().max()) < 1e-3:
            nn.init.normal_(p, std=0.2)
    x = torch.randn(shape)
    for _ in range(2):  # statistics that fit the weights, so that outputs keep a sane scale
        calibrate(model, x)
    return model, x


def calibrate(model: nn.Module, x: torch.Tensor) -> None:
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    for m in norms:
        m.train()
        m.momentum = 1.0
    with torch.no_grad():
        model(x)
    for m in norms:
        m.momentum = 0.1
    model.eval()


def seconds(model: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        model(x)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            model(x)
            times.append(time.perf_counter() - start)
    return min(times)


def resident(field: str, reset_peak: bool = False) -> float:
    """Resident memory of this process in MiB (``VmRSS`` now, ``VmHWM`` the peak); nan where /proc does not tell."""
    try:
        if reset_peak:
            Path("/proc/self/clear_refs").write_text("5")
        line = next(
            text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith(field)
        )
        return int(line.split()[1]) / 1024
    except (OSError, StopIteration):
        return float("nan")


def share(model: nn.Module, graph: ChannelGraph) -> float:
    """Share of all parameter elements that disappear when some prunable channel goes."""
    prunable: dict[tuple[str, int], int] = {}
    for group in graph:
        for m in group.members:
            prunable[m.tensor, m.dim] = prunable.get((m.tensor, m.dim), 0) + m.index.size
    touched = total = 0.0
    for name, p in model.named_parameters():
        untouched = 1.0
        for d, n in enumerate(p.shape):
            untouched *= 1 - prunable.get((name, d), 0) / n
        touched += p.numel() * (1 - untouched)
        total += p.numel()
    return touched / max(total, 1)


def examine(name: str, model: nn.Module, x: torch.Tensor) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": name,
        "status": "crash",
        "params": sum(p.numel() for p in model.parameters()),
    }
    forward = seconds(model, x)
    before = resident("VmRSS", reset_peak=True)
    start = time.perf_counter()
    try:
        graph = trace_channels(model, x)
    except PruneError as error:
        return row | {"status": "refused", "reason": str(error)[:300]}
    took = time.perf_counter() - start
    row["trace_peak_mib"] = resident("VmHWM") - before
    row |= {
        "share": share(model, graph), "groups": len(graph), "trace_seconds": took, "forward_seconds": forward,
        "forwards": took / forward, "size_rules": len(graph.sizes),
    }  # fmt: skip
    reasons: dict[str, float] = {}
    for key, why in graph.frozen.items():
        n = dict(model.named_parameters()).get(key.rpartition("[")[0])
        reasons[why.reason] = reasons.get(why.reason, 0) + (n.numel() if n is not None else 0)
    row["frozen"] = [
        f"{r}: {n / row['params']:.1%}" for r, n in sorted(reasons.items(), key=lambda i: -i[1])[:6]
    ]
    ends = [key for key, why in graph.frozen.items() if why.reason == "an output of the network"]
    row["output_layers"] = sorted({key.partition("[")[0].rpartition(".")[0] for key in ends})
    if not len(graph):
        row |= {"status": "refused", "reason": "nothing can be removed: " + "; ".join(row["frozen"][:2])}
    else:
        plan = CompactionPlan.from_mask(graph, random_mask(graph, FRACTION, seed=7))
        start = time.perf_counter()
        try:
            small = compact(model, x, plan)
        except CompactionError as error:
            row |= {"status": "refused", "reason": str(error)[:300]}
        else:
            row["compact_seconds"] = time.perf_counter() - start
            error = max_relative_error(mask_channels(model, x, plan), small, x)
            fresh = max_relative_error(mask_channels(model, x, plan), small, torch.randn_like(x))
            row |= {"error": max(error, fresh), "compact_params": sum(p.numel() for p in small.parameters())}
            row["error64"] = error64(mask_channels(model, x, plan), small, x)
            row["status"] = "exact" if row["error"] <= TOLERANCE or row["error64"] <= TOLERANCE64 else "wrong"
    return row


def error64(masked: nn.Module, small: nn.Module, x: torch.Tensor) -> float:
    try:
        return max_relative_error(masked.double(), copy.deepcopy(small).double(), x.double())
    except RuntimeError:
        return float("inf")  # the model insists on its own dtype


def examine_peer(model: nn.Module, x: torch.Tensor, output_layers: list[str]) -> dict[str, Any]:
    """Torch-Pruning at the same ratio, told which layers make the outputs, against its masked twin.

    The twin is the dense network with the elements at zero that Torch-Pruning removed.

    Which elements survive is read off a second copy, pruned with the same random choices, whose parameters hold
    their own positions. Nothing of Torch-Pruning's inner workings is assumed.
    """
    start = time.perf_counter()
    try:
        pruned = peer_prune(copy.deepcopy(model), x, output_layers)
        took = time.perf_counter() - start
        coded = copy.deepcopy(model).double()
        with torch.no_grad():
            for p in coded.parameters():
                p.copy_(torch.arange(p.numel(), dtype=torch.float64).view(p.shape))
        coded = peer_prune(coded, x.double(), output_layers)
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error)[:120]}"
        return {"status": "crash", "reason": reason, "seconds": time.perf_counter() - start}
    before, after = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in pruned.parameters())
    result: dict[str, Any] = {"seconds": took, "compact_params": after}
    if after == before:
        return result | {"status": "unchanged"}
    masked = copy.deepcopy(model)
    positions = dict(coded.named_parameters())
    with torch.no_grad():
        for name, p in masked.named_parameters():
            keep = torch.zeros(p.numel(), dtype=torch.bool)
            keep[positions[name].long().flatten()] = True
            p.mul_(keep.view(p.shape))
    try:
        error = max_relative_error(masked, pruned, x)
    except Exception as failure:
        return result | {"status": "crash", "reason": f"{type(failure).__name__}: {str(failure)[:120]}"}
    exact = error <= TOLERANCE or error64(masked, pruned, x) <= TOLERANCE64
    return result | {"status": "exact" if exact else "wrong", "error": error}


def peer_prune(model: nn.Module, x: torch.Tensor, output_layers: list[str]) -> nn.Module:
    """``FRACTION`` of the channels of every layer but the outputs', at random."""
    import torch_pruning as tp

    torch.manual_seed(0)
    last = [model.get_submodule(name) for name in output_layers]
    importance = tp.importance.RandomImportance()
    tp.pruner.MagnitudePruner(
        model, x, importance=importance, pruning_ratio=FRACTION, ignored_layers=last
    ).step()
    return model
