"""Reading settings out of torch modules."""

from __future__ import annotations

from torch import nn

from lightning_prune.ops import ACTIVATIONS

_ACTIVATION_MODULES: dict[type[nn.Module], str] = {
    nn.Identity: "none",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
    nn.GELU: "gelu",
    nn.Sigmoid: "sigmoid",
}


def check_conv(conv: nn.Module) -> None:
    """Raise ValueError unless ``conv`` is a two-dimensional convolution: others have weights and settings of that kind too."""
    if isinstance(conv, nn.Conv2d):
        return
    advice = "leave it as it is"
    if isinstance(conv, nn.Conv1d):
        advice = "optimize_for_inference runs nn.Conv1d over maps of one row"
    raise ValueError(f"conv must be an nn.Conv2d; got {type(conv).__name__}; {advice}")


def symmetric_padding(conv: nn.Conv2d) -> tuple[int, int]:
    """The zero padding of a convolution as two integers.

    Raises:
        ValueError: another padding mode than zeros, or a "same" padding that differs between the two sides.
    """
    if conv.padding_mode != "zeros":
        raise ValueError(
            f"padding_mode must be 'zeros', got {conv.padding_mode!r}; pad in front of the convolution"
        )
    if conv.padding == "valid":
        return 0, 0
    if conv.padding == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        if any(t % 2 for t in total):
            raise ValueError(
                f"padding='same' with kernel_size {conv.kernel_size} and dilation {conv.dilation} is not symmetric; "
                "pad in front of the convolution"
            )
        return total[0] // 2, total[1] // 2
    return int(conv.padding[0]), int(conv.padding[1])


def activation_name(activation: str | nn.Module | None) -> str:
    """The operator's name for an activation given as a name, a torch module or None.

    Raises:
        ValueError: no fused form exists.
    """
    if activation is None:
        return "none"
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
        return activation
    name = _ACTIVATION_MODULES.get(type(activation))
    if name is None or (isinstance(activation, nn.GELU) and activation.approximate != "none"):
        raise ValueError(
            f"activation {activation} has no fused form; use one of "
            f"{', '.join(kind.__name__ for kind in _ACTIVATION_MODULES)} or keep it as a module of its own"
        )
    return name
