"""From saliency to a mask under a budget: a knapsack whose item prices change as layers shrink."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

from .channels.groups import ChannelGraph, ChannelGroup, Mask
from .cost import COUNTED, Cost
from .errors import BudgetError

Floats = npt.NDArray[np.float64]
#: a counted budget is met when so much of it is used
_CLOSE = 0.99
_EXCHANGES = 10


def floor_mask(
    graph: ChannelGraph,
    saliency: Floats,
    min_channels: int,
    round_to: int,
    protected: Mask | None = None,
    removable: Mask | None = None,
) -> Mask:
    """The smallest mask allowed: what is protected, and in every group its ``min_channels`` (rounded up) best channels.

    Nothing of a group whose branch is ``removable``.
    """
    mask = np.zeros(graph.num_channels, dtype=bool) if protected is None else protected.copy()
    for group in graph.groups:
        if removable is not None and removable[group.start]:
            continue
        keep = min(group.size, -(-max(min_channels, 1) // round_to) * round_to)
        mask[group.start + _ranked(saliency[group.ids])[:keep]] = True
    return mask


def _ranked(values: Floats) -> npt.NDArray[np.int64]:
    """Indices by falling value; ties in index order, so that every rank of a distributed run agrees."""
    return np.argsort(-values, kind="stable")


def scarcity(graph: ChannelGraph, mask: Mask) -> Floats:
    """The square of the live share of each channel's group, shape [num_channels]; it multiplies what a channel costs.

    What a layer has left matters the more, the less it is, which no saliency of single channels tells: without this, the most
    expensive groups (residual streams, the first layers) lose everything.
    """
    shares = np.array([mask[group.ids].mean() for group in graph.groups])
    return shares[graph.group_of()] ** 2


def _kept_whole(graph: ChannelGraph, protected: Mask | None, free: float) -> str:
    """Which layers stay as they are, for an error message, and the share ``free`` that is left without that; or nothing."""
    whole = [group for group in graph.groups if protected is not None and protected[group.ids].all()]
    if not whole:
        return ""
    names = [f"{group.name} (residual stream)" if group.is_stream else group.name for group in whole]
    listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return (
        f"{len(whole)} of {len(graph)} channel groups are kept whole: {listed}; with all of them it could have "
        f"{free:.4f} (prune_streams=True, include=, exclude=). "
    )


def select_channels(
    graph: ChannelGraph,
    saliency: Floats,
    cost: Cost,
    target: float,
    *,
    min_channels: int = 1,
    round_to: int = 1,
    cost_aware: float = 0.5,
    eligible: Mask | None = None,
    protected: Mask | None = None,
    removable: Mask | None = None,
) -> Mask:
    """Keep the most salient channels whose cost is at most ``target * cost.dense``, and as close to it as possible.

    Removes the channels with the lowest ``saliency / price**cost_aware`` in small rounds, pricing anew after each (a layer's
    channels get cheaper as its neighbours shrink). The price is the marginal cost times :func:`scarcity`. Then puts back, most
    salient first, whatever still fits; and, where more than 1 % of a counted budget is still left, exchanges
    channels of different price.

    Args:
        graph: the traced network.
        saliency: shape [num_channels], larger means keep.
        cost: prices masks.
        target: fraction of the dense cost to stay under, in (0, 1].
        min_channels: at least so many channels stay in every group.
        round_to: live widths are multiples of this (or the whole group).
        cost_aware: 0 ranks by saliency alone; 1 by saliency per price, the knapsack density.
        eligible: bool mask of channels that may stay; others go first, unless ``min_channels`` needs them.
        protected: bool mask of channels that must stay (excluded layers).
        removable: bool mask of channels whose whole group may go (``branches.removable_branches``).

    Returns:
        bool mask, True = live.

    Raises:
        BudgetError: even the smallest allowed widths cost more.
    """
    values = np.asarray(saliency, np.float64)
    if eligible is not None:
        values = np.where(eligible, values, values.min() - 1.0 - np.abs(values).max())
    limit = target * cost.dense
    floor = floor_mask(graph, values, min_channels, round_to, protected, removable)
    lowest = cost.cost(floor)
    if lowest > limit:
        free = cost.cost(floor_mask(graph, values, min_channels, round_to, removable=removable))
        raise BudgetError(
            f"target={target:g} of the {cost.metric} cannot be reached: with min_channels={min_channels} and "
            f"round_to={round_to} the smallest network has {lowest / cost.dense:.4f} of them. "
            + _kept_whole(graph, protected, free / cost.dense)
            + "Raise target or lower min_channels."
        )
    mask = np.ones(graph.num_channels, dtype=bool)
    if eligible is not None:
        mask = eligible | floor
    order_within = np.concatenate([np.argsort(_ranked(values[g.ids]), kind="stable") for g in graph.groups])
    while (now := cost.cost(mask)) > limit:
        candidates = np.flatnonzero(mask & ~floor)
        marginal = cost.marginal(mask)
        fair = marginal * scarcity(graph, mask) / cost.dense
        price = np.maximum(fair[candidates], 1e-12) ** cost_aware
        ranked = values[candidates]
        score = np.where(ranked < 0, ranked * price, ranked / price)
        # ties (and the discarded channels at the bottom) go by rank within their group
        order = candidates[np.lexsort((-order_within[candidates], score))]
        savings = np.cumsum(np.maximum(marginal[order], 0.0))
        chunk = int(np.searchsorted(savings, max((now - limit) * 0.25, 0.0))) + 1
        mask[order[:chunk]] = False
    mask = _round_down(graph, values, mask, floor, round_to)
    mask = _fill_up(graph, values, cost, limit, mask, round_to, eligible)
    if cost.metric in COUNTED:  # a measured cost has its own last word
        mask = _exchange(graph, values, cost, limit, mask, floor, round_to, eligible)
    return mask


def _round_down(graph: ChannelGraph, values: Floats, mask: Mask, floor: Mask, round_to: int) -> Mask:
    if round_to == 1:
        return mask
    mask = mask.copy()
    for group in graph.groups:
        live = int(mask[group.ids].sum())
        keep = (
            group.size
            if live == group.size
            else max(live // round_to * round_to, int(floor[group.ids].sum()))
        )
        ranked = np.flatnonzero(mask[group.ids])
        ranked = ranked[_ranked(values[group.ids][ranked])]
        mask[group.start + ranked[keep:]] = False
    return mask


def block_to_add(
    group: ChannelGroup, values: Floats, mask: Mask, round_to: int, eligible: Mask | None
) -> npt.NDArray[np.int64]:
    """The most salient removed channels of a group by which it may grow; empty when it may not."""
    removed = ~mask[group.ids] if eligible is None else ~mask[group.ids] & eligible[group.ids]
    candidates = group.start + np.flatnonzero(removed)
    block = candidates[_ranked(values[candidates])][:round_to]
    if len(block) < round_to and int(mask[group.ids].sum()) + len(block) != group.size:
        return candidates[:0]
    return block


def smallest_addition(
    graph: ChannelGraph, cost: Cost, mask: Mask, round_to: int = 1, eligible: Mask | None = None
) -> float | None:
    """What the cheapest block of ``round_to`` removed channels would cost to put back; None when none can be."""
    now, values = cost.cost(mask), np.zeros(len(mask))
    found = []
    for group in graph.groups:
        block = block_to_add(group, values, mask, round_to, eligible)
        if len(block):
            found.append(cost.cost(_with(mask, block, True)) - now)
    return min(found, default=None)


def _with(mask: Mask, channels: npt.NDArray[np.int64], live: bool) -> Mask:
    result = mask.copy()
    result[channels] = live
    return result


def _exchange(
    graph: ChannelGraph, values: Floats, cost: Cost, limit: float, mask: Mask, floor: Mask, round_to: int,
    eligible: Mask | None,
) -> Mask:  # fmt: skip
    """Where no channel fits any more and over 1 % of the budget is left: a more expensive block for a cheaper one.

    Of the exchanges that come within 1 %, the one that loses least saliency; else the one that comes closest.
    """
    for _ in range(_EXCHANGES):
        now = cost.cost(mask)
        if now >= _CLOSE * limit:
            break
        marginal = cost.marginal(mask)
        adds = [block_to_add(group, values, mask, round_to, eligible) for group in graph.groups]
        drops = [_block_to_drop(group, values, mask, floor, round_to) for group in graph.groups]
        best: tuple[tuple[bool, float], Mask] | None = None
        for add, drop in itertools.permutations(range(len(graph.groups)), 2):
            more, less = marginal[adds[add]].sum(), marginal[drops[drop]].sum()
            if not len(adds[add]) or not len(drops[drop]) or not 0 < more - less < 2 * (limit - now):
                continue
            trial = _with(_with(mask, adds[add], True), drops[drop], False)
            price = cost.cost(trial)
            if now < price <= limit:
                near = price >= _CLOSE * limit
                key = (near, values[adds[add]].sum() - values[drops[drop]].sum() if near else price)
                if best is None or key > best[0]:
                    best = key, trial
        if best is None:
            break
        mask = _fill_up(graph, values, cost, limit, best[1], round_to, eligible)
    return mask


def _block_to_drop(
    group: ChannelGroup, values: Floats, mask: Mask, floor: Mask, round_to: int
) -> npt.NDArray[np.int64]:
    """The least salient live channels of a group by which it may shrink; empty when it may not."""
    live = group.start + np.flatnonzero(mask[group.ids])
    block = live[_ranked(values[live])][::-1][: len(live) % round_to or round_to]
    return block if len(block) and not floor[block].any() else live[:0]


def _fill_up(
    graph: ChannelGraph,
    values: Floats,
    cost: Cost,
    limit: float,
    mask: Mask,
    round_to: int,
    eligible: Mask | None,
) -> Mask:
    """Put removed channels back, most salient first, in blocks of ``round_to``, while the budget allows."""
    mask = mask.copy()
    group_of = graph.group_of()
    allowed = np.ones_like(mask) if eligible is None else eligible
    for channel in _ranked(values):
        if mask[channel] or not allowed[channel]:
            continue
        block = block_to_add(graph.groups[group_of[channel]], values, mask, round_to, eligible)
        if len(block) and cost.cost(trial := _with(mask, block, True)) <= limit:
            mask = trial
    return mask
