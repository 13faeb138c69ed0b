"""Whole networks pruned to a share of their MACs: what does `optimize_for_inference` gain over torch, padded widths, dense?

Random weights, random images, bfloat16, channels_last, one CUDA graph per candidate. Widths are chosen by this package's
own pruning, once freely (``odd``) and once in multiples of 8 (``rounded``).

    python -m benchmarks.gpu.networks [--quick] [--device cpu] [--only resnet50]
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.peers import LAST
from benchmarks.gpu.record import Record, arguments, time_left
from benchmarks.gpu.timing import Loop, interleaved, warm_up
from lightning_prune import optimize_for_inference, prune_channels
from lightning_prune.profiling import profile

#: (timm name, share of the MACs, batch), most wanted first
CASES = [
    (name, share, batch)
    for share, batch in ((0.5, 32), (0.5, 1), (0.25, 32), (0.25, 1), (0.5, 256))
    for name in ("resnet50", "mobilenetv2_100", "resnet18", "vgg16_bn")
]


class Toy(nn.Module):
    """Three convolutions with a residual sum; stands in for the zoo where only the code is exercised."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.body = nn.Sequential(
            nn.Conv2d(16, 24, 3, padding=1),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            nn.Conv2d(24, 16, 1),
            nn.BatchNorm2d(16),
        )
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(torch.relu(x + self.body(x)).mean((2, 3)))  # type: ignore[no-any-return]


def dense_network(name: str) -> nn.Module:
    """A timm architecture with random weights; ``toy`` needs no timm."""
    torch.manual_seed(0)
    if name == "toy":
        return Toy().eval()
    import timm

    return timm.create_model(name, pretrained=False).eval()  # type: ignore[no-any-return]


def folded_network(model: nn.Module, example: Tensor, dtype: torch.dtype) -> nn.Module:
    """The network with folded norms on torch's kernels: what a careful user of torch would run."""
    before = os.environ.get("LIGHTNING_PRUNE_BACKEND")
    os.environ["LIGHTNING_PRUNE_BACKEND"] = "vendor"
    try:
        return optimize_for_inference(model, example, dtype=dtype, cuda_graph=False)
    finally:
        os.environ.pop("LIGHTNING_PRUNE_BACKEND")
        if before is not None:
            os.environ["LIGHTNING_PRUNE_BACKEND"] = before


def relative_error(exact: Tensor, found: Tensor) -> float:
    """Largest difference from the float64 outputs over the largest of them."""
    return float((found.double() - exact).abs().max() / exact.abs().max())


def variants(name: str, share: float, size: int) -> dict[str, nn.Module]:
    """dense, odd, rounded; streams are pruned too where the share cannot be reached without."""
    dense = dense_network(name)
    example = torch.randn(1, 3, size, size)
    found = {"dense": dense}
    for label, multiple in (("odd", 1), ("rounded", 8)):
        for streams in (False, True):
            try:
                found[label] = prune_channels(
                    dense, example, share, round_to=multiple, prune_streams=streams
                ).model
                break
            except Exception:
                if streams:
                    raise
    return found


def measure(
    name: str, share: float, batch: int, device: str, size: int, quick: bool, dtype: torch.dtype
) -> dict[str, Any]:
    """Row of one case: candidate -> times, error against float64, MACs."""
    started = time.monotonic()
    networks = variants(name, share, size)
    row: dict[str, Any] = {"network": name, "share": share, "batch": batch, "size": size, "dtype": str(dtype)}
    row |= {"pruning_seconds": time.monotonic() - started, "candidates": {}, "failed": {}, "layers": {}}
    for label, network in networks.items():
        row[f"macs_{label}"] = profile(network, torch.randn(1, 3, size, size)).macs
    images = [torch.randn(batch, 3, size, size, device=device).to(dtype) for _ in range(2)]
    # Weights and maps of a network exceed the cache by themselves from small batches on.
    images = [image.contiguous(memory_format=LAST) for image in images]
    example = images[0].float()  # of the model's own dtype
    exact: dict[str, Tensor] = {}
    calls: dict[str, Callable[[], nn.Module]] = {}
    for label, network in networks.items():
        on_device = network.to(device)
        with torch.no_grad():
            exact[label] = copy.deepcopy(on_device).double()(images[0][:2].double())
        calls[label] = lambda net=on_device: folded_network(net, example, dtype)
        calls[f"{label}/optimized"] = lambda net=on_device: optimize_for_inference(
            net, example, dtype=dtype, cuda_graph=False
        )
    loops: dict[str, Loop] = {}
    for label, make in calls.items():
        if label == "dense/optimized" and quick:
            continue
        try:
            started = time.monotonic()
            network = make()
            with torch.no_grad():
                found = network(images[0])[:2]
            row["candidates"][label] = {
                "error": relative_error(exact[label.split("/")[0]], found),
                "preparation_seconds": time.monotonic() - started,
            }
            row["layers"][label] = getattr(network, "layers", {})
            loops[label] = Loop(network, [(image,) for image in images])
        except RuntimeError as failure:
            row["failed"][label] = str(failure)[:500]
            if "CUDA error" in str(failure):
                raise
    timed = interleaved(
        {n: loop.sample for n, loop in loops.items()}, samples=5 if quick else 10, min_seconds=0.03
    )
    for label, t in timed.items():
        row["candidates"][label] |= t.as_row()
    return row


def line(row: dict[str, Any]) -> str:
    """One line of the table, relative to the dense network."""
    base = row["candidates"].get("dense", {}).get("median_us")
    parts = [f"{row['network']} {row['share']:.0%} n={row['batch']}"]
    for name, c in row["candidates"].items():
        if "median_us" in c:
            gain = f" ({base / c['median_us']:.2f}x)" if base else ""
            kinds = list(row["layers"].get(name, {}).values())
            taken = f"own {kinds.count('own')} padded {kinds.count('padded')}"
            parts.append(f"{name} {c['median_us']:.0f}us{gain} err {c['error']:.0e} {taken}")
    return " | ".join(parts + [f"{name} FAILED: {text[:80]}" for name, text in row["failed"].items()])


def main() -> None:
    given = arguments(__doc__, only={"nargs": "*", "default": None, "help": "names of networks"})
    torch.backends.cudnn.benchmark = True
    cpu = given.device == "cpu"
    dtype = torch.float32 if cpu else torch.bfloat16
    cases = [("toy", 0.5, 2)] if cpu and not given.only else CASES[: 4 if given.quick else None]
    cases = [case for case in cases if not given.only or case[0] in given.only]
    warm_up(given.device)
    record = Record(given.out, "networks", given.device)
    for name, share, batch in cases:
        if time_left() < 15:
            print("out of time; what is measured is in the file")
            return
        try:
            row = measure(name, share, batch, given.device, 16 if cpu else 224, given.quick, dtype)
        except Exception as failure:
            record.add(
                network=name,
                share=share,
                batch=batch,
                failed={"case": f"{type(failure).__name__}: {failure}"[:500]},
            )
            print(f"{name} {share} n={batch}: FAILED: {failure}", flush=True)
            if "CUDA error" in str(failure):
                raise
            continue
        record.add(**row)
        print(line(row), flush=True)
    record.finish()


if __name__ == "__main__":
    main()
