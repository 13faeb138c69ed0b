"""The weights of a segment side by side in one tensor: handing over a hundred tensors costs as much as two layers."""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Sequence
from itertools import chain
from operator import attrgetter, is_, itemgetter

import torch
from torch import Tensor, nn

_LINE = 16  # floats; every weight begins on a cache line
_NAMES = ("packed", "bias")
_PAGE = 2 << 20  # bytes of a huge page
_LOCK = threading.Lock()  # two calls at once must not gather the same weights twice


class _HugePages:
    """Memory in huge pages, where the system gives them on request.

    At batch 1 every weight is read once, from memory; finding its address in small pages takes time as well: 6 % of a pruned
    ResNet-18, 4 % of a ResNet-50 (one thread of a Zen 4, virtual machine).
    """

    def __init__(self) -> None:
        self._available = hasattr(mmap, "MADV_HUGEPAGE")

    def wanted(self, size: int) -> bool:
        """Whether so many bytes should lie in them."""
        return self._available and size >= _PAGE

    def zeros(self, floats: int) -> Tensor:
        size = 4 * floats
        if self.wanted(size):
            try:
                pages = mmap.mmap(-1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                pages.madvise(mmap.MADV_HUGEPAGE)
            except (OSError, ValueError):
                self._available = False
            else:
                begin = -ctypes.addressof(ctypes.c_char.from_buffer(pages)) % _PAGE
                return torch.frombuffer(pages, dtype=torch.float32, count=floats, offset=begin)
        return torch.zeros(floats)


_PAGES = _HugePages()


class GatheredWeights:
    """Where the weights of some convolutions lie in one tensor; the modules' buffers are views of it.

    Args:
        modules: of all layers, by name.
        names: of those that are convolutions.

    Attributes:
        values: float32, all weights and whatever else lies in their memory.
        modules: as given.
        places: int64, (2 * convolutions, 2): where packed weight and bias of each begin in ``values``, and their lengths.

    Raises:
        ValueError: a weight or bias is not float32 on the CPU.
    """

    def __init__(self, modules: dict[str, nn.Module | None], names: Sequence[str]) -> None:
        self.modules = modules
        self._pick = itemgetter(*names, names[0])  # one name alone would not give a tuple
        self._layers: tuple[nn.Module, ...] = self._pick(modules)
        layers = self._layers[:-1]
        self._buffers = [layer._buffers for layer in layers]
        self._hooks = list(
            chain.from_iterable(map(attrgetter("_forward_hooks", "_forward_pre_hooks"), layers))
        )
        with _LOCK, torch.inference_mode(False), torch.no_grad():
            found = _shared(self._tensors())
            self.values = _gather(self._buffers) if found is None else found
            self._known = self._tensors()
        step = self.values.element_size()
        begin = self.values.data_ptr()
        self.places = torch.tensor(
            [(0, 0) if t is None else ((t.data_ptr() - begin) // step, t.numel()) for t in self._known]
        ).view(-1, 2)

    def _tensors(self) -> list[Tensor | None]:
        return list(chain.from_iterable(map(itemgetter(*_NAMES), self._buffers)))

    def current(self) -> bool:
        """Whether the modules still have these weights: nobody exchanged a module or a buffer."""
        if self._pick(self.modules) != self._layers:
            return False
        return all(map(is_, chain.from_iterable(map(itemgetter(*_NAMES), self._buffers)), self._known))

    def hooked(self) -> bool:
        """Whether a convolution has hooks, which want to be called."""
        return any(self._hooks)


def _shared(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """The memory that holds all of them, if there is one."""
    found = [t for t in tensors if t is not None]
    storage = found[0].untyped_storage()
    if _PAGES.wanted(storage.nbytes()) and storage.data_ptr() % _PAGE and not storage.is_shared():
        return None  # a copy, or read from a file: in small pages
    if any(
        t.untyped_storage().data_ptr() != storage.data_ptr() or t.dtype is not torch.float32 for t in found
    ):
        return None
    return torch.empty(0, dtype=torch.float32).set_(storage)


def _gather(buffers: Sequence[dict[str, Tensor | None]]) -> Tensor:
    """Moves the buffers into one tensor; each keeps its shape and value."""
    wanted: dict[int, tuple[Tensor, int]] = {}
    size = 0
    for held in buffers:
        for name in _NAMES:
            tensor = held[name]
            if tensor is None or id(tensor) in wanted:
                continue
            if tensor.dtype is not torch.float32 or tensor.device.type != "cpu":
                raise ValueError(f"weights must be float32 on the CPU; got {tensor.dtype} on {tensor.device}")
            wanted[id(tensor)] = tensor, size
            size += -(-tensor.numel() // _LINE) * _LINE
    values = _PAGES.zeros(size)
    views = {}
    for key, (tensor, begin) in wanted.items():
        views[key] = values[begin : begin + tensor.numel()].view(tensor.shape)
        views[key].copy_(tensor)
    for held in buffers:
        for name in _NAMES:
            tensor = held[name]
            if tensor is not None:
                held[name] = views.get(id(tensor), tensor)
    return values


__all__ = ["GatheredWeights"]
