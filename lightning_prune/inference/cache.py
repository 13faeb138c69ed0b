"""Measurements on disk: one small file each, so that processes never wait for or overwrite each other's."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..files import write_atomically
from ..ops.tensor_cores import tf32_allowed
from ..processor import this_processor

#: of the files; others are ignored
FORMAT = 1
#: environment variables that cap the instruction sets
_CAPS = ("LIGHTNING_PRUNE_CPU_LEVEL", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
#: those that choose kernels on a GPU
_CUDA_CHOICES = ("LIGHTNING_PRUNE_CUDA_GROUPS", "LIGHTNING_PRUNE_CUDA_TILE")
_DRIVER = Path("/proc/driver/nvidia/version")
_OFF = ("", "0", "off", "none")


def cache_folder() -> Path | None:
    """Where measurements are kept; None where they are not.

    ``LIGHTNING_PRUNE_CACHE`` names a folder, or ``off``; otherwise the user's cache folder (``XDG_CACHE_HOME``, by default
    ``~/.cache``).
    """
    given = os.environ.get("LIGHTNING_PRUNE_CACHE")
    if given is not None:
        return None if given.strip().lower() in _OFF else Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "lightning-prune"
    except RuntimeError:  # no home directory
        return None


@functools.cache
def _library() -> str:
    """Digest of the compiled extension: other kernels, other times."""
    from ..ops._loading import library_path

    path = library_path()
    return "none" if path is None else hashlib.blake2b(Path(path).read_bytes(), digest_size=8).hexdigest()


@functools.cache
def _driver() -> str | None:
    """Version of the GPU's driver, or of the CUDA it brings; None where neither is known."""
    try:
        named = re.search(r"\b\d+(\.\d+)+\b", _DRIVER.read_text().splitlines()[0])
        if named:
            return named[0]
    except (OSError, IndexError, UnicodeDecodeError):
        pass
    ask = getattr(torch._C, "_cuda_getDriverVersion", None)
    return None if ask is None else f"CUDA {ask()}"


def environment(device: torch.device) -> dict[str, Any]:
    """All that a measurement depends on beside the layer: processor, versions, kernels, threads."""
    facts: dict[str, Any] = {"format": FORMAT, "torch": torch.__version__, "extension": _library()}
    if device.type == "cuda":
        return {
            **facts,
            "device": torch.cuda.get_device_name(device),
            "cudnn": torch.backends.cudnn.version(),
            "driver": _driver(),
            "tf32": tf32_allowed(),
            "choices": _set(_CUDA_CHOICES),
        }
    return {**facts, "device": this_processor(), "threads": torch.get_num_threads(), "caps": _set(_CAPS)}


def _set(names: Sequence[str]) -> dict[str, str]:
    return {name: os.environ[name] for name in names if name in os.environ}


def load(key: Mapping[str, Any]) -> dict[str, float] | None:
    """The measurement stored under ``key``; None when there is none, or what is there is not one."""
    path = _path(key)
    if path is None:
        return None
    try:
        content = json.loads(path.read_bytes())
        if content["key"] != dict(key):
            return None
        values = {str(name): float(seconds) for name, seconds in content["seconds"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return values if values and all(math.isfinite(v) and v > 0 for v in values.values()) else None


def store(key: Mapping[str, Any], seconds: Mapping[str, float]) -> None:
    """Keep a measurement; a folder that cannot be written is no error."""
    path = _path(key)
    if path is not None:
        content = json.dumps({"key": dict(key), "seconds": dict(seconds)}, indent=1)
        try:
            write_atomically(path, content.encode())
        except OSError:
            return


def _path(key: Mapping[str, Any]) -> Path | None:
    folder = cache_folder()
    if folder is None:
        return None
    digest = hashlib.blake2b(json.dumps(dict(key), sort_keys=True).encode(), digest_size=16).hexdigest()
    return folder / "conv2d" / f"{digest}.json"
