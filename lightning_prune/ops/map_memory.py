"""Memory that training steps keep for their maps."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lightning_prune.ops.availability import extension_available


class MapMemory(NamedTuple):
    """What is kept for maps.

    Attributes:
        live: bytes of the maps that tensors hold.
        blocks: how many these are.
        peak: most bytes of such maps at a time since all was given back last.
        kept: bytes of memory that lie ready, those of live maps included, in huge pages of 2 MiB; at most the larger one of
            ``1.25 * peak`` + 32 MiB and ``live`` + 4 MiB per block.
    """

    live: int = 0
    blocks: int = 0
    peak: int = 0
    kept: int = 0


def map_memory() -> MapMemory:
    """What this process keeps for maps on the CPU: nothing without the compiled extension, and on other systems than Linux."""
    return MapMemory(*torch.ops.lightning_prune.map_memory()) if extension_available() else MapMemory()


def release_maps() -> None:
    """Give the memory of maps that no tensor holds back to the system, and that of the others as soon as nobody holds them.

    ``masked_conv2d`` and ``masked_batch_norm_act`` keep the memory of their outputs and gradients on the CPU, because fresh
    memory costs a page fault every 4 KB; it is in huge pages where the system gives them on request. The next such call keeps
    memory again. Nothing happens without the compiled extension.
    """
    if extension_available():
        torch.ops.lightning_prune.release_maps()
