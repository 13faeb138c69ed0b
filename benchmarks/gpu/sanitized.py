"""A few calls of every kernel family on small ragged shapes, compared with float64: run this under compute-sanitizer.

compute-sanitizer --tool memcheck --error-exitcode 9 python -m benchmarks.gpu.sanitized
compute-sanitizer --tool racecheck --error-exitcode 9 python -m benchmarks.gpu.sanitized
"""

from __future__ import annotations

import itertools
import os
import sys

import torch

from benchmarks.gpu.peers import LAST, padded_maps
from benchmarks.gpu.record import arguments
from lightning_prune.nn import CompactConv2d
from lightning_prune.ops import reference, reference_norm

#: dtype -> largest error over the largest value; float32 may run in tf32
BOUND = {torch.float32: 5e-3, torch.bfloat16: 2e-2, torch.float16: 4e-3}
#: inputs, outputs, size, kernel, stride, padding, dilation, groups, batch
CASES = [
    (37, 41, 9, 3, 1, 1, 1, 1, 2),
    (13, 70, 7, 1, 1, 0, 1, 1, 3),
    (101, 19, 6, 3, 2, 2, 2, 1, 1),
    (5, 9, 5, 2, 1, 0, 1, 1, 1),
    (37, 37, 9, 3, 1, 1, 1, 37, 2),
    (12, 18, 6, 3, 2, 1, 1, 3, 2),
]


def check(case: tuple[int, ...], dtype: torch.dtype, device: str, form: str) -> float:
    """Relative error of one inference convolution with residual and ReLU."""
    inputs, outputs, size, kernel, stride, padding, dilation, groups, batch = case
    conv = (
        torch.nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups).to(device, dtype).eval()
    )
    module = CompactConv2d.from_conv(conv, None, "relu", backend="own")
    x = torch.randn(batch, inputs, size, size, device=device).to(dtype)
    x = padded_maps(x) if form == "padded" else x.contiguous(memory_format=LAST) if form == "last" else x
    with torch.no_grad():
        exact = conv.double()(x.double())
        residual = torch.randn_like(exact).to(dtype)
        exact = torch.relu(exact + residual.double())
        y = module(x, padded_maps(residual) if form == "padded" else residual)
    if y.shape != exact.shape or not bool(y.isfinite().all()):
        return float("inf")
    return float((y.double() - exact).abs().max() / exact.abs().max())


def check_norm(device: str, dtype: torch.dtype, last: bool, compact: bool, channels: int) -> float:
    """Relative error of the fused norm and its gradients: live channels of full maps, or maps of live channels."""
    live = torch.arange(0, channels, 3, device=device)
    width = len(live) if compact else channels
    maps = [torch.randn(3, width, 6, 5, device=device).to(dtype) for _ in range(3)]
    if last:
        maps = [t.contiguous(memory_format=LAST) for t in maps]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    vectors = [torch.randn(channels, device=device, dtype=wide) for _ in range(3)]
    settings = (None, None, live, 0.1, "silu", channels if compact else 0)
    found = []
    for function in (torch.ops.lightning_prune.masked_batch_norm_act, reference_norm.masked_batch_norm_act):
        double = function is reference_norm.masked_batch_norm_act
        leaves = [(t.double() if double else t.clone()).requires_grad_() for t in (*maps[:2], *vectors)]
        y, mean, var = function(*leaves, *settings)
        grads = torch.autograd.grad(y, leaves, maps[2].to(y.dtype))
        found.append([y.detach(), mean.detach(), var.detach(), *grads])
    return max(
        float((a.double() - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in zip(*found, strict=True)
    )


def check_masked(device: str, compact: bool) -> float:
    """Relative error of the masked convolution and its gradients, with a gate of its inputs."""
    x = torch.randn(2, 11, 6, 6, device=device)
    weight, in_gate = torch.randn(9, 11, 3, 3, device=device), torch.randn(11, device=device)
    live_in, live_out = (torch.tensor(v, device=device) for v in ([0, 2, 3, 7, 10], [1, 2, 8]))
    settings = (None, None, live_in, live_out, [1, 1], [1, 1], [1, 1], 1, "relu")
    doubles = [t.double().requires_grad_() for t in (x, weight, in_gate)]
    exact = reference.masked_conv2d(doubles[0] * doubles[2][:, None, None], doubles[1], *settings)
    exact.square().sum().backward()
    singles = [t.clone().requires_grad_() for t in (x[:, live_in] if compact else x, weight, in_gate)]
    y = torch.ops.lightning_prune.masked_conv2d(*singles[:2], *settings, "auto", singles[2], compact)
    y.square().sum().backward()
    expected = [exact.detach(), *(t.grad for t in doubles)]
    if compact:
        expected[:2] = exact.detach()[:, live_out], doubles[0].grad[:, live_in]  # type: ignore[index]
    found = [y.detach(), *(t.grad for t in singles)]
    return max(
        float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True)
    )  # type: ignore[union-attr]


def main() -> None:
    given = arguments(__doc__)
    torch.manual_seed(0)
    worst = 0.0
    cases = CASES[:2] + CASES[4:5] if given.quick else CASES
    forms = ("padded", "last", "first")
    # Products of single warps, then of warp groups, which only half types have.
    for groups, case, (dtype, bound), form in itertools.product("01", cases, BOUND.items(), forms):
        if groups == "1" and dtype == torch.float32:
            continue
        os.environ["LIGHTNING_PRUNE_CUDA_GROUPS"] = groups
        error = check(case, dtype, given.device, form)
        worst = max(worst, error / bound)
        if not error <= bound:
            print(f"WRONG {case} {dtype} {form} {groups=}: error {error:.2e}, bound {bound:.0e}", flush=True)
    for dtype, bound in {torch.float64: 1e-11, **BOUND}.items():
        if given.device == "cpu" and dtype in (torch.bfloat16, torch.float16):
            continue
        for last in (True, False):
            for compact in (True, False):
                for channels in (37, 8) if given.quick else (1, 8, 37, 64, 643):
                    error = check_norm(given.device, dtype, last, compact, channels)
                    worst = max(worst, error / bound)
                    if not error <= bound:
                        print(
                            f"WRONG norm {dtype} {last=} {compact=} {channels}: error {error:.2e}", flush=True
                        )
    error = max(check_masked(given.device, compact) for compact in (False, True))
    worst = max(worst, error / 1e-5)
    print(f"masked_conv2d error {error:.1e}; worst error over its bound {worst:.2f}")
    sys.exit(0 if worst <= 1 else 1)


if __name__ == "__main__":
    main()
