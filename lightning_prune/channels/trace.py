"""Run labels through the real model once: :func:`trace_channels`."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..inputs import ExampleInputs, call_model, describe_failure
from .calls import SIZED, SizedCall, function_name, slots
from .flow import Flow, Step, source_line
from .labels import Labels
from .rules import Call, apply_rule, tensors_of


def decomposed(mode: TorchDispatchMode, func: Any, args: Any, kwargs: Any) -> Any:
    """The result of an operator that only calls others, which ``mode`` then sees; NotImplemented for one that computes.

    Tensors made in inference mode arrive at a mode before such operators have been taken apart.
    """
    if not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        return NotImplemented
    with mode:
        return func.decompose(*args, **kwargs)


class LabelMode(TorchDispatchMode):
    """Executes every op as usual and propagates the labels beside it."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        parts = decomposed(self, func, args, kwargs)
        if parts is not NotImplemented:
            return parts
        flow = self.flow
        inputs = list(tensors_of((args, kwargs)))
        line = source_line()
        flow.space.where = flow.where(line)
        before = tuple(tuple(flow.get(t)) for t in inputs)
        out = func(*args, **kwargs)
        call = Call(func, args, kwargs, out)
        try:
            apply_rule(flow, call)
        except (
            Exception
        ) as error:  # a rule that does not understand this use of its op: unknown, hence frozen
            for tensor in inputs:
                flow.freeze_tensor(tensor, f"{call.name} is used in a way its rule does not know ({error})")
            for tensor in call.outputs():
                flow.set(tensor, [None] * tensor.dim())
        outputs = call.outputs()
        flow.steps.append(
            Step(
                call.name,
                flow.module,
                line,
                before,
                tuple(tuple(flow.get(t)) for t in outputs),
                tuple(tuple(t.shape) for t in outputs),
            )
        )
        return out


class CallRecorder(TorchFunctionMode):
    """Records the Python-level calls that take sizes, with the labels that each size counts."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow
        #: per running module: how often each function was called since its ``forward`` began
        self.frames: list[Counter[str]] = [Counter()]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function_name(func)
        if name not in SIZED:
            return func(*args, **kwargs)
        flow = self.flow
        ordinal = self.frames[-1][name]
        for frame in self.frames:
            frame[name] += 1
        where = flow.where(source_line())
        entering = tuple(v for t in tensors_of((args, kwargs)) for v in flow.get(t) if v is not None)
        out = func(*args, **kwargs)
        found = slots(name, args, kwargs, out, flow.get)
        flow.calls.append(
            SizedCall(name, flow.module, ordinal, where, tuple(found), entering, len(flow.steps))
        )
        return out


@contextlib.contextmanager
def module_stack(
    model: nn.Module, stack: list[str], on_output: Any = None, on_error: Any = None, on_enter: Any = None
) -> Iterator[None]:
    """Keep in ``stack`` the names of the submodules being executed.

    ``on_output(name, output)`` is called after each; ``on_error(name)`` for each that raises, innermost first;
    ``on_enter(name)`` before each.
    """
    names = {module: name for name, module in model.named_modules()}

    def enter(module: nn.Module, args: Any) -> None:
        if module in names:
            stack.append(names[module])
            if on_enter is not None:
                on_enter(names[module])

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if module in names:
            if output is None and on_error is not None:
                on_error(names[module])
            elif on_output is not None and output is not None:
                on_output(names[module], output)
            stack.pop()

    handles = [
        hooks.register_module_forward_pre_hook(enter),
        hooks.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        stack.clear()


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; buffers, training flags and random state are as before afterwards."""
    training = {module: module.training for module in model.modules()}
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    fastpath = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)  # the fused path hides its matrix products in one op
    try:
        with torch.random.fork_rng(), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for module, flag in training.items():
            module.training = flag
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in buffers and buffer.shape == buffers[name].shape:
                    buffer.copy_(buffers[name])


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; a tied tensor appears once, under its first name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def label_tensors(flow: Flow, model: nn.Module) -> dict[str, Labels]:
    """Give every dimension of every floating-point parameter and buffer fresh labels."""
    convs = (nn.modules.conv._ConvNd,)
    weights = {id(m.weight) for m in model.modules() if isinstance(m, convs) and isinstance(m.weight, Tensor)}
    result: dict[str, Labels] = {}
    for name, tensor in named_tensors(model).items():
        labels: Labels = [None] * tensor.dim()
        if tensor.is_floating_point():
            dims = min(tensor.dim(), 2) if id(tensor) in weights else tensor.dim()
            labels = [flow.space.new(n) if n > 1 and d < dims else None for d, n in enumerate(tensor.shape)]
        result[name] = labels
        flow.register(name, tensor, labels)
    return result


def run_labels(model: nn.Module, example_inputs: ExampleInputs) -> tuple[Flow, dict[str, Labels], list[Any]]:
    """One labelled forward pass: the flow, the labels of each parameter and buffer, labels of module outputs."""
    flow = Flow()
    tensors = label_tensors(flow, model)
    outputs: list[Any] = []
    failed: list[str] = []
    recorder = CallRecorder(flow)

    def on_enter(name: str) -> None:
        recorder.frames.append(Counter())

    def on_output(name: str, output: Any) -> None:
        recorder.frames.pop()
        if isinstance(output, Tensor):
            outputs.append((name, flow.get(output)))

    with undisturbed(model), module_stack(model, flow.stack, on_output, failed.append, on_enter):
        try:
            with recorder, LabelMode(flow):
                result = call_model(model, example_inputs)
        except Exception as error:
            raise describe_failure(model, example_inputs, error, failed[:1]) from error
    flow.space.where = ""
    for tensor in tensors_in(result):
        flow.freeze_tensor(tensor, "an output of the network")
    return flow, tensors, outputs


def tensors_in(output: Any) -> Iterator[Tensor]:
    """Tensors in any output: nested containers, dataclasses, and objects with tensor attributes."""
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            yield leaf
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, (nn.Module, type)):
            yield from tensors_in(list(vars(leaf).values()))


__all__ = [
    "LabelMode",
    "label_tensors",
    "module_stack",
    "named_tensors",
    "run_labels",
    "tensors_in",
    "undisturbed",
]
