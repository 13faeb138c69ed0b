"""A progress bar while the layers' latencies are measured."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import lightning.pytorch as pl
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm


@contextlib.contextmanager
def measuring_bar(trainer: pl.Trainer) -> Iterator[Callable[[int, int, str], None]]:
    """A function ``(layers done, all layers, name of the layer)`` that moves a bar of the kind Lightning draws.

    Draws nothing where the Trainer draws nothing: with ``enable_progress_bar=False``, and on all ranks but the first. The bar
    appears with the first call and is gone afterwards.
    """
    bars: list[Tqdm] = []
    shown = trainer.progress_bar_callback is not None and trainer.is_global_zero

    def move(done: int, total: int, name: str) -> None:
        if not shown:
            return
        if not bars:
            bars.append(Tqdm(desc="Measuring latency", total=total, leave=False, dynamic_ncols=True))
        bars[0].n = done
        bars[0].set_postfix_str(name)

    try:
        yield move
    finally:
        for bar in bars:
            bar.close()
