"""Cut channels out of a model where it stands, optimizers included, and put them back as zeros.

Every ``Parameter`` and buffer stays the object that it is, so that optimizers, schedulers and whoever holds a reference go on
working; only its memory is exchanged. State dicts are those of the full-size model, written and read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..channels.trace import named_tensors
from ..errors import CompactionError
from ..hooks import PrivateHook
from .cuts import Cut, cuts_of
from .formats import memory_format_of
from .plan import CompactionPlan
from .rules import refresh_attributes, size_attributes
from .sizes import install, uninstall


class Resizer:
    """Makes a model smaller and full-size again, in place.

    What is cut has to be zero (``zeroed_slices``), since zeros are what comes back; running variances come back as ones. With
    each parameter go its gradient and whatever of its shape its optimizer remembers (momentum, Adam's moments), which comes
    back as zeros. While it is cut, ``state_dict()`` of the model, its modules and its optimizers gives full-size tensors, and
    ``load_state_dict()`` takes them.

    Args:
        model: full-size now, on its device and in its memory format.
        optimizers: called whenever needed, for whatever optimizers step the model by then.
    """

    def __init__(
        self, model: nn.Module, optimizers: Callable[[], Iterable[torch.optim.Optimizer]] = tuple
    ) -> None:
        self._model, self._optimizers = model, optimizers
        self._tensors = named_tensors(model)
        self._formats = {name: memory_format_of(tensor) for name, tensor in self._tensors.items()}
        self._attributes = {module: size_attributes(module) for module in model.modules()}
        self._cuts: dict[str, Cut] = {}
        self._sized: list[nn.Module] = []
        self._handles: list[RemovableHandle] = []

    @property
    def narrowed(self) -> bool:
        """Whether anything is cut out at present."""
        return bool(self._cuts)

    @torch.no_grad()
    def resize(self, plan: CompactionPlan | None) -> None:
        """Cut out what ``plan``, made for the full-size model, removes, and nothing else; None: full-size.

        No group may lose all its channels, and no backward pass may be under way.
        """
        old, new = self._cuts, cuts_of(plan, self._formats) if plan is not None else {}
        by_tensor = {id(tensor): (old.get(name), new.get(name)) for name, tensor in self._tensors.items()}
        for optimizer in self._optimizers():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    before, after = by_tensor.get(id(parameter), (None, None))
                    state = optimizer.state.get(parameter)
                    if state and (before or after):
                        for key, value in state.items():
                            if isinstance(value, Tensor):
                                state[key] = _changed(value, before, after, values=False)
        for name, tensor in self._tensors.items():
            grad, data = tensor.grad, _changed(tensor.data, old.get(name), new.get(name))
            tensor.grad = None
            _exchange(tensor, data)
            if grad is not None:
                tensor.grad = _changed(grad, old.get(name), new.get(name), values=False)
        self._cuts = new
        for module, attributes in self._attributes.items():
            module.__dict__.update(attributes)
        uninstall(self._sized)
        self._sized = []
        if plan is not None:
            for module in self._attributes:
                refresh_attributes(module)
            self._sized = install(self._model, plan.sizes)
        self._hang()

    @contextlib.contextmanager
    def full_size(self) -> Iterator[None]:
        """All parameters, buffers and gradients at full size for a moment, to be read; the model cannot be called."""
        cut = {name: self._tensors[name] for name in self._cuts}
        before = {name: (tensor.data, tensor.grad) for name, tensor in cut.items()}
        try:
            for name, tensor in cut.items():
                data, grad = before[name]
                tensor.grad = None
                tensor.data = self._cuts[name].widen(data)
                tensor.grad = None if grad is None else self._cuts[name].widen(grad, values=False)
            yield
        finally:
            for name, tensor in cut.items():
                data, grad = before[name]
                tensor.grad = None
                tensor.data = data
                tensor.grad = grad

    def check_optimizers(self, names: Iterable[str]) -> None:
        """Raise :class:`CompactionError` if an optimizer remembers more of these tensors than can be cut with them."""
        ours = {id(self._tensors[name]): name for name in names}
        for optimizer in self._optimizers():
            for parameter, state in optimizer.state.items():
                for key, value in state.items() if id(parameter) in ours else ():
                    scalar = not isinstance(value, (Tensor, list, dict)) or (
                        isinstance(value, Tensor) and value.numel() == 1
                    )
                    if not scalar and not (isinstance(value, Tensor) and value.shape == parameter.shape):
                        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                        raise CompactionError(
                            f"reconfigure_every_n_epochs= cuts an optimizer's state along with each parameter, but "
                            f"{type(optimizer).__name__} keeps {key!r} ({found}) for {ours[id(parameter)]!r} of shape "
                            f"{tuple(parameter.shape)}. Use an optimizer whose state has the parameter's shape (SGD, Adam, "
                            "RMSprop), or reconfigure_every_n_epochs=0."
                        )

    # ---- state dicts -----------------------------------------------------------------------------------------------

    def _hang(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if not self._cuts:
            return
        cuts = {id(self._tensors[name]): cut for name, cut in self._cuts.items()}
        for module in self._attributes:
            tensors = (*module._parameters.items(), *module._buffers.items())
            own = {key: cuts[id(tensor)] for key, tensor in tensors if id(tensor) in cuts}
            if own:
                self._handles += [
                    module.register_state_dict_post_hook(_Widen(own)),
                    module.register_load_state_dict_pre_hook(_Narrow(own)),
                ]
        for optimizer in self._optimizers():
            self._handles += [
                optimizer.register_state_dict_post_hook(_OptimizerState(cuts, Cut.widen_state)),
                optimizer.register_load_state_dict_pre_hook(_OptimizerState(cuts, Cut.narrow_state)),
            ]


def _changed(tensor: Tensor, old: Cut | None, new: Cut | None, *, values: bool = True) -> Tensor:
    """``tensor`` cut as ``new`` says instead of ``old``; the same object where it has another shape, or nothing changes."""
    expected = old.narrow_shape if old is not None else new.shape if new is not None else None
    if expected is None or tuple(tensor.shape) != expected:
        return tensor
    if old is not None:
        tensor = old.widen(tensor, values=values)
    return tensor if new is None else new.narrow(tensor)


def _exchange(tensor: Tensor, data: Tensor) -> None:
    """Give ``tensor`` other memory, of any shape.

    Autograd keeps a parameter's accumulator, with its old shape, for as long as any graph is alive; it makes a new one when
    the dtype has changed in between. Hooks on the tensor stay.
    """
    if tensor.requires_grad:
        other = torch.float32 if tensor.dtype != torch.float32 else torch.float64
        tensor.data = torch.empty(0, dtype=other, device=tensor.device)
    tensor.data = data


class _Widen(PrivateHook):
    """After ``state_dict()``: the module's own tensors at full size."""

    def __init__(self, cuts: Mapping[str, Cut]) -> None:
        self._cuts = cuts

    @torch.no_grad()
    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for key, cut in self._cuts.items():
            value = state.get(prefix + key)
            if isinstance(value, Tensor) and tuple(value.shape) == cut.narrow_shape:
                state[prefix + key] = cut.widen(value.detach())


class _Narrow(PrivateHook):
    """Before ``load_state_dict()``: what is left of full-size tensors."""

    def __init__(self, cuts: Mapping[str, Cut]) -> None:
        self._cuts = cuts

    @torch.no_grad()
    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, *unused: Any) -> None:
        for key, cut in self._cuts.items():
            value = state.get(prefix + key)
            if isinstance(value, Tensor) and tuple(value.shape) == cut.shape:
                state[prefix + key] = cut.narrow(value.detach())


class _OptimizerState(PrivateHook):
    """Applies ``change`` to what an optimizer's state dict holds for every cut parameter; the dict given stays as it is."""

    def __init__(self, cuts: Mapping[int, Cut], change: Callable[[Cut, Tensor], Tensor]) -> None:
        self._cuts, self._change = cuts, change

    @torch.no_grad()
    def __call__(self, optimizer: torch.optim.Optimizer, content: dict[str, Any]) -> dict[str, Any]:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        keys = [key for group in content["param_groups"] for key in group["params"]]
        state = dict(content["state"])
        for key, parameter in zip(keys, parameters, strict=False):
            cut = self._cuts.get(id(parameter))
            if cut is not None and key in state:
                state[key] = {
                    name: self._change(cut, value) if isinstance(value, Tensor) else value
                    for name, value in state[key].items()
                }
        return {**content, "state": state}
