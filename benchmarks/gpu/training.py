"""One training step of a pruned network: forward, backward and SGD, in every form in which a fit may run it.

Mixed precision (bfloat16 autocast), channels_last, synthetic images. ``dense`` is the network before pruning, ``masked`` the
same size with dead channels at zero, ``live_maps`` that network with maps of live channels and fused norms, ``cut`` the network
without its dead channels, ``rounded`` cut to multiples of 8. ``+norms``: norms by this package's operator where they are
faster. Odd widths lose most in the backward pass, where the vendor's kernels want aligned channels. A row per form.

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


#: most wanted first; every other form is timed in turns with the first
FORMS = ("dense", "cut", "cut+norms", "masked", "live_maps", "rounded", "rounded+norms", "dense+norms")
#: seconds below which no form is begun
LEAST = 8.0


class Forms:
    """Networks on the device, ready to train, made when they are asked for."""

    def __init__(self, name: str, share: float, size: int, device: str) -> None:
        dense = dense_network(name)
        example = torch.randn(2, 3, size, size)
        pruned = prune_channels(dense, example, share, prune_streams=True)
        self.device, self.size = device, size
        self._example, self._plan = example, pruned.plan
        self._graph = trace_channels(dense, example)
        self._networks = {
            "dense": dense,
            "cut": pruned.model,
            "masked": mask_channels(dense, example, pruned.plan),
            "rounded": prune_channels(dense, example, share, prune_streams=True, round_to=8).model,
        }
        self._expected: Tensor | None = None

    def get(self, label: str) -> tuple[nn.Module, Any]:
        """The network, and what hangs on it (kept alive, and asked how much it does)."""
        origin = "masked" if label == "live_maps" else label.removesuffix("+norms")
        network = copy.deepcopy(self._networks[origin]).to(self.device, memory_format=LAST)  # type: ignore[call-overload]
        network = network.train().requires_grad_(True)
        if label == "live_maps":
            skipper = DeadChannelSkipper(network, self._graph, self._example.to(self.device))
            skipper.set_mask(self._plan.mask(self._graph))
            return network, skipper
        return network, FusedNorms(network) if label.endswith("+norms") else None

    def difference(self, label: str, network: nn.Module) -> float | None:
        """Of the outputs in training mode from the masked network's, for forms that have to agree with it."""
        if label not in ("live_maps", "cut", "cut+norms"):
            return None
        if self._expected is None:
            self._expected = self._outputs(self.get("masked")[0])
        return float((self._outputs(network) - self._expected).norm() / self._expected.norm())

    def _outputs(self, network: nn.Module) -> Tensor:
        x = torch.randn(4, 3, self.size, self.size, generator=torch.Generator().manual_seed(1))
        with torch.no_grad(), torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            return network(x.to(self.device).contiguous(memory_format=LAST)).double()  # type: ignore[no-any-return]


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


def measure(name: str, share: float, batch: int, size: int, device: str, quick: bool, record: Record) -> bool:
    """A row per form, as soon as it is timed; whether there was time for all."""
    known = Forms(name, share, size, device)
    steps: dict[str, Callable[[], float]] = {}
    for label in FORMS:
        if steps and time_left() < LEAST:
            return False
        case = {"network": name, "share": share, "batch": batch, "size": size, "form": label}
        try:
            network, hung = known.get(label)
            difference = known.difference(label, network)
            step = step_of(network, batch, size, 10 if name == "toy" else 1000, device)
            pair = {**steps, label: step}
            timed = interleaved(pair, samples=5 if quick else 10, max_seconds=1.0)
        except Exception as failure:
            record.add(**case, failed=f"{type(failure).__name__}: {failure}"[:500])
            print(f"{name} {label}: FAILED: {failure}", flush=True)
            if "CUDA error" in str(failure):
                raise  # nothing after it can be trusted
            continue
        row = record.add(**case, difference_from_masked=difference, **timed[label].as_row())
        if "dense" in steps:
            row["dense_beside"] = timed["dense"].as_row()
            row["dense_over_this"] = timed["dense"].median / timed[label].median
        if isinstance(hung, FusedNorms):
            row["norms_by_operator"] = sum(any(call.won.values()) for call in hung._norms.values())
        if isinstance(hung, DeadChannelSkipper):
            row["obstacle"] = hung.obstacle
        record.save()
        print(line(row), flush=True)
        if label == "dense":
            steps["dense"] = step
    return True


def line(row: dict[str, Any]) -> str:
    """One line of the table."""
    parts = [f"{row['network']} {row['share']:.0%} n={row['batch']} {row['form']:14}"]
    parts.append(f"{row['median_us'] / 1e3:8.2f} ms ±{row['noise']:.0%}")
    parts += [f"{row['dense_over_this']:.2f}x"] if "dense_over_this" in row else []
    return " ".join(parts)


def main() -> None:
    given = arguments(__doc__)
    torch.backends.cudnn.benchmark = True
    cpu = given.device == "cpu"
    cases: list[tuple[str, float, int]] = (
        [("toy", 0.5, 4)] if cpu else [("resnet18", 0.5, 256), ("resnet50", 0.5, 128)]
    )
    warm_up(given.device)
    record = Record(given.out, "training", given.device)
    for name, share, batch in cases[: 1 if given.quick else None]:
        size = 16 if cpu else 224
        if time_left() < LEAST or not measure(name, share, batch, size, given.device, given.quick, record):
            print("out of time; what is measured is in the file")
            return
    record.finish()


if __name__ == "__main__":
    main()
