"""One training step after pruning: forward, backward and SGD of the dense, the odd and the rounded network.

Mixed precision (bfloat16 autocast), channels_last, synthetic images. Odd widths lose most in the backward pass, where the
vendor's kernels want aligned channels.

    python -m benchmarks.gpu.training [--quick] [--device cpu]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.gpu.networks import variants
from benchmarks.gpu.record import Record, arguments, time_left
from benchmarks.gpu.timing import interleaved, warm_up


def step_of(network: nn.Module, batch: int, size: int, classes: int, device: str) -> Callable[[], float]:
    """A function that does one step and returns its seconds."""
    network = network.to(device, memory_format=torch.channels_last).train().requires_grad_(True)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
    x = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(classes, (batch,), device=device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16):
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

    for _ in range(2):
        timed()
    return timed


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
        networks = variants(name, share, size)
        classes = 10 if name == "toy" else 1000
        steps = {
            label: step_of(network, batch, size, classes, given.device) for label, network in networks.items()
        }
        timed = interleaved(steps, samples=5 if given.quick else 10, max_seconds=3.0)
        row: dict[str, Any] = {label: t.as_row() for label, t in timed.items()}
        record.add(network=name, share=share, batch=batch, size=size, candidates=row)
        print(
            name,
            share,
            {label: f"{r['median_us'] / 1e3:.2f} ms ±{r['noise']:.0%}" for label, r in row.items()},
            flush=True,
        )
    record.finish()


if __name__ == "__main__":
    main()
