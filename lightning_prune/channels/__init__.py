"""Which channels of a network belong together: labels, their propagation, groups.

``labels`` (what a label is) -> ``rules`` (how ops pass labels on) -> ``trace`` (one labelled forward pass) ->
``build`` (groups and sizes) -> ``trial`` (does a smaller copy really run?) -> :func:`trace_channels`.
"""

from .api import trace_channels
from .groups import Axis, ChannelGraph, ChannelGroup, Mask, Member, Term
from .labels import Freeze

__all__ = ["Axis", "ChannelGraph", "ChannelGroup", "Freeze", "Mask", "Member", "Term", "trace_channels"]
