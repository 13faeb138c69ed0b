"""The ways to compute batch normalisation with what follows it, forward and backward, and which takes less time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops import ACTIVATIONS
from .timing import faster


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    live: Tensor | None = None,
    compact_of: int = 0,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, and mean and biased variance of the batch, by the compiled kernel; arguments as its operator has them."""
    with torch._C._AutoDispatchBelowAutograd():  # the derivative is that of _Norm
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.lightning_prune.masked_batch_norm_act.default(
            x, residual, weight, bias, None, None, None, live, eps, activation, compact_of
        )
    return found


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    activation: str,
    needs: list[bool],
    live: Tensor | None = None,
    compact_of: int = 0,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and residual; ``needs`` says which are computed."""
    with torch._C._AutoDispatchBelowAutograd():
        grad_x, grad_residual, grad_weight, grad_bias, _ = (
            torch.ops.lightning_prune.masked_batch_norm_act_backward.default(
                grad, x, residual, weight, bias, None, mean, var, live, True, eps, activation,
                needs[0], needs[3], needs[1], needs[2], False, compact_of,
            )
        )  # fmt: skip
    return grad_x, grad_weight, grad_bias, grad_residual


def plain(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str,
    live: Tensor | None = None,
) -> Tensor:
    """The output by torch's functions; arguments as in :func:`forward`."""
    if live is not None:
        weight, bias = (None if t is None else t.index_select(0, live) for t in (weight, bias))
    y = F.batch_norm(x, None, None, weight, bias, True, 0.0, eps)
    return ACTIVATIONS[activation](y if residual is None else y + residual)


def running_fits(
    running_mean: Tensor | None, running_var: Tensor | None, tracked: Tensor | None, mean: Tensor
) -> bool:
    """Whether :func:`record` takes these statistics: all on the CPU, of one dtype, in memory without gaps."""
    if running_mean is None or running_var is None or mean.is_cuda:
        return False
    if tracked is not None and (tracked.is_cuda or tracked.dtype != torch.int64):
        return False
    both = (running_mean, running_var)
    return all(t.dtype == mean.dtype and not t.is_cuda and t.is_contiguous() for t in both)


def record(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    tracked: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: int,
    momentum: float,
) -> None:
    """``update_running``, and one more batch in ``tracked``, at once."""
    with torch._C._AutoDispatchBelowAutograd():
        torch.ops.lightning_prune.record_moments.default(
            running_mean, running_var, tracked, mean, var, count, momentum
        )
    # What saved them for its backward pass has to see that they changed.
    torch.autograd.graph.increment_version([t for t in (running_mean, running_var, tracked) if t is not None])


def measure(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    needs: bool,
    activation: str = "none",
    residual: Tensor | None = None,
) -> bool:
    """Whether the compiled kernel is faster on this batch; detached, so that nobody's hooks see it."""
    wanted = [True, weight is not None, bias is not None, residual is not None]
    leaves = [None if t is None else t.detach() for t in (x, weight, bias, residual)]

    def run(compiled: bool) -> None:
        own, scale, shift, other = leaves
        assert own is not None
        if compiled:
            y, mean, var = forward(own, scale, shift, eps, activation, residual=other)
            if needs:
                backward(y, own, scale, shift, mean, var, eps, activation, wanted, residual=other)
            return
        if own.is_cuda:
            _vendor(own, scale, shift, other, eps, needs, activation)
            return
        y, mean, rstd = torch.ops.aten.native_batch_norm(own, scale, shift, None, None, True, 0.0, eps)
        if other is not None:
            y = y + other
        if activation != "none":
            y = ACTIVATIONS[activation](y)
        if needs:
            # Of all activations as of a ReLU, which has the cheapest gradient.
            grad = y if activation == "none" else torch.ops.aten.threshold_backward(y, y, 0.0)
            torch.ops.aten.native_batch_norm_backward(
                grad, own, scale, None, None, mean, rstd, True, eps, wanted[:3]
            )

    with torch.no_grad():
        return faster(run, x.device)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


@torch.enable_grad()
def _vendor(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    needs: bool,
    activation: str,
) -> None:
    """The plain calls, by whichever library torch takes on this device; all detached."""
    leaves = [None if t is None else t.detach().requires_grad_(needs) for t in (x, weight, bias, residual)]
    # Whoever counts what a step saves (checkpointing) is not to count this.
    with torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
        y = F.batch_norm(leaves[0], None, None, leaves[1], leaves[2], True, 0.0, eps)  # type: ignore[arg-type]
        y = ACTIVATIONS[activation](y if leaves[3] is None else y + leaves[3])
    if needs:
        torch.autograd.grad(y, [t for t in leaves if t is not None], y.detach())
