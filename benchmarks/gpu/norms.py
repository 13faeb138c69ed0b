"""Batch norm with ReLU, alone and behind a residual sum, forward and backward: torch's calls and this package's operator.

Training statistics, channels_last, bfloat16 maps with float32 parameters (on a CPU float32). ``vendor`` is torch's norm, sum
and ReLU; ``own`` the fused operator; with half of the channels dead, ``own_live`` leaves them out of full maps, ``own_compact``
and ``vendor_compact`` work on maps of the others alone. Times are of graph replays over buffers larger than the L2 cache.

    python -m benchmarks.gpu.norms [--quick] [--device cpu]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import ceilings
from benchmarks.gpu.record import Record, arguments, time_left
from benchmarks.gpu.timing import Loop, buffers_needed, cache_bytes, interleaved, warm_up
from lightning_prune.ops import reference_norm

EPS = 1e-5
#: channels, extent, batch, with a residual sum; most wanted first
CASES = [
    (256, 56, 32, True),
    (64, 56, 32, False),
    (37, 56, 32, False),
    (2048, 7, 32, True),
    (512, 14, 32, False),
    (101, 28, 32, True),
    (64, 112, 64, False),
    (16, 32, 256, False),
]


@dataclass
class Norm:
    """Parameters of one norm, and which of its channels live (None: all)."""

    weight: Tensor
    bias: Tensor
    live: Tensor | None = None
    compact: bool = False


def own(norm: Norm, x: Tensor, residual: Tensor | None, grad: Tensor) -> tuple[Tensor, ...]:
    """Output and gradients of x, residual, weight and bias by the operator."""
    op, compact_of = torch.ops.lightning_prune, len(norm.weight) if norm.compact else 0
    y, mean, var = op.masked_batch_norm_act(
        x, residual, norm.weight, norm.bias, None, None, None, norm.live, EPS, "relu", compact_of
    )
    given = (grad, x, residual, norm.weight, norm.bias, None, mean, var, norm.live, True, EPS, "relu")
    grads = op.masked_batch_norm_act_backward(
        *given, True, residual is not None, True, True, False, compact_of
    )
    return y, *grads[:4]


@torch.enable_grad()
def vendor(norm: Norm, x: Tensor, residual: Tensor | None, grad: Tensor) -> tuple[Tensor, ...]:
    """The same by torch's norm, sum and ReLU; of compact maps with the parameters' live part."""
    weight, bias = norm.weight, norm.bias
    if norm.compact and norm.live is not None:
        weight, bias = weight[norm.live], bias[norm.live]
    leaves = [t.detach().requires_grad_() for t in (x, residual, weight, bias) if t is not None]
    y = F.batch_norm(leaves[0], None, None, leaves[-2], leaves[-1], True, 0.0, EPS)
    y = F.relu(y if residual is None else y + leaves[1])
    return y.detach(), *torch.autograd.grad(y, leaves, grad)


def bytes_moved(elements: int, item: int, residual: bool) -> int:
    """Fewest bytes: statistics need one pass before the one that writes, either way; what the sums read is read again."""
    forward = 3 + residual
    backward = 2 * (2 + residual) + 1 + residual
    return (forward + backward) * elements * item


def exact_error(norm: Norm, x: Tensor, residual: Tensor | None, grad: Tensor) -> float:
    """Largest relative difference of the operator's output and gradients from float64, where the ReLU is not at its kink."""
    found = own(norm, x, residual, grad)
    double = [None if t is None else t.double() for t in (x, residual, norm.weight, norm.bias)]
    settings = (None, None, None, norm.live, EPS)
    compact_of = len(norm.weight) if norm.compact else 0
    exact, mean, var = reference_norm.masked_batch_norm_act(*double, *settings, "relu", compact_of)
    needs = (True, residual is not None, True, True, False)
    back = (*double, None, mean, var, norm.live, True, EPS, "relu", *needs, compact_of)
    grads = reference_norm.masked_batch_norm_act_backward(grad.double(), *back)
    errors = []
    for a, b in zip(found, (exact, *grads[:4]), strict=True):
        if b.numel():
            errors.append(float((a.double() - b).norm() / b.norm().clamp(min=1e-12)))
    return max(errors)


def maps(channels: int, size: int, batch: int, count: int, device: str, dtype: torch.dtype) -> list[Tensor]:
    """Random maps, channels_last."""
    shape = (batch, channels, size, size)
    found = (torch.randn(shape, device=device, dtype=torch.float32) for _ in range(count))
    return [t.to(dtype).contiguous(memory_format=torch.channels_last) for t in found]


def measure(case: tuple[int, int, int, bool], device: str, dtype: torch.dtype, quick: bool) -> dict[str, Any]:
    """Row of one case: candidate -> times, bytes per second, error."""
    channels, size, batch, residual = case
    elements = batch * channels * size * size
    moved = bytes_moved(elements, dtype.itemsize, residual)
    count = buffers_needed(moved / 4, cache_bytes(device))
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    weight, bias = (
        torch.rand(channels, device=device, dtype=wide) + 0.5,
        torch.randn(channels, device=device, dtype=wide),
    )
    live = torch.arange(0, channels, 2, device=device)
    forms: dict[str, tuple[Callable[..., Any], Norm, int]] = {
        "vendor": (vendor, Norm(weight, bias), channels),
        "own": (own, Norm(weight, bias), channels),
        "own_live": (own, Norm(weight, bias, live), channels),
        "vendor_compact": (vendor, Norm(weight, bias, live, True), len(live)),
        "own_compact": (own, Norm(weight, bias, live, True), len(live)),
    }
    row: dict[str, Any] = {
        "channels": channels, "size": size, "batch": batch, "residual": residual, "dtype": str(dtype), "bytes": moved,
        "candidates": {}, "failed": {},
    }  # fmt: skip
    loops: dict[str, Loop] = {}
    for name, (function, norm, width) in forms.items():
        given = [maps(width, size, batch, count, device, dtype) for _ in range(3)]
        sums = given[1] if residual else [None] * count
        sets = list(zip(given[0], sums, given[2], strict=True))
        try:
            if function is own:
                row["candidates"][name] = {"error": exact_error(norm, *sets[0])}
            loops[name] = Loop(lambda *a, f=function, n=norm: f(n, *a), sets)  # type: ignore[arg-type,misc]
        except RuntimeError as failure:
            row["failed"][name] = str(failure)[:500]
            if "CUDA error" in str(failure):
                raise  # nothing after it can be trusted
    for name, timed in interleaved(
        {n: loop.sample for n, loop in loops.items()}, samples=5 if quick else 10
    ).items():
        part = forms[name][2] / channels
        row["candidates"].setdefault(name, {}).update(
            timed.as_row(), bytes_per_second=part * moved / timed.median
        )
    return row


def line(row: dict[str, Any], copy: float) -> str:
    """One line of the table; ``copy``: bytes per second of a plain copy here."""
    parts = [f"{row['channels']:5} x {row['size']:3} x {row['batch']:3}{' +' if row['residual'] else '  '}"]
    for name, c in row["candidates"].items():
        if "median_us" in c:
            error = f" err {c['error']:.0e}" if "error" in c else ""
            parts.append(f"{name} {c['median_us']:8.1f}us {c['bytes_per_second'] / copy:4.0%} of copy{error}")
    return " | ".join(parts + [f"{name} FAILED: {text[:60]}" for name, text in row["failed"].items()])


def main() -> None:
    given = arguments(__doc__)
    cpu = given.device == "cpu"
    dtype = torch.float32 if cpu else torch.bfloat16
    rates = ceilings.known(given.out, given.device, given.quick)
    warm_up(given.device)
    record = Record(given.out, "norms", given.device, ceilings=rates)
    for case in CASES[: 3 if given.quick else None]:
        if time_left() < 3:
            print("out of time; what is measured is in the file")
            return
        chosen = (case[0], min(case[1], 8), 2, case[3]) if cpu else case
        row = measure(chosen, given.device, dtype, given.quick)
        record.add(**row)
        print(line(row, rates["copy"]), flush=True)
        torch.cuda.empty_cache()
    record.finish()


if __name__ == "__main__":
    main()
