"""One training step of a pruned network: forward, backward and SGD, in every form in which a fit may run it.

Mixed precision (bfloat16 autocast), channels_last, synthetic images. ``dense`` is the network before pruning, ``masked`` the
same size with dead channels at zero, ``live_maps`` that network with maps of live channels and fused norms, ``cut`` the network
without its dead channels, ``rounded`` cut to multiples of 8. ``+norms``: norms by this package's operator where they are
faster. Odd widths lose most in the backward pass, where the vendor's kernels want aligned channels.

    python -m benchmarks.gpu.training [--quick] [--device cpu]
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu.networks import dense_network
from benchmarks.gpu.record import Record, arguments, time_left
from benchmarks.gpu.timing import interleaved, warm_up
from lightning_prune import mask_channels, prune_channels, trace_channels
from lightning_prune.fused_norms import FusedNorms
from lightning_prune.skipping import DeadChannelSkipper

LAST = torch.channels_last


def forms(name: str, share: float, size: int, device: str) -> dict[str, tuple[nn.Module, Any]]:
    """Networks on the device, ready to train, each with what hangs on it (kept alive, and asked how much it does)."""
    dense = dense_network(name)
    example = torch.randn(2, 3, size, size)
    pruned = prune_channels(dense, example, share, prune_streams=True)
    rounded = prune_channels(dense, example, share, prune_streams=True, round_to=8)
    graph = trace_channels(dense, example)
    masked = mask_channels(dense, example, pruned.plan)

    def ready(network: nn.Module) -> nn.Module:
        network = copy.deepcopy(network).to(device, memory_format=LAST)  # type: ignore[call-overload]
        return network.train().requires_grad_(True)

    found: dict[str, tuple[nn.Module, Any]] = {}
    for label, network in (
        ("dense", dense),
        ("masked", masked),
        ("cut", pruned.model),
        ("rounded", rounded.model),
    ):
        found[label] = ready(network), None
        fused = ready(network)
        if label == "masked":
            skipper = DeadChannelSkipper(fused, graph, example.to(device))
            skipper.set_mask(pruned.plan.mask(graph))
            found["live_maps"] = fused, skipper
        else:
            found[f"{label}+norms"] = fused, FusedNorms(fused)
    return found


def step_of(network: nn.Module, batch: int, size: int, classes: int, device: str) -> Callable[[], float]:
    """A function that does one step and returns its seconds."""
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
    x = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=LAST)
    labels = torch.randint(classes, (batch,), device=device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = F.cross_entropy(network(x), labels)
        loss.backward()
        optimizer.step()

    def timed() -> float:
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) * 1e-3
        begun = time.perf_counter()
        step()
        return time.perf_counter() - begun

    for _ in range(3):  # chooses kernels
        timed()
    return timed


def differences_of(networks: dict[str, tuple[nn.Module, Any]], size: int, device: str) -> dict[str, float]:
    """Outputs on the same images in training mode, relative to the masked network's, which these forms have to agree with."""
    x = (
        torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))
        .to(device)
        .contiguous(memory_format=LAST)
    )
    outputs: dict[str, Tensor] = {}
    for label, (network, _) in networks.items():
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            outputs[label] = copy.deepcopy(network)(x) if label == "masked" else network(x)
    exact = outputs["masked"].double()
    return {
        label: float((y.double() - exact).norm() / exact.norm())
        for label, y in outputs.items()
        if label in ("live_maps", "cut", "cut+norms")
    }


def main() -> None:
    given = arguments(__doc__)
    torch.backends.cudnn.benchmark = True
    cpu = given.device == "cpu"
    cases: list[tuple[str, float, int]] = (
        [("toy", 0.5, 4)] if cpu else [("resnet50", 0.5, 128), ("resnet18", 0.5, 256)]
    )
    warm_up(given.device)
    record = Record(given.out, "training", given.device)
    for name, share, batch in cases[: 1 if given.quick else None]:
        if time_left() < 10:
            return
        size = 16 if cpu else 224
        networks = forms(name, share, size, given.device)
        differences = differences_of(networks, size, given.device)
        classes = 10 if name == "toy" else 1000
        steps = {
            label: step_of(network, batch, size, classes, given.device)
            for label, (network, _) in networks.items()
        }
        timed = interleaved(steps, samples=5 if given.quick else 10, max_seconds=2.0)
        row: dict[str, Any] = {label: t.as_row() for label, t in timed.items()}
        chosen = {
            label: sum(any(call.won.values()) for call in hung._norms.values())
            for label, (_, hung) in networks.items()
            if isinstance(hung, FusedNorms)
        }
        skipper = networks["live_maps"][1]
        record.add(
            network=name, share=share, batch=batch, size=size, candidates=row, differences=differences,
            norms_by_operator=chosen, live_maps_obstacle=skipper.obstacle,
        )  # fmt: skip
        print(
            name, share, f"differences from masked {differences}, norms by the operator {chosen}", flush=True
        )
        for label, r in row.items():
            print(f"  {label:14} {r['median_us'] / 1e3:8.2f} ms ±{r['noise']:.0%}", flush=True)
    record.finish()


if __name__ == "__main__":
    main()
