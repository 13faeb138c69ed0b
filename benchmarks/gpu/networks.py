"""Whole networks pruned to a share of their MACs: what does `optimize_for_inference` gain over torch, padded widths, dense?

Random weights, random images, bfloat16, channels_last, one CUDA graph per candidate. Widths are chosen by this package's
own pruning, once freely (``odd``) and once in multiples of 8 (``rounded``). A name alone means folded norms on torch's
kernels, ``/padded`` these at multiples of 8 channels, ``/own`` ours everywhere, ``/own_groups`` that with tiles of warp groups,
and ``/optimized`` what `optimize_for_inference` chooses. The file is rewritten after every candidate.

    python -m benchmarks.gpu.networks [--quick] [--device cpu] [--only resnet50]
"""

from __future__ import annotations

import copy
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.peers import GROUPS, LAST, kernels_run, warp_groups
from benchmarks.gpu.record import Record, arguments, time_left, variables
from benchmarks.gpu.timing import Loop, interleaved, warm_up
from lightning_prune import optimize_for_inference, prune_channels
from lightning_prune.inference.optimize import OptimizedModule
from lightning_prune.inference.sites import FoldedConv2d
from lightning_prune.inference.symbolic import SymbolicBlueprint
from lightning_prune.inputs import to_model
from lightning_prune.profiling import profile

#: (timm name, share of the MACs, batch), most wanted first
CASES = [
    (name, share, batch)
    for share, batch in ((0.5, 1), (0.5, 32), (0.25, 1), (0.25, 32), (0.5, 256))
    for name in ("resnet18", "resnet50", "mobilenetv2_100", "vgg16_bn")
]
#: seconds below which no candidate is begun
LEAST = 8.0


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


def with_kernels(model: nn.Module, example: Tensor, kind: str, dtype: torch.dtype) -> nn.Module:
    """The folded network with every convolution of one kind: ``vendor``, ``padded`` to multiples of 8, or ``own``.

    Nothing is measured for it, and convolutions that have no such form are the vendor's.
    """
    blueprint = SymbolicBlueprint(copy.deepcopy(model).eval(), to_model(example, model))
    modules = [getattr(site, kind)() or site.vendor() for site in blueprint.sites]
    layers = {
        site.name: kind if type(module) is not FoldedConv2d else "vendor"
        for site, module in zip(blueprint.sites, modules, strict=True)
    }
    network = blueprint.build(modules).to(dtype).to(memory_format=LAST)  # type: ignore[call-overload]
    return OptimizedModule(network, "channels_last", dtype, layers)


def optimized(model: nn.Module, example: Tensor, dtype: torch.dtype) -> nn.Module:
    """What `optimize_for_inference` chooses, by graph replays; without its graph, since the copy is captured once more."""
    return copy.deepcopy(optimize_for_inference(model, example, dtype=dtype))


def relative_error(exact: Tensor, found: Tensor) -> float:
    """Largest difference from the float64 outputs over the largest of them."""
    return float((found.double() - exact).abs().max() / exact.abs().max())


class Variants:
    """The dense network and its pruned ones, each made when it is asked for: choosing widths takes a while."""

    def __init__(self, name: str, share: float, size: int) -> None:
        self.share = share
        self._found = {"dense": dense_network(name)}
        self._example = torch.randn(1, 3, size, size)
        self._macs: dict[str, int] = {}
        self._dense = copy.deepcopy(self._found["dense"])  # stays on the CPU

    def get(self, label: str) -> nn.Module:
        """``dense``, ``odd`` or ``rounded``; streams are pruned too where the share cannot be reached without."""
        if label not in self._found:
            started = time.monotonic()
            multiple = {"odd": 1, "rounded": 8}[label]
            try:
                self._found[label] = self._pruned(multiple, streams=False)
            except Exception:
                self._found[label] = self._pruned(multiple, streams=True)
            print(f"  {label} widths found in {time.monotonic() - started:.1f} s", flush=True)
        return self._found[label]

    def macs(self, label: str) -> int:
        """Of one image."""
        if label not in self._macs:
            self._macs[label] = profile(copy.deepcopy(self.get(label)).cpu(), self._example).macs
        return self._macs[label]

    def _pruned(self, multiple: int, streams: bool) -> nn.Module:
        return prune_channels(
            self._dense, self._example, self.share, round_to=multiple, prune_streams=streams
        ).model


def plan(ours: bool, groups: bool) -> list[tuple[str, str, str]]:
    """Candidate, network and how it runs, most wanted first."""
    found = [("odd", "odd", "vendor")]
    found += [("odd/optimized", "odd", "optimized"), ("odd/own", "odd", "own")] if ours else []
    found += [("odd/own_groups", "odd", "own")] if ours and groups else []
    found += [("odd/padded", "odd", "padded"), ("rounded", "rounded", "vendor"), ("dense", "dense", "vendor")]
    found += [("rounded/optimized", "rounded", "optimized")] if ours else []
    return found + ([("dense/optimized", "dense", "optimized")] if ours else [])


def exact_outputs(network: nn.Module, images: Tensor) -> Tensor:
    """In float64; one call, so nothing is tried for it."""
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, benchmark=False):
        return copy.deepcopy(network).double()(images.double())  # type: ignore[no-any-return]


def measure(
    case: tuple[str, float, int],
    networks: Variants,
    device: str,
    size: int,
    quick: bool,
    dtype: torch.dtype,
    record: Record,
) -> dict[str, Any]:
    """Row of one case: candidate -> times, error against float64; written after every candidate.

    A candidate is first timed in turns with ``odd``, in the end all of them together (``interleaved``).
    """
    name, share, batch = case
    row = record.add(
        network=name, share=share, batch=batch, size=size, dtype=str(dtype), candidates={}, failed={}, layers={},
        interleaved=False, complete=False,
    )  # fmt: skip
    images = [torch.randn(batch, 3, size, size, device=device).to(dtype) for _ in range(2)]
    # Weights and maps of a network exceed the cache by themselves from small batches on.
    images = [image.contiguous(memory_format=LAST) for image in images]
    example = images[0].float()  # of the model's own dtype
    exact: dict[str, Tensor] = {}
    loops: dict[str, Loop] = {}

    def time_together(names: list[str], **settings: Any) -> None:
        for label, t in interleaved({n: loops[n].sample for n in names}, **settings).items():
            row["candidates"][label] |= t.as_row()

    wanted = plan(kernels_run(device, dtype).ok, warp_groups(device, dtype))
    for label, origin, kind in wanted[: 5 if quick and device == "cuda" else None]:
        if loops and time_left() < LEAST:
            break
        try:
            network = networks.get(origin).to(device)
            started = time.monotonic()
            if origin not in exact:
                row[f"macs_{origin}"] = networks.macs(origin)
                exact[origin] = exact_outputs(network, images[0][:2])
            make = optimized if kind == "optimized" else partial(with_kernels, kind=kind)
            ready = make(network, example, dtype=dtype)
            with torch.no_grad(), variables(**({GROUPS: "1"} if label.endswith("_groups") else {})):
                found = ready(images[0])[:2]
                loops[label] = Loop(ready, [(image,) for image in images])
            row["layers"][label] = getattr(ready, "layers", {})
            row["candidates"][label] = {
                "error": relative_error(exact[origin], found),
                "preparation_seconds": time.monotonic() - started,
            }
            time_together(list(dict.fromkeys((next(iter(loops)), label))), samples=5, min_seconds=0.01)
            print(f"  {label}: {row['candidates'][label]['median_us']:.0f} us", flush=True)
        except Exception as failure:
            loops.pop(label, None)
            row["failed"][label] = f"{type(failure).__name__}: {failure}"[:500]
            if "CUDA error" in str(failure):
                record.save()
                raise  # nothing after it can be trusted
        record.save()
    else:
        row["complete"] = True
    if loops:
        time_together(list(loops), samples=5 if quick else 10, min_seconds=0.03)
        row["interleaved"] = True
    record.save()
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
    size = 16 if cpu else 224
    known: dict[tuple[str, float], Variants] = {}
    for name, share, batch in cases:
        if time_left() < LEAST:
            print("out of time; what is measured is in the file")
            return
        try:
            if (name, share) not in known:
                known[name, share] = Variants(name, share, size)
            print(f"{name} {share:.0%} n={batch}", flush=True)
            row = measure(
                (name, share, batch), known[name, share], given.device, size, given.quick, dtype, record
            )
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
        print(line(row), flush=True)
    record.finish()


if __name__ == "__main__":
    main()
