"""Learned methods: one saliency per channel, learned or measured while the network trains.

``base`` is the interface, ``attach`` hangs gates on the consumers for the duration of each forward call; every other file
holds one kind. Gates own their optimizer and are never registered in the user's module, so that its optimizer, weight decay
and schedules never see them. A new method subclasses :class:`Gates` and registers itself with :func:`learned`.
"""

from .attach import GateHooks
from .base import LEARNED, Gates, learned
from .l0 import L0Gates
from .l1 import L1Gates
from .measured import APoZGates, CriterionGates, Measured, OBDGates, TaylorGates
from .slimming import SlimmingGates
from .vib import VIBGates

__all__ = [
    "LEARNED", "APoZGates", "CriterionGates", "GateHooks", "Gates", "L0Gates", "L1Gates", "Measured", "OBDGates",
    "SlimmingGates", "TaylorGates", "VIBGates", "learned",
]  # fmt: skip
