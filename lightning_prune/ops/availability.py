"""Whether the compiled operators can run here, and the reason when they cannot."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_prune.ops import _library, _loading


class CanRun(NamedTuple):
    """Answer of the ``can_run_*`` functions; true in a boolean context only when ``ok`` is."""

    ok: bool
    reason: str | None = None

    def __bool__(self) -> bool:
        return self.ok


_YES = CanRun(True)


def extension_available() -> bool:
    """Whether the compiled library is loaded."""
    return _library.LOADED


def unavailable_reason() -> str | None:
    """Why the compiled library is not loaded, or None when it is."""
    return _loading.load()


def cuda_built() -> bool:
    """Whether the loaded library contains CUDA kernels."""
    info = _loading.build_info()
    return extension_available() and info is not None and bool(info.cuda_version)


def cpu_kernels() -> str | None:
    """Which compiled kernels run on the CPU now: ``portable``, ``avx2`` or ``avx512``; None without the extension.

    Raises:
        RuntimeError: ``LIGHTNING_PRUNE_CPU_LEVEL`` is set to something else.
    """
    return str(torch.ops.lightning_prune.kernel_table()[0]) if extension_available() else None


def warn_if_unavailable() -> None:
    """Warn that the slow pure-torch path is in use; `warnings` shows it once per process."""
    reason = unavailable_reason()
    if reason is not None:
        warnings.warn(
            f"lightning_prune runs without its compiled kernels ({reason}). Results are the same, convolutions slower; "
            "`python -m lightning_prune.info` has details.",
            RuntimeWarning,
            stacklevel=3,
        )


def _can_run(op: str, x: Tensor, dtypes: tuple[torch.dtype, ...]) -> CanRun:
    if not _library.LOADED:
        return CanRun(False, f"the compiled extension is not available: {unavailable_reason()}")
    if x.device.type not in ("cpu", "cuda"):
        return CanRun(False, f"{op} runs on cpu and cuda; x is on {x.device.type}")
    if x.device.type == "cuda" and not cuda_built():
        return CanRun(
            False, "the extension was built without CUDA; rebuild where torch has CUDA and nvcc is on PATH"
        )
    if x.dim() != 4:
        return CanRun(False, f"{op} takes 4-D input (N, C, H, W); x has shape {tuple(x.shape)}")
    if x.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return CanRun(False, f"{op} takes {names}; x is {str(x.dtype).removeprefix('torch.')}")
    return _YES


def can_run_masked_conv2d(x: Tensor, weight: Tensor) -> CanRun:
    """Whether the compiled ``masked_conv2d`` takes these tensors.

    Args:
        x: input, shape (N, C, H, W).
        weight: shape (O, C / groups, kh, kw).

    Returns:
        ``CanRun(ok, reason)``; ``reason`` is None when ``ok``.
    """
    half = x.dtype in (torch.bfloat16, torch.float16)
    if half and x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type):
        # Autocast runs the operator in float32.
        return _can_run("masked_conv2d", x, (torch.float32, torch.bfloat16, torch.float16))
    answer = _can_run("masked_conv2d", x, (torch.float32, torch.float64))
    if answer.ok and weight.dtype != x.dtype:
        return CanRun(False, f"weight must have x's dtype {x.dtype}; it is {weight.dtype}")
    return answer


def can_run_masked_batch_norm_act(x: Tensor) -> CanRun:
    """Whether the compiled ``masked_batch_norm_act`` takes this input.

    Args:
        x: input, shape (N, C, H, W).

    Returns:
        ``CanRun(ok, reason)``; ``reason`` is None when ``ok``.
    """
    half = (torch.bfloat16, torch.float16)
    # On the CPU autocast runs the operator in float32.
    if x.device.type == "cuda" or (x.device.type == "cpu" and torch.is_autocast_enabled("cpu")):
        return _can_run("masked_batch_norm_act", x, (torch.float32, torch.float64, *half))
    return _can_run("masked_batch_norm_act", x, (torch.float32, torch.float64))


def can_run_compact_conv2d(x: Tensor) -> CanRun:
    """Whether the compiled ``compact_conv2d`` takes this input.

    Args:
        x: input, shape (N, C, H, W).

    Returns:
        ``CanRun(ok, reason)``; ``reason`` is None when ``ok``. The operator is for inference: it has no gradient.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return CanRun(
            False, "compact_conv2d has no gradient and x requires one; use torch.no_grad() or MaskedConv2d"
        )
    return _can_run("compact_conv2d", x, (torch.float32, torch.float64, torch.bfloat16, torch.float16))
