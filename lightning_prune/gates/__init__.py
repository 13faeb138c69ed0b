"""Learned gates: one number per channel, trained beside the network and never registered in it.

``attach`` hangs gates on the consumers' weights for the duration of each forward call; every other file is one kind of
gate. Gates own their optimizer, so the user's optimizer, weight decay and schedules never see them.
"""

from .attach import GateHooks
from .l1 import L1Gates

__all__ = ["GateHooks", "L1Gates"]
