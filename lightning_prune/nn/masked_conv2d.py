"""`MaskedConv2d`: a trainable convolution that skips dead channels in forward and backward."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_prune import ops
from lightning_prune.nn._convert import activation_name, check_conv, symmetric_padding
from lightning_prune.ops.reference import check_index


class MaskedConv2d(nn.Conv2d):
    """Trainable drop-in for ``nn.Conv2d`` whose dead channels cost nothing.

    The parameters, their names and their shapes are those of ``nn.Conv2d``; the gate and the live indices are buffers
    outside ``state_dict``, so a checkpoint fits either class.

    Args:
        *args: as for ``nn.Conv2d``; ``padding_mode`` must be zeros.
        activation: none, relu, relu6, silu, hardswish, gelu, sigmoid or the torch module; fused.
        exact: never use Winograd convolution, whose rounding errors differ from those of the plain sum.
        **kwargs: as for ``nn.Conv2d``.

    Raises:
        ValueError: ``padding_mode`` is not zeros, or the activation has no fused form.
    """

    gate: Tensor | None
    live_in: Tensor | None
    live_out: Tensor | None

    exact: bool = False

    def __init__(
        self, *args: Any, activation: str | nn.Module | None = None, exact: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.exact = exact
        self._prepare(activation)

    def _prepare(self, activation: str | nn.Module | None) -> None:
        self.activation = activation_name(activation)
        self._zero_padding = symmetric_padding(self)
        for name in ("gate", "live_in", "live_out"):
            self.register_buffer(name, None, persistent=False)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, activation: str | nn.Module | None = None) -> MaskedConv2d:
        """A masked convolution that shares the parameters of ``conv``.

        Raises:
            ValueError: ``conv`` is another module than ``nn.Conv2d``, or as for the class.
        """
        check_conv(conv)
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        for name in nn.Conv2d.__constants__:
            setattr(module, name, getattr(conv, name))
        module.transposed = conv.transposed
        module._reversed_padding_repeated_twice = conv._reversed_padding_repeated_twice
        module.weight, module.bias = conv.weight, conv.bias
        module._prepare(activation)
        module.train(conv.training)
        return module

    def set_live(self, live_in: Tensor | None, live_out: Tensor | None) -> None:
        """Choose the channels that are computed; None means all.

        Args:
            live_in: sorted unique int64 input channels.
            live_out: sorted unique int64 output channels.

        Raises:
            ValueError: an index is not sorted, repeated or out of range.
        """
        check_index("live_in", live_in, self.in_channels, is_sorted=True)
        check_index("live_out", live_out, self.out_channels, is_sorted=True)
        device = self.weight.device
        self.live_in = None if live_in is None else live_in.to(device)
        self.live_out = None if live_out is None else live_out.to(device)

    def set_gate(self, gate: Tensor | None) -> None:
        """Multiply output ``o`` by ``gate[o]`` before the activation; the tensor itself is used, with its gradient.

        Raises:
            ValueError: the gate does not have one value per output channel.
        """
        if gate is not None and tuple(gate.shape) != (self.out_channels,):
            raise ValueError(f"gate must have shape ({self.out_channels},), got {tuple(gate.shape)}")
        self._buffers["gate"] = gate

    def forward(self, x: Tensor) -> Tensor:
        """``act(gate * conv(x))`` over live channels; see :func:`lightning_prune.ops.masked_conv2d`.

        Args:
            x: shape (N, C, H, W) or (C, H, W).

        Returns:
            Tensor of shape (N, O, H', W') or (O, H', W'), exactly zero in dead channels.
        """
        if x.dim() == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        return ops.masked_conv2d(
            x,
            self.weight,
            self.bias,
            self.gate,
            self.live_in,
            self.live_out,
            self.stride,
            self._zero_padding,
            self.dilation,
            self.groups,
            self.activation,
            self.exact,
        )

    def extra_repr(self) -> str:
        """The settings of nn.Conv2d and how many channels live."""
        text = super().extra_repr()
        text += "" if self.activation == "none" else f", activation={self.activation}"
        text += "" if self.live_in is None else f", live_in={self.live_in.numel()}"
        return text + ("" if self.live_out is None else f", live_out={self.live_out.numel()}")
