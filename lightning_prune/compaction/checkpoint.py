"""Compact checkpoints: one safetensors file that holds the weights and, in its metadata, the plan. No pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import safetensors
import safetensors.torch
from torch import nn

from ..errors import PlanError
from ..files import write_atomically
from .apply import apply_plan
from .plan import CompactionPlan

_PLAN = "lightning_prune_plan"
_ALIASES = "lightning_prune_aliases"


def save_compact(model: nn.Module, plan: CompactionPlan, path: str | os.PathLike[str]) -> None:
    """Save a compact network's weights together with its plan.

    The file is a safetensors file: any reader of that format sees the weights. Tied tensors are stored once. An
    existing file is replaced only when all of the new one is written.
    """
    state = model.state_dict()
    first: dict[tuple[int, tuple[int, ...]], str] = {}
    tensors, aliases = {}, {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.numel() and key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            tensors[name] = tensor.detach().cpu().contiguous()
    metadata = {_PLAN: json.dumps(plan.to_json()), _ALIASES: json.dumps(aliases)}
    write_atomically(Path(path), safetensors.torch.save(tensors, metadata))


def load_compact(model: nn.Module | Callable[[], nn.Module], path: str | os.PathLike[str]) -> nn.Module:
    """Rebuild a compact network in a fresh process.

    Args:
        model: the dense network (untouched) or a function that builds it; only its structure matters.
        path: file written by :func:`save_compact`.

    Returns:
        A smaller copy of the dense network with the saved weights, in evaluation mode.

    Raises:
        PlanError: no such file, not a compact checkpoint, or made for another network.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except FileNotFoundError as error:
        raise PlanError(f"no compact checkpoint at {os.fspath(path)!r}") from error
    except (safetensors.SafetensorError, OSError) as error:
        raise PlanError(f"{os.fspath(path)!r} is not a readable compact checkpoint: {error}") from error
    if _PLAN not in metadata:
        raise PlanError(
            f"{os.fspath(path)!r} is a safetensors file without a compaction plan; write it with save_compact"
        )
    try:
        data, aliases = json.loads(metadata[_PLAN]), json.loads(metadata.get(_ALIASES, "{}"))
    except json.JSONDecodeError as error:
        raise PlanError(f"{os.fspath(path)!r} holds a damaged compaction plan: {error}") from error
    plan = CompactionPlan.from_json(data, repr(os.fspath(path)))
    dense = model if isinstance(model, nn.Module) else model()
    smaller = apply_plan(dense, plan)
    state |= {name: state[source] for name, source in aliases.items()}
    try:
        smaller.load_state_dict(state)
    except RuntimeError as error:
        raise PlanError(f"{os.fspath(path)!r} does not fit {type(dense).__name__}: {error}") from error
    return smaller.eval()
