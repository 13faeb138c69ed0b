"""Which channel groups may be pruned: ``include``, ``exclude`` and residual streams."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from .channels.build import module_of
from .channels.groups import ChannelGraph, ChannelGroup, Mask
from .errors import TraceError

Patterns = str | Sequence[str] | None


def _as_list(patterns: Patterns) -> list[str]:
    return [] if patterns is None else [patterns] if isinstance(patterns, str) else list(patterns)


def check_patterns(argument: str, patterns: Patterns) -> None:
    """Raise ValueError unless every pattern is a string that compiles as a regular expression."""
    for pattern in _as_list(patterns):
        if not isinstance(pattern, str):
            raise ValueError(f"{argument} takes module names or regular expressions, got {pattern!r}")
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{argument}={pattern!r} is not a valid regular expression: {error}") from error


def _names(group: ChannelGroup) -> set[str]:
    return {group.name} | {module_of(m.tensor) for m in group.by_role("out")}


def _matches(pattern: str, name: str) -> bool:
    return name == pattern or name.startswith(f"{pattern}.") or re.fullmatch(pattern, name) is not None


def _matching(graph: ChannelGraph, pattern: str, given: str) -> list[ChannelGroup]:
    """Groups that ``pattern`` selects; ``given`` names the argument in the error when there are none."""
    matched = [group for group in graph.groups if any(_matches(pattern, name) for name in _names(group))]
    if not matched:
        names = sorted({name for group in graph.groups for name in _names(group)})
        raise TraceError(
            f"{given} matches no prunable layer. Prunable layers: {', '.join(names[:20])}"
            + (", ..." if len(names) > 20 else "")
        )
    return matched


def protected_channels(
    graph: ChannelGraph, include: Patterns = None, exclude: Patterns = None, prune_streams: bool = False
) -> Mask:
    """Channels that must stay, as a bool mask.

    A pattern is a module name (which covers its submodules) or a regular expression for whole names; it selects a group
    through the modules that produce its channels.

    Args:
        graph: the traced network.
        include: only groups that match one of these may be pruned (residual streams named here too).
        exclude: groups that match one of these are kept whole.
        prune_streams: also prune channels of residual streams, to which several layers add.

    Raises:
        TraceError: nothing is left to prune, or a pattern matches no prunable layer; lists what there is.
    """
    if not graph.groups:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(graph.frozen.items())[:5])
        raise TraceError(
            "the model has no prunable channels: expected at least one convolution or linear layer whose outputs feed "
            f"another one. {f'Frozen: {why}' if why else 'It has no convolution or linear layer.'}"
        )
    included, excluded = _as_list(include), _as_list(exclude)
    for argument, patterns in (("include", included), ("exclude", excluded)):
        for pattern in patterns:
            _matching(graph, pattern, f"{argument}={pattern!r}")
    protected = np.ones(graph.num_channels, dtype=bool)
    for group in graph.groups:
        chosen = any(_matches(p, n) for p in included for n in _names(group))
        allowed = chosen if included else prune_streams or not group.is_stream
        if allowed and not any(_matches(p, n) for p in excluded for n in _names(group)):
            protected[group.ids] = False
    if protected.all():
        streams = (
            ", ".join(g.name for g in graph.groups if g.is_stream) if not (prune_streams or included) else ""
        )
        raise TraceError(
            ("include/exclude leave nothing to prune. " if included or excluded else "")
            + (
                f"Residual streams are kept by default ({streams}): pass prune_streams=True to prune them"
                if streams
                else ""
            )
        )
    return protected


def check_ratios(ratios: Mapping[str, float] | None) -> None:
    """Raise ValueError unless every key is a pattern and every value a fraction in (0, 1]."""
    meaning = "is the share of channels to keep and must be in (0, 1]"
    _check_numbers("ratios", ratios, meaning, lambda value: value <= 1.0)


def check_factors(penalty_weights: Mapping[str, float] | None) -> None:
    """Raise ValueError unless every key is a pattern and every value a positive finite number."""
    meaning = "scales a penalty and must be a positive number"
    _check_numbers("penalty_weights", penalty_weights, meaning, lambda value: value < float("inf"))


def _check_numbers(
    argument: str,
    values: Mapping[str, float] | None,
    meaning: str,
    within: Callable[[float], bool],
) -> None:
    for pattern, value in (values or {}).items():
        check_patterns(argument, pattern)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (number and value > 0.0 and within(value)):
            raise ValueError(f"{argument}[{pattern!r}] {meaning}; got {value!r}")


def group_factors(
    graph: ChannelGraph, penalty_weights: Mapping[str, float] | None
) -> npt.NDArray[np.float64]:
    """Factor of each channel's penalty, 1 where none is given. Later patterns override earlier ones.

    Raises:
        TraceError: a pattern matches no prunable layer.
    """
    return _per_channel(graph, "penalty_weights", penalty_weights)


def fixed_shares(graph: ChannelGraph, ratios: Mapping[str, float] | None) -> npt.NDArray[np.float64]:
    """Share of its group that is kept, per channel: 1 where no ratio is given. Later patterns override earlier ones.

    Raises:
        TraceError: a pattern matches no prunable layer.
    """
    return _per_channel(graph, "ratios", ratios)


def _per_channel(
    graph: ChannelGraph, argument: str, values: Mapping[str, float] | None
) -> npt.NDArray[np.float64]:
    result = np.ones(graph.num_channels)
    for pattern, value in (values or {}).items():
        for group in _matching(graph, pattern, f"{argument}: {pattern!r}"):
            result[group.ids] = value
    return result


def fix_ratios(
    graph: ChannelGraph, saliency: npt.NDArray[np.float64], ratios: Mapping[str, float] | None
) -> tuple[Mask, Mask]:
    """Widths given per layer: ``(eligible, protected)`` masks that make groups keep exactly these shares of channels.

    Of a group that matches a pattern, the most salient ``round(ratio * size)`` channels (at least one) must stay, all
    others must go.

    Raises:
        TraceError: a pattern matches no prunable layer.
    """
    shares = fixed_shares(graph, ratios)
    eligible, protected = np.ones(graph.num_channels, dtype=bool), np.zeros(graph.num_channels, dtype=bool)
    for group in graph.groups:
        if (share := shares[group.start]) < 1.0:
            order = np.argsort(-saliency[group.ids], kind="stable")
            keep = group.start + order[: max(1, round(share * group.size))]
            eligible[group.ids] = False
            eligible[keep] = protected[keep] = True
    return eligible, protected
