"""Every tile and split of the tensor-core convolution on a few layers: what should `launch_cost` choose?

    python -m benchmarks.gpu.tiles [--quick]

Forces each choice through LIGHTNING_PRUNE_CUDA_TILE and writes the times, the best and what is chosen without force. Without
a GPU there is nothing to force: the CPU runs one kernel whatever the variable says.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu import shapes
from benchmarks.gpu.peers import candidates
from benchmarks.gpu.record import Record, arguments, time_left, variables
from benchmarks.gpu.timing import Loop, cache_bytes, interleaved, warm_up

VARIABLE = "LIGHTNING_PRUNE_CUDA_TILE"
#: from 15 on by warp groups: 16-bit types on sm_90
TILES = 29
LAYERS = [
    ("conv3x3", 37, 32), ("conv3x3", 101, 32), ("aligned", 64, 32), ("aligned", 128, 32), ("pointwise", 37, 32),
    ("conv3x3", 37, 1), ("conv3x3", 101, 1), ("pointwise", 101, 1), ("conv3x3", 101, 256),
]  # fmt: skip


def choices(layer: shapes.Layer, tiles: int = TILES) -> list[str]:
    """Every tile; split depths only where the map is small."""
    splits = (1, 2, 4, 8) if layer.batch * layer.size**2 <= 4096 else (1,)
    return [f"{tile}:{split}" for tile in range(tiles) for split in splits]


def best(times: dict[str, float]) -> tuple[str, float]:
    """Name of the fastest forced choice, and how many times slower the free one is."""
    name = min((n for n in times if n != "chosen"), key=times.__getitem__)
    return name, times["chosen"] / times[name]


def main() -> None:
    given = arguments(__doc__)
    cpu = given.device == "cpu"
    dtype = torch.float32 if cpu else torch.bfloat16
    warm_up(given.device)
    record = Record(given.out, "tiles", given.device)
    for kind, width, batch in LAYERS[: 2 if given.quick else None]:
        if time_left() < 5:
            return
        layer = shapes.layer(kind, width, batch)
        layer = shapes.tiny(layer) if cpu else layer
        own = next(
            c for c in candidates(layer, given.device, dtype, cache_bytes(given.device)) if c.name == "own"
        )
        loops: dict[str, Loop] = {}
        for choice in ["chosen", *choices(layer, 2 if cpu else TILES)]:
            with variables(**{VARIABLE: None if choice == "chosen" else choice}):
                loops[choice] = Loop(own.call, own.arguments[:64])
        # A CPU loop would read the variable when it runs; a captured graph has its kernels.
        timed = interleaved({n: loop.sample for n, loop in loops.items()}, samples=5, min_seconds=0.005)
        rows: dict[str, Any] = {name: t.as_row() for name, t in timed.items()}
        name, lost = best({n: t.median for n, t in timed.items()})
        record.add(**layer.as_row(), best=name, chosen_over_best=lost, candidates=rows)
        print(
            f"{layer.label():32} best {name:5} {rows[name]['median_us']:8.2f}us, chosen {lost:.2f}x of it",
            flush=True,
        )
        del loops
    record.finish()


if __name__ == "__main__":
    main()
