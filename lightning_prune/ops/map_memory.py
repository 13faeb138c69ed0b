"""Memory that training steps keep for their maps."""

from __future__ import annotations

import torch

from lightning_prune.ops.availability import extension_available


def release_maps() -> None:
    """Give the memory of maps that no tensor holds back to the system.

    ``masked_conv2d`` and ``masked_batch_norm_act`` keep the memory of their outputs and gradients on the CPU, because fresh
    memory costs a page fault every 4 KB; it is in huge pages where the system gives them on request. Nothing happens without
    the compiled extension.
    """
    if extension_available():
        torch.ops.lightning_prune.release_maps()
