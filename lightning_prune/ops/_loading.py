"""Finds and loads the compiled library; knows why it could not."""

from __future__ import annotations

import importlib
import os
import sysconfig
import threading
from pathlib import Path
from types import ModuleType

import torch

_PACKAGE = Path(__file__).resolve().parents[1]
_lock = threading.Lock()
_tried = False
_reason: str | None = None


def build_info() -> ModuleType | None:
    """The pybind11 module with build information, or None in a pure-Python install."""
    try:
        return importlib.import_module("lightning_prune._build_info")
    except ImportError:
        return None


def library_path() -> Path | None:
    """The compiled library for this interpreter, or None."""
    path = _PACKAGE / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    return path if path.exists() else None


def _load() -> str | None:
    if os.environ.get("LIGHTNING_PRUNE_DISABLE_EXT", "0") not in ("", "0"):
        return "disabled by the environment variable LIGHTNING_PRUNE_DISABLE_EXT"
    path = library_path()
    if path is None:
        return (
            "not built: lightning-prune is installed as pure Python (no C++ compiler at build time, or "
            "LIGHTNING_PRUNE_PURE=1). Install a compiler, then `pip install --no-build-isolation --force-reinstall "
            "--no-deps lightning-prune`"
        )
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < (2, 11):
        return f"built for torch 2.11 or newer, you have torch {torch.__version__}: upgrade torch"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        info = build_info()
        built = f"torch {info.torch_version}" if info else "an unknown torch"
        if info and info.cuda_version:
            built += f" with CUDA {info.cuda_version}"
        return (
            f"built for {built}, you have torch {torch.__version__} "
            f"(CUDA {torch.version.cuda or 'none'}): {error}. Rebuild with `pip install --no-build-isolation`"
        )
    return None


def load() -> str | None:
    """Load the library once per process. Returns None on success, else the reason."""
    global _tried, _reason
    with _lock:
        if not _tried:
            _reason = _load()
            _tried = True
        return _reason
