"""Run by test_ddp.py: fit with ``devices`` processes and write what every rank ended with."""

from __future__ import annotations

import os
import sys

import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, Subset

from lightning_prune import ChannelPruning
from tests.fit.toys import ToyModule, toy_data, trainer


def main(devices: int, folder: str, every: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = ToyModule()
    module.net.bn = (
        nn.Identity()
    )  # per-rank batch statistics would make the two runs differ for a good reason
    callback = ChannelPruning(target=0.5, warmup_epochs=1, learn_epochs=3, finetune_epochs=1, gate_lr=0.05,
                              distill=0.5, recalibrate=True, reentry_until=0.3,
                              reconfigure_every_n_epochs=every)  # fmt: skip
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
    }
    torch.save(result, f"{folder}/{devices}-{every}-{fit.global_rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
