"""A few calls of every kernel family on small ragged shapes, compared with float64: run this under compute-sanitizer.

compute-sanitizer --tool memcheck --error-exitcode 9 python -m benchmarks.gpu.sanitized
compute-sanitizer --tool racecheck --error-exitcode 9 python -m benchmarks.gpu.sanitized
"""

from __future__ import annotations

import sys

import torch

from benchmarks.gpu.peers import LAST, padded_maps
from benchmarks.gpu.record import arguments
from lightning_prune import ops
from lightning_prune.nn import CompactConv2d
from lightning_prune.ops import reference

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


def check_masked(device: str) -> float:
    """Relative error of the masked convolution and its gradients."""
    x = torch.randn(2, 11, 6, 6, device=device, requires_grad=True)
    weight = torch.randn(9, 11, 3, 3, device=device, requires_grad=True)
    live_in, live_out = (torch.tensor(v, device=device) for v in ([0, 2, 3, 7, 10], [1, 2, 8]))
    grads = []
    for double in (False, True):
        leaves = [t.detach().double() if double else t.detach().clone() for t in (x, weight)]
        leaves = [t.requires_grad_() for t in leaves]
        function = reference.masked_conv2d if double else ops.masked_conv2d
        y = function(*leaves, None, None, live_in, live_out, (1, 1), (1, 1), (1, 1), 1, "relu")
        y.square().sum().backward()
        grads.append([y.detach(), *(t.grad for t in leaves)])
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(*grads, strict=True))


def main() -> None:
    given = arguments(__doc__)
    torch.manual_seed(0)
    worst = 0.0
    for case in CASES[:2] + CASES[4:5] if given.quick else CASES:
        for dtype, bound in BOUND.items():
            for form in ("padded", "last", "first"):
                error = check(case, dtype, given.device, form)
                worst = max(worst, error / bound)
                if not error <= bound:
                    print(f"WRONG {case} {dtype} {form}: error {error:.2e}, bound {bound:.0e}", flush=True)
    error = check_masked(given.device)
    worst = max(worst, error / 1e-5)
    print(f"masked_conv2d error {error:.1e}; worst error over its bound {worst:.2f}")
    sys.exit(0 if worst <= 1 else 1)


if __name__ == "__main__":
    main()
