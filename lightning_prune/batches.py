"""Find an example input for a LightningModule without disturbing its data."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from .errors import TraceError
from .inputs import ExampleInputs, first_rows

_KEYS = ("x", "image", "images", "input", "inputs", "pixel_values", "img", "data")
_ROWS = 2


def inputs_from_batch(batch: Any, rows: int | None = _ROWS) -> ExampleInputs | None:
    """What ``forward`` most likely takes from a batch: a tensor, the first of a pair, or a well-known key.

    At most ``rows`` samples of it (None: all).
    """
    if isinstance(batch, Tensor):
        return batch if rows is None else first_rows(batch, rows)
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in _KEYS if isinstance(batch.get(key), Tensor)), None)
        return None if found is None else inputs_from_batch(found, rows)
    if isinstance(batch, (tuple, list)) and batch:
        return inputs_from_batch(batch[0], rows)
    return None


def example_for(
    trainer: pl.Trainer, module: pl.LightningModule, given: ExampleInputs | None
) -> ExampleInputs | None:
    """Example input: the one given, the module's ``example_input_array``, or two samples of the training data.

    Samples are taken by index from a map-style dataset: no sampler, worker or random state is touched. Returns None when
    only the first training batch can tell (streaming data).
    """
    if given is not None:
        return given
    if module.example_input_array is not None:
        array: ExampleInputs = module.example_input_array
        return array
    loader = _train_loader(trainer)
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    try:
        with torch.random.fork_rng():
            if loader.batch_sampler is None:  # the dataset makes whole batches itself
                batch = loader.collate_fn(loader.dataset[next(iter(loader.sampler))])
            else:
                indices = list(range(min(_ROWS, len(loader.dataset))))  # type: ignore[arg-type]
                many = getattr(loader.dataset, "__getitems__", None)
                batch = loader.collate_fn(many(indices) if many else [loader.dataset[i] for i in indices])
    except Exception:  # a dataset that cannot be indexed like this will give its first batch
        return None
    return inputs_from_batch(batch)


def training_batches(trainer: pl.Trainer, count: int) -> list[ExampleInputs]:
    """Inputs of the first batches of a further pass over the training data, which leaves the random state as it was.

    For a fit that was resumed just before it needs them. Empty for streaming data, which has no further pass.
    """
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return []
    with torch.random.fork_rng():
        return [require_inputs(inputs_from_batch(b, rows=None), b) for b in itertools.islice(loader, count)]


def _train_loader(trainer: pl.Trainer) -> Any:
    source = trainer.fit_loop._data_source
    if not source.is_defined():
        return None
    instance = source.instance
    # loaders given to fit() directly are there already; a module's hook builds a new loader, which is then thrown away
    return source.dataloader() if source.name else instance


def require_inputs(inputs: ExampleInputs | None, batch: Any) -> ExampleInputs:
    """Example inputs from the first batch, or one clear error."""
    found = inputs if inputs is not None else inputs_from_batch(batch)
    if found is None:
        kind = (
            f"a dict with keys {sorted(map(str, batch))}"
            if isinstance(batch, Mapping)
            else type(batch).__name__
        )
        raise TraceError(
            f"cannot tell which part of a training batch goes into forward (the batch is {kind}): pass "
            "example_inputs= to ChannelPruning or set example_input_array in the LightningModule"
        )
    return found


class RecentBatches:
    """The inputs of the last training batches, for whatever needs data when channels are selected.

    Args:
        count: how many are kept; 0: none.
    """

    def __init__(self, count: int) -> None:
        self._batches: deque[ExampleInputs] = deque(maxlen=count)

    def add(self, batch: Any) -> None:
        """A training batch has begun."""
        if self._batches.maxlen:
            self._batches.append(require_inputs(inputs_from_batch(batch, rows=None), batch))

    def take(self, trainer: pl.Trainer) -> list[ExampleInputs]:
        """What was kept, which is forgotten; a fit that was resumed just before this draws batches anew."""
        if not self._batches and self._batches.maxlen:
            self._batches.extend(training_batches(trainer, self._batches.maxlen))
        found = list(self._batches)
        self._batches.clear()
        return found

    def __len__(self) -> int:
        return len(self._batches)
