"""Refit the consumers of removed channels by least squares (He, Zhang, Sun 2017, section 3.2)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .channels import ChannelGraph, trace_channels
from .channels.trace import undisturbed
from .compaction import CompactionPlan, mask_channels
from .gates.attach import consumer_modules
from .inputs import ExampleInputs, call_model, to_model, without_labels


@dataclass(frozen=True)
class Refit:
    """One refitted consumer: relative error of its output before and after, ``||Y' - Y|| / ||Y||`` on the given data."""

    module: str
    error_before: float
    error_after: float


def reconstruct(
    model: nn.Module,
    example_inputs: ExampleInputs,
    plan: CompactionPlan,
    data: Iterable[Any],
    *,
    ridge: float = 1e-6,
    max_rows: int = 20_000,
    seed: int = 0,
) -> tuple[nn.Module, list[Refit]]:
    """Re-express removed channels by the ones that are left.

    For each convolution or linear layer that reads removed channels, in order of execution, the weights on the remaining
    channels (and the bias) are fitted so that its output on ``data`` comes closest to the dense network's, given the
    inputs that the already refitted network feeds it. A channel that is a linear combination of kept ones is replaced
    without error; in particular an exact duplicate.

    Args:
        model: the dense network; untouched.
        example_inputs: for tracing.
        plan: what is removed.
        data: a few batches: inputs as ``forward`` takes them, or (inputs, labels) pairs.
        ridge: regularisation relative to the mean diagonal of the normal equations; keeps weights bounded where the data
            leaves them open.
        max_rows: output positions sampled per layer.
        seed: of the sampling.

    Returns:
        A copy of the old size with removed channels at zero and refitted consumers (compact it with ``plan``), and a
        record per refitted layer. Grouped and transposed convolutions are left as they are.

    Raises:
        ValueError: ``data`` is empty.
        PlanError: ``plan`` was made for another model.
    """
    batches = [to_model(without_labels(batch), model) for batch in data]
    if not batches:
        raise ValueError("data must hold at least one batch to fit on; got none")
    graph = trace_channels(model, example_inputs, trial=False)
    masked = mask_channels(model, example_inputs, plan)
    live = torch.from_numpy(plan.mask(graph))
    names = {module: name for name, module in masked.named_modules()}
    dense_modules = dict(model.named_modules())
    consumers = consumer_modules(masked, graph)
    refits = []
    for module in _in_order(graph, {names[m]: m for m in consumers}):
        index = consumers[module][1].cpu()
        keep = (index < 0) | live[index]
        if keep.all() or not _supported(module):
            continue
        dense = dense_modules[names[module]]
        refits.append(
            _refit(names[module], module, masked, dense, model, batches, keep, ridge, max_rows, seed)
        )
    return masked, refits


def _supported(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return isinstance(module, nn.Linear)


def _in_order(graph: ChannelGraph, modules: dict[str, nn.Module]) -> list[nn.Module]:
    seen = dict.fromkeys(out.module for out in graph.outputs if out.module in modules)
    return [modules[name] for name in seen]


def _rows(module: nn.Module, x: Tensor) -> Tensor:
    """The layer's inputs as a design matrix, [positions, columns of its weight]."""
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    assert isinstance(module, nn.Conv2d)
    assert not isinstance(module.padding, str)
    patches = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


def _outputs(module: nn.Module, y: Tensor) -> Tensor:
    return (
        y.reshape(-1, y.shape[-1])
        if isinstance(module, nn.Linear)
        else y.flatten(2).transpose(1, 2).flatten(0, 1)
    )


def _capture(model: nn.Module, module: nn.Module, batch: ExampleInputs, of_input: bool) -> Tensor:
    kept: list[Tensor] = []

    def record(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        kept.append((args[0] if of_input else output).detach())

    handle = module.register_forward_hook(record)
    try:
        with undisturbed(model):
            call_model(model, batch)
    finally:
        handle.remove()
    return torch.cat(kept)


def _refit(
    name: str,
    module: nn.Module,
    masked: nn.Module,
    dense: nn.Module,
    model: nn.Module,
    batches: Sequence[ExampleInputs],
    keep: Tensor,
    ridge: float,
    max_rows: int,
    seed: int,
) -> Refit:
    weight, bias = module.weight, module.bias
    assert isinstance(weight, nn.Parameter)
    positions = weight[0].numel() // weight.shape[1]  # kernel positions per input channel
    columns = keep.repeat_interleave(positions).to(weight.device)
    generator = torch.Generator().manual_seed(seed)
    n = int(columns.sum()) + (bias is not None)
    gram = torch.zeros(n, n, dtype=torch.float64, device=weight.device)
    cross = torch.zeros(n, weight.shape[0], dtype=torch.float64, device=weight.device)
    pieces = []
    for batch in batches:
        x = _rows(module, _capture(masked, module, batch, of_input=True)).double()
        y = _outputs(dense, _capture(model, dense, batch, of_input=False)).double()
        chosen = torch.randperm(len(x), generator=generator)[: max(1, max_rows // len(batches))].to(x.device)
        x, y = x[chosen][:, columns], y[chosen]
        if bias is not None:
            x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        gram += x.T @ x
        cross += x.T @ y
        pieces.append((x, y))
    old = weight.detach().flatten(1).double()[:, columns].T
    if isinstance(bias, nn.Parameter):
        old = torch.cat([old, bias.detach().double()[None]])
    # towards the present weights, not towards zero, where the data says nothing
    damping = ridge * gram.diagonal().mean().clamp_min(1e-12)
    identity = torch.eye(n, dtype=torch.float64, device=weight.device)
    solution = old + torch.linalg.solve(gram + damping * identity, cross - gram @ old)
    scale = sum(float(y.square().sum()) for _, y in pieces) or 1.0
    before = sum(float((x @ old - y).square().sum()) for x, y in pieces) / scale
    after = sum(float((x @ solution - y).square().sum()) for x, y in pieces) / scale
    live_rows = weight.detach().flatten(1).abs().sum(1) > 0  # rows of removed channels stay zero
    with torch.no_grad():
        flat = weight.flatten(1).clone()
        flat[:, columns] = solution[: int(columns.sum())].T.to(weight.dtype)
        flat[~live_rows] = 0
        weight.copy_(flat.view_as(weight))
        if isinstance(bias, nn.Parameter):
            bias.copy_(torch.where(live_rows, solution[-1].to(bias.dtype), 0))
    return Refit(name, before**0.5, after**0.5)
