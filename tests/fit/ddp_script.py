"""Run by test_ddp.py: fit with ``devices`` processes and write what every rank ended with.

``kernels``: empty for a network without norms, whose kernels are chosen by the clock; "torch" for one with norms on torch's
kernels; "nchw" and "nhwc" for that network in this memory format, on the compiled kernels alone.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, Subset

from lightning_prune import ChannelPruning, conv_ways, fused_norms, skipping
from tests.fit.toys import ToyModule, toy_data, trainer


def force_kernels() -> dict[str, int]:
    """Compiled kernels win every comparison, at any size; how often each runs, counted from now on."""
    calls = dict.fromkeys(("convolution", "norm"), 0)

    def counted(name: str, call: Any) -> Any:
        def counting(*args: Any) -> Any:
            calls[name] += 1
            return call(*args)

        return counting

    skipping.LEAST_MACS = fused_norms.LEAST_ELEMENTS = 0
    skipping._measure = lambda *args: skipping.Choice(*[conv_ways.SKIP] * 3)
    fused_norms._measure = lambda *args: True
    conv_ways.forward = counted("convolution", conv_ways.forward)
    fused_norms._forward = counted("norm", fused_norms._forward)
    return calls


def main(devices: int, folder: str, every: int, kernels: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = ToyModule()
    calls: dict[str, int] = {}
    if kernels == "":  # per-rank batch statistics would make the two runs differ for a good reason
        module.net.bn = nn.Identity()
    elif kernels != "torch":
        calls = force_kernels()
    if kernels == "nhwc":
        module.to(memory_format=torch.channels_last)
    callback = ChannelPruning(target=0.5, warmup_epochs=1, learn_epochs=3, finetune_epochs=1, gate_lr=0.05,
                              distill=0.5, recalibrate=True, reentry_until=0.3,
                              reconfigure_every_n_epochs=every, dead_channel_skipping=kernels != "torch")  # fmt: skip
    gates: list[torch.Tensor] = []
    sizes: list[int] = []
    steps: list[torch.Tensor] = []

    class Watch(Callback):
        def on_train_batch_end(self, *unused: object) -> None:
            state = module.state_dict()  # full-size, also while the module is not
            steps.append(torch.cat([state[name].flatten() for name, _ in module.named_parameters()]))
            sizes.append(sum(p.numel() for p in module.parameters()))
            if callback._fit.learner is not None:
                gates.append(callback._fit.learner.gates.values.detach().clone())

    options = {"strategy": "ddp", "devices": devices, "use_distributed_sampler": False} if devices > 1 else {}
    if kernels:
        options |= {"precision": "64-true"}
    fit = trainer([callback, Watch()], 5, **options)
    # every rank takes each devices-th sample, so that the ranks' batches together are the single process's batch
    mine = Subset(toy_data(), range(int(os.environ.get("LOCAL_RANK", "0")), 96, devices))
    fit.fit(module, DataLoader(mine, batch_size=16 // devices))
    assert callback.plan is not None
    result = {
        "removed": callback.plan.removed,
        "gates": torch.stack(gates),
        "weights": torch.stack(steps),
        "sizes": sizes,
        "live": [r["live_channels"] for r in callback.history],
        "buffers": [b.double() for b in module.buffers()],
        "calls": calls,
    }
    torch.save(result, f"{folder}/{devices}-{every}-{kernels}-{fit.global_rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4])
