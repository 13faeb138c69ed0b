"""Which processor this is: what measurements are kept under, and what stands beside published ones."""

from __future__ import annotations

import functools
import platform
from pathlib import Path


def processor(cpuinfo: str) -> str:
    """The processor's name with family, model and stepping: virtual machines give one name to several generations.

    Args:
        cpuinfo: the text of ``/proc/cpuinfo``; empty where there is none.
    """
    facts: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            facts.setdefault(key.strip(), value.strip())
    wanted = ("cpu family", "model", "stepping", "CPU part")
    numbers = [f"{key.split()[-1]} {facts[key]}" for key in wanted if key in facts]
    name = facts.get("model name") or platform.processor() or platform.machine()
    return f"{name} ({', '.join(numbers)})" if numbers else name


@functools.cache
def this_processor() -> str:
    """:func:`processor` of this machine."""
    try:
        return processor(Path("/proc/cpuinfo").read_text())
    except OSError:
        return processor("")


__all__ = ["processor", "this_processor"]
