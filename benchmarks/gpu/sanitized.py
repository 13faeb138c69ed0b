"""A few calls of every kernel family on small ragged shapes, compared with float64: run this under compute-sanitizer.

Small maps would all choose the same low tile, so tiles are forced. References are computed on the CPU: under the sanitizer
a GPU should run our kernels and little else.

compute-sanitizer --tool memcheck --error-exitcode 9 python -m benchmarks.gpu.sanitized
compute-sanitizer --tool racecheck --error-exitcode 9 python -m benchmarks.gpu.sanitized
"""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Iterable, Iterator

import torch

from benchmarks.gpu.peers import LAST, kernels_run, padded_maps
from benchmarks.gpu.record import arguments, variables
from benchmarks.gpu.tiles import VARIABLE as TILE
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


#: warp by warp, then by warp groups; of both the largest, the smallest, and some between
WARP_TILES, GROUP_TILES = (0, 5, 8, 11, 14), (15, 17, 20, 24, 26, 28)


def check(case: tuple[int, ...], dtype: torch.dtype, device: str, form: str, choices: Iterable[str]) -> float:
    """Largest relative error of an inference convolution with residual and ReLU, over forced tiles and splits."""
    inputs, outputs, size, kernel, stride, padding, dilation, groups, batch = case
    conv = torch.nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups).to(dtype).eval()
    module = CompactConv2d.from_conv(copy.deepcopy(conv).to(device), None, "relu", backend="own")
    x = torch.randn(batch, inputs, size, size).to(dtype)
    with torch.no_grad():
        exact = conv.double()(x.double())
        residual = torch.randn_like(exact).to(dtype)
        exact = torch.relu(exact + residual.double())
        x, residual = (laid_out(t.to(device), form) for t in (x, residual))
        errors = []
        for choice in choices:
            with variables(**{TILE: choice or None}):
                y = module(x, residual).cpu()
            good = y.shape == exact.shape and bool(y.isfinite().all())
            errors.append(
                float((y.double() - exact).abs().max() / exact.abs().max()) if good else float("inf")
            )
    return max(errors)


def laid_out(x: torch.Tensor, form: str) -> torch.Tensor:
    """In channels_last with room behind the channels, in channels_last, or as it is."""
    return padded_maps(x) if form == "padded" else x.contiguous(memory_format=LAST) if form == "last" else x


def calls(quick: bool, groups: bool) -> Iterator[tuple[tuple[int, ...], torch.dtype, str, list[str]]]:
    """Case, dtype, form and choices of tiles ("": free): the tiles first, on one case, then every form of every case."""
    for dtype in BOUND:
        tiles = WARP_TILES + (GROUP_TILES if groups and dtype.itemsize == 2 else ())
        yield CASES[0], dtype, "padded", [f"{tile}:{splits}" for tile in tiles for splits in (1, 2)]
    cases = CASES[:2] + CASES[4:5] if quick else CASES
    for case, dtype, form in itertools.product(cases, BOUND, ("padded", "last", "first")):
        yield case, dtype, form, [""] if quick else ["", str(WARP_TILES[2])]


def check_norm(device: str, dtype: torch.dtype, last: bool, compact: bool, channels: int) -> float:
    """Relative error of the fused norm and its gradients: live channels of full maps, or maps of live channels."""
    live = torch.arange(0, channels, 3)
    width = len(live) if compact else channels
    maps = [torch.randn(3, width, 6, 5).to(dtype) for _ in range(3)]
    if last:
        maps = [t.contiguous(memory_format=LAST) for t in maps]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    vectors = [torch.randn(channels, dtype=wide) for _ in range(3)]
    found = []
    for function in (torch.ops.lightning_prune.masked_batch_norm_act, reference_norm.masked_batch_norm_act):
        double = function is reference_norm.masked_batch_norm_act
        where = "cpu" if double else device
        leaves = [
            (t.double() if double else t.to(where, copy=True)).requires_grad_() for t in (*maps[:2], *vectors)
        ]
        settings = (None, None, live.to(where), 0.1, "silu", channels if compact else 0)
        y, mean, var = function(*leaves, *settings)
        grads = torch.autograd.grad(y, leaves, maps[2].to(where, y.dtype))
        found.append([y.detach(), mean.detach(), var.detach(), *grads])
    return max(
        float((a.cpu().double() - b).abs().max() / b.abs().max().clamp(min=1))
        for a, b in zip(*found, strict=True)
    )


def check_masked(device: str, compact: bool) -> float:
    """Relative error of the masked convolution and its gradients, with a gate of its inputs."""
    x = torch.randn(2, 11, 6, 6)
    weight, in_gate = torch.randn(9, 11, 3, 3), torch.randn(11)
    live_in, live_out = torch.tensor([0, 2, 3, 7, 10]), torch.tensor([1, 2, 8])
    place = ([1, 1], [1, 1], [1, 1], 1, "relu")
    settings = (None, None, live_in, live_out, *place)
    doubles = [t.double().requires_grad_() for t in (x, weight, in_gate)]
    exact = reference.masked_conv2d(doubles[0] * doubles[2][:, None, None], doubles[1], *settings)
    exact.square().sum().backward()
    given = (x[:, live_in] if compact else x, weight, in_gate)
    singles = [t.to(device, copy=True).requires_grad_() for t in given]
    settings = (None, None, live_in.to(device), live_out.to(device), *place)
    y = torch.ops.lightning_prune.masked_conv2d(*singles[:2], *settings, "auto", singles[2], compact)
    y.square().sum().backward()
    expected = [exact.detach(), *(t.grad for t in doubles)]
    if compact:
        expected[:2] = exact.detach()[:, live_out], doubles[0].grad[:, live_in]  # type: ignore[index]
    found = [y.detach(), *(t.grad for t in singles)]
    return max(
        float((a.cpu().double() - b).abs().max() / b.abs().max())
        for a, b in zip(found, expected, strict=True)
    )  # type: ignore[union-attr]


def main() -> None:
    print("started", flush=True)
    given = arguments(__doc__)
    possible = kernels_run(given.device, torch.float32)
    if not possible.ok:  # plain torch code would pass every check
        sys.exit(f"nothing to check: {possible.reason}")
    torch.manual_seed(0)
    worst = 0.0
    groups = given.device == "cpu" or torch.cuda.get_device_capability()[0] == 9
    launches = 0
    for case, dtype, form, choices in calls(given.quick, groups):
        error, bound = check(case, dtype, given.device, form, choices), BOUND[dtype]
        worst, launches = max(worst, error / bound), launches + len(choices)
        if not error <= bound:
            print(f"WRONG {case} {dtype} {form} {choices}: error {error:.2e}, bound {bound:.0e}", flush=True)
    print(f"{launches} convolutions, worst error over its bound {worst:.2f}", flush=True)
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
