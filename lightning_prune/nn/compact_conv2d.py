"""`CompactConv2d`: inference convolution with folded norm, activation, residual add, gather and scatter-add."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_prune import ops
from lightning_prune.nn._backend import Chooser, Layer
from lightning_prune.nn._convert import activation_name, check_conv, symmetric_padding
from lightning_prune.ops.compact_conv2d import prepared_settings
from lightning_prune.ops.masked_conv2d import pair
from lightning_prune.ops.reference import check_index, packed_size
from lightning_prune.ops.strassen import STRASSEN
from lightning_prune.ops.tensor_cores import tf32_allowed
from lightning_prune.ops.winograd import STRIDED, TRANSFORMED, strided_default


def _fold_batch_norm(weight: Tensor, bias: Tensor | None, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution followed by the norm in eval mode; computed in float64."""
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
        raise ValueError(
            f"norm must be an nn.BatchNorm2d or None; got {type(norm).__name__}; keep it as a module of its own"
        )
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError(
            "norm must have running statistics; track_running_stats=False cannot be folded into a convolution"
        )
    if norm.num_features != weight.shape[0]:
        raise ValueError(
            f"norm must have {weight.shape[0]} features like the convolution's outputs, got {norm.num_features}"
        )
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    if bias is not None:
        shift = shift + bias.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    return (weight.double() * scale[:, None, None, None]).to(weight.dtype), shift.to(weight.dtype)


def _alone(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where it is part of a larger one: what is saved with it is saved whole."""
    size = tensor.numel() * tensor.element_size()
    return tensor if tensor.untyped_storage().nbytes() <= size else tensor.clone()


class CompactConv2d(nn.Module):
    """Inference drop-in for a convolution (+ BatchNorm) (+ activation), at any channel count.

    Holds buffers only: the packed weight, the bias and the channel indices. They are in ``state_dict``, so the module
    saves and loads without pickle, and in any dtype to which the module is converted.

    Args:
        weight_shape: (O, C / groups, kh, kw).
        stride: one or two integers.
        padding: one or two integers.
        dilation: one or two integers.
        groups: of the convolution.
        bias: whether there is a bias.
        activation: none, relu, relu6, silu, hardswish, gelu or sigmoid.
        in_index: int64 channels of the input that are read, or None for all.
        out_index: int64 channels of the residual to which the outputs are added, or None.
        device: of the buffers.
        dtype: of the buffers.
        exact: never use Winograd convolution, Strassen's algorithm or, on a GPU, tf32, whose rounding errors differ from those
            of the plain sum. Otherwise float32 runs in tf32 on a GPU where torch's own convolutions may
            (``torch.backends.cudnn``).
        backend: ``own`` always runs this package's kernel, ``vendor`` torch's; ``auto`` times both, and oneDNN with
            prepacked weights, on the first input of each shape and takes ours where it is at least 3 % faster than every
            other. Measurements are kept in the user's cache folder. None: what ``LIGHTNING_PRUNE_BACKEND`` says, by
            default ``auto``. Under ``torch.compile``, deterministic algorithms and CUDA graph capture nothing is measured
            and ours runs.
        algorithm: of our CPU kernel, see :func:`lightning_prune.ops.pack_conv2d_weight`; None or ``auto``: by stride and
            channel counts. Taken where it applies (not with ``exact``; with stride 2 in float32 only), else the direct sum.

    ``state_dict`` holds the plain packed weight, whatever the algorithm; what the algorithm needs besides is computed
    again when a state is loaded or the module is converted.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> conv, norm = nn.Conv2d(3, 5, 3, padding=1).eval(), nn.BatchNorm2d(5).eval()
        >>> fused = CompactConv2d.from_conv(conv, norm, activation="relu")
        >>> x = torch.randn(2, 3, 8, 8)
        >>> with torch.no_grad():
        ...     torch.allclose(fused(x), torch.relu(norm(conv(x))), atol=1e-5)
        True
    """

    _chooser: Chooser | None = None  # what was measured; another machine measures again
    packed: Tensor
    bias: Tensor | None
    in_index: Tensor | None
    out_index: Tensor | None

    def __init__(
        self,
        weight_shape: Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        activation: str | nn.Module | None = None,
        in_index: Tensor | None = None,
        out_index: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        exact: bool = False,
        backend: str | None = None,
        algorithm: str | None = None,
    ) -> None:
        super().__init__()
        if backend not in (None, "auto", "own", "vendor"):
            raise ValueError(f"backend must be auto, own, vendor or None; got {backend!r}")
        if algorithm not in (None, "auto", "direct", *TRANSFORMED):
            raise ValueError(
                f"algorithm must be auto, direct, {', '.join(TRANSFORMED)} or None; got {algorithm!r}"
            )
        self.backend = backend
        self.algorithm = algorithm
        self.weight_shape = [int(size) for size in weight_shape]
        self.stride, self.padding, self.dilation = pair(stride), pair(padding), pair(dilation)
        self.groups = groups
        self.exact = exact
        self.activation = activation_name(activation)
        self._settings = prepared_settings(
            self.weight_shape, stride, padding, dilation, groups, self.activation
        )
        if in_index is not None and in_index.numel() != self.in_channels:
            raise ValueError(
                f"in_index must have {self.in_channels} entries, one per input; got {in_index.numel()}"
            )
        if out_index is not None and out_index.numel() != self.out_channels:
            raise ValueError(
                f"out_index must have {self.out_channels} entries, one per output; got {out_index.numel()}"
            )
        check_index("out_index", out_index, torch.iinfo(torch.int64).max, unique=True)
        packed = torch.zeros(packed_size(self.weight_shape, groups), device=device, dtype=dtype)
        self.register_buffer("packed", packed)
        self.register_buffer(
            "bias", torch.zeros(self.out_channels, device=device, dtype=dtype) if bias else None
        )
        self.register_buffer("in_index", None if in_index is None else in_index.detach().clone().to(device))
        self.register_buffer(
            "out_index", None if out_index is None else out_index.detach().clone().to(device)
        )
        self.eval()

    @property
    def in_channels(self) -> int:
        """Inputs of the convolution (after the gather)."""
        return self.weight_shape[1] * self.groups

    @property
    def out_channels(self) -> int:
        """Outputs of the convolution (before the scatter-add)."""
        return self.weight_shape[0]

    @property
    def weight(self) -> Tensor:
        """The folded weight, unpacked; shape ``weight_shape``."""
        return ops.unpack_conv2d_weight(self.packed, self.weight_shape, self.groups)

    def _algorithm(self, weight: Tensor) -> str:
        if weight.is_cuda:
            single = weight.dtype == torch.float32 and self.groups == 1
            return "tensor_core" if single and not self.exact and tf32_allowed() else "auto"
        wanted = self.algorithm or "auto"
        if self.exact or wanted == "direct":
            return "direct"
        if wanted == "auto" and tuple(self.stride) == (1, 1):
            return "auto"
        if wanted == "auto":
            wanted = strided_default(self.weight_shape)
        tile, kernels = TRANSFORMED.get(wanted, (0, ()))
        step = 1 if tile < STRIDED else 2
        fits = self.groups == 1 and weight.dtype != torch.float64 and weight.shape[2] == weight.shape[3]
        fits = fits and tuple(self.stride) == (step, step)
        if tile == STRASSEN:
            fits = fits and weight.dtype == torch.float32
        if step == 2:
            fits = fits and tuple(self.dilation) == (1, 1) and weight.dtype == torch.float32
        return wanted if fits and weight.shape[2] in kernels else "direct"

    def _pack(self, weight: Tensor) -> None:
        self._chooser = None
        self.packed = ops.pack_conv2d_weight(weight, self.groups, self._algorithm(weight)).to(weight.dtype)

    def _plain_packed(self) -> Tensor:
        size = packed_size(self.weight_shape, self.groups)
        return self.packed if self.packed.numel() == size else self.packed[:size].clone()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "packed"] = _alone(self._plain_packed())
        if self.bias is not None:
            destination[prefix + "bias"] = _alone(destination[prefix + "bias"])

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.packed = self._plain_packed()
        super()._load_from_state_dict(*args, **kwargs)
        self._pack(self.weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompactConv2d:
        before = self.packed
        super()._apply(fn, recurse)
        self._chooser = None
        if self.packed.dtype != before.dtype or self.packed.device != before.device:
            self._pack(self.weight)
        return self

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        norm: nn.BatchNorm2d | None = None,
        activation: str | nn.Module | None = None,
        in_index: Tensor | None = None,
        out_index: Tensor | None = None,
        exact: bool = False,
        backend: str | None = None,
        algorithm: str | None = None,
    ) -> CompactConv2d:
        """Fold a convolution, its norm (in eval mode) and its activation into one module.

        Args:
            conv: with zero padding; not changed.
            norm: BatchNorm2d with running statistics, or None.
            activation: a name, one of the torch modules the operator knows, or None.
            in_index: see the class.
            out_index: see the class.
            exact: see the class.
            backend: see the class.
            algorithm: see the class.

        Raises:
            ValueError: ``conv`` is another module than ``nn.Conv2d``, or a padding, norm or activation cannot be folded; the
                message says which and what to do.
        """
        check_conv(conv)
        weight, bias = conv.weight.detach(), None if conv.bias is None else conv.bias.detach()
        if norm is not None:
            with torch.no_grad():
                weight, bias = _fold_batch_norm(weight, bias, norm)
        module = cls(
            weight.shape,
            cast(tuple[int, int], conv.stride),
            symmetric_padding(conv),
            cast(tuple[int, int], conv.dilation),
            conv.groups,
            bias is not None,
            activation,
            in_index,
            out_index,
            weight.device,
            weight.dtype,
            exact,
            backend,
            algorithm,
        )
        module._pack(weight)
        if bias is not None:
            module.bias = bias.clone()
        return module

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``act(conv(x[:, in_index]) + bias + residual)``; see :func:`lightning_prune.ops.compact_conv2d`.

        Args:
            x: shape (N, C, H, W).
            residual: added before the activation; required with ``out_index``.

        Returns:
            Tensor of shape (N, O, H', W'), or of the residual's shape with ``out_index``.

        Raises:
            RuntimeError: a shape, dtype, device or index does not fit, integers among them (ValueError where our kernel does
                not run).
        """
        backend = self.backend or os.environ.get("LIGHTNING_PRUNE_BACKEND", "auto")
        if torch.compiler.is_compiling() or type(x) is not Tensor:
            return self._own(x, residual)
        if self._chooser is None:
            self._chooser = Chooser(self._layer, self._compiled, self._own)
        return self._chooser.choose(backend, x, residual)(x, residual)

    def _compiled(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """The compiled operator, without asking whether it takes the input; about 5 us less."""
        held = self._buffers
        return torch.ops.lightning_prune.compact_conv2d_prepared.default(
            x, held["packed"], held["bias"], residual, held["in_index"], held["out_index"], self._settings
        )

    def _own(self, x: Tensor, residual: Tensor | None, activation: str | None = None) -> Tensor:
        return ops.compact_conv2d(
            x,
            self.packed,
            self.bias,
            residual,
            self.in_index,
            self.out_index,
            self.weight_shape,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.activation if activation is None else activation,
        )

    def _layer(self) -> Layer:
        settings = (list(self.stride), list(self.padding), list(self.dilation), self.groups, self.activation)
        weight = self.weight.to(self.packed.dtype)
        return Layer(weight, self.bias, self.in_index, self.out_index, *settings, self.packed.numel())

    def __getstate__(self) -> dict[str, Any]:
        buffers = {name: None if t is None else _alone(t) for name, t in self._buffers.items()}
        return {**self.__dict__, "_chooser": None, "_buffers": buffers}

    def extra_repr(self) -> str:
        """The settings, as nn.Conv2d prints them."""
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={tuple(self.weight_shape[2:])}"
        text += f", stride={tuple(self.stride)}, padding={tuple(self.padding)}"
        text += f", dilation={tuple(self.dilation)}, groups={self.groups}"
        text += f", bias={self.bias is not None}, activation={self.activation}"
        text += ", exact=True" if self.exact else ""
        text += f", backend={self.backend}" if self.backend else ""
        text += f", algorithm={self.algorithm}" if self.algorithm else ""
        text += "" if self.in_index is None else f", in_index={self.in_index.numel()}"
        return text + ("" if self.out_index is None else f", out_index={self.out_index.numel()}")
