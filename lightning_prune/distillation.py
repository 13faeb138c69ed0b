"""Knowledge distillation from the dense network (Hinton, Vinyals, Dean 2015, arXiv:1503.02531)."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from .compaction.apply import clone_model
from .inputs import ExampleInputs
from .whole_network import whole_network_calls


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T^2 KL(softmax(teacher / T) || softmax(student / T))``, mean over samples (and positions); eq. 1 and section 2.1.

    Args:
        student: logits of shape [N, classes, ...] as ``cross_entropy`` takes them.
        teacher: the same shape; receives no gradient.
        temperature: ``T``; ``T^2`` keeps the gradient's size independent of it.

    Returns:
        Scalar, float32 (float64 for float64 logits).
    """
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32
    of_student = F.log_softmax(student.to(wide) / temperature, dim=1)
    of_teacher = F.log_softmax(teacher.detach().to(wide) / temperature, dim=1)
    divergence = F.kl_div(of_student, of_teacher, reduction="none", log_target=True).sum(dim=1)
    return divergence.mean() * temperature**2


def logit_calls(model: nn.Module, inputs: ExampleInputs) -> list[str]:
    """Modules through which ``training_step`` may call the whole network, outermost first; ``""`` is the model itself.

    Raises:
        MisconfigurationException: the output is not a tensor of logits.
    """
    names, logits = whole_network_calls(model, inputs)
    if (
        not isinstance(logits, Tensor)
        or logits.dim() < 2
        or logits.shape[1] < 2
        or not logits.is_floating_point()
    ):
        found = (
            f"a {str(logits.dtype).removeprefix('torch.')} tensor of shape {tuple(logits.shape)}"
            if isinstance(logits, Tensor)
            else type(logits).__name__
        )
        raise MisconfigurationException(
            "distill= compares class scores: forward must return a floating-point tensor of logits [N, classes, ...] "
            f"with at least 2 classes, but {type(model).__name__}.forward returned {found}. Use distill=0, or let forward "
            "return the logits and compute everything else in training_step."
        )
    return names


class Distiller:
    """Adds ``weight * distillation_loss`` to what ``training_step`` returns, once there is a teacher and ``active`` is set.

    While attached, an instance attribute stands before the user's ``training_step``: gradient accumulation, loss scaling
    and distributed strategies see one ordinary loss. Only during that call do hooks listen to the network; copies of the
    module made in the meantime have the plain ``training_step``. The teacher runs in evaluation mode on the very inputs
    that the student gets, and belongs to nobody's ``parameters()`` or ``state_dict()``.

    Args:
        calls: see :func:`logit_calls`.
        weight: factor of the loss.
        temperature: see :func:`distillation_loss`.
    """

    def __init__(self, calls: list[str], weight: float, temperature: float) -> None:
        self.weight, self.temperature = weight, temperature
        self.active = False
        self.teacher: nn.Module | None = None
        self._names = calls
        self._model: nn.Module | None = None
        self._sum: Tensor | float = 0.0
        self._count = 0

    def remember(self, model: nn.Module, state: Mapping[str, Tensor] | None = None) -> None:
        """Make the present ``model`` (or its copy with the weights ``state``) the teacher."""
        attached = self._model
        self.detach()
        self.teacher = clone_model(model).eval().requires_grad_(False)
        if state is not None:
            self.teacher.load_state_dict(state)
        if attached is not None:
            self.attach(attached)

    def teacher_state(self) -> dict[str, Tensor] | None:
        """The teacher's weights on the CPU, for a checkpoint."""
        if self.teacher is None:
            return None
        return {name: tensor.detach().cpu().clone() for name, tensor in self.teacher.state_dict().items()}

    def attach(self, model: nn.Module) -> None:
        """Stand before ``training_step``."""
        if self._model is None:
            self._model = model
            model.__dict__["training_step"] = _Step(self, model)

    def detach(self) -> None:
        """Leave ``training_step`` as it was."""
        if self._model is not None:
            step = self._model.__dict__.pop("training_step")
            if step.before is not None:
                self._model.__dict__["training_step"] = step.before
            self._model = None

    def mean(self) -> float:
        """Mean of the loss (without its weight) since the last call; 0 without one."""
        value = float(self._sum) / max(self._count, 1)
        self._sum, self._count = 0.0, 0
        return value

    def run(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``step`` and add the loss to its result."""
        assert self._model is not None
        listener = _Listener(self.teacher if self.active else None, self.temperature)
        handles = listener.listen(self._model, self._names)
        try:
            result = step(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        if result is None:
            return None
        if not listener.calls:
            ways = ", ".join(f"self.{name}(...)" if name else "self(...)" for name in self._names)
            raise MisconfigurationException(
                "distill= found no call of the whole network in training_step, so there are no logits to compare. Call it "
                f"as one of: {ways}"
            )
        if not listener.losses:
            return result
        loss = torch.stack(listener.losses).mean()
        self._sum, self._count = self._sum + loss.detach(), self._count + 1
        if isinstance(result, Mapping):
            return {**result, "loss": result["loss"] + self.weight * loss}
        return result + self.weight * loss


class _Listener:
    """Hears the outermost calls of the network during one training step."""

    def __init__(self, teacher: nn.Module | None, temperature: float) -> None:
        self._temperature = temperature
        self._teachers = dict(teacher.named_modules()) if teacher is not None else None
        self._depth = 0
        self._expected: Tensor | None = None
        self.calls = 0
        self.losses: list[Tensor] = []

    def listen(self, model: nn.Module, names: list[str]) -> list[Any]:
        handles: list[Any] = []
        for name in names:
            module = model.get_submodule(name)
            handles.append(
                module.register_forward_pre_hook(functools.partial(self._before, name), with_kwargs=True)
            )
            handles.append(module.register_forward_hook(self._after, always_call=True))
        return handles

    @torch.compiler.disable
    def _before(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._depth += 1
        if self._depth > 1 or not torch.is_grad_enabled():
            return
        self.calls += 1
        if self._teachers is not None:  # before the student, which may change its input in place
            with torch.no_grad():
                self._expected = self._teachers[name](*args, **kwargs)

    @torch.compiler.disable
    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        self._depth -= 1
        if self._depth == 0 and self._expected is not None:
            expected, self._expected = self._expected, None
            if isinstance(output, Tensor):  # otherwise the call raised
                self.losses.append(distillation_loss(output, expected, self._temperature))


class _Step:
    """Stands in for the bound method ``training_step``; ``__wrapped__`` is how Lightning finds the user's own."""

    def __init__(self, distiller: Distiller, model: nn.Module) -> None:
        self.before = model.__dict__.get("training_step")
        self._distiller, self._model = distiller, model
        functools.update_wrapper(self, model.training_step)  # type: ignore[arg-type]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._distiller.run(self.__wrapped__, *args, **kwargs)  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _own_step(memo[id(self._model)])

    def __reduce__(self) -> tuple[Callable[[nn.Module], Any], tuple[nn.Module]]:
        return _own_step, (self._model,)


def _own_step(model: nn.Module) -> Any:
    """The method of the class, bound to ``model``."""
    return types.MethodType(type(model).training_step, model)  # type: ignore[attr-defined]
