"""What is installed, what the compiled extension was built for, what it uses here, and why not otherwise.

Run as ``python -m lightning_prune.info``.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from importlib import metadata
from typing import Any

import torch

_PACKAGES = ("lightning-prune", "torch", "lightning", "torchmetrics", "numpy")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _nvcc() -> str | None:
    path = shutil.which("nvcc")
    if path is None:
        return None
    text = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    return text.split("release ")[-1].split(",")[0] if "release " in text else "unknown version"


def collect() -> dict[str, Any]:
    """Versions, build and run-time facts as plain data.

    Returns:
        ``versions`` (package -> version or None), ``extension`` (``loaded``, ``reason``, ``path``,
        ``built_for``), ``cpu`` (``machine``, ``features``, ``levels_built``, ``level_used``), ``cuda``
        (``torch``, ``device``, ``built``, ``reason``, ``nvcc``) and ``threads``.
    """
    from lightning_prune.ops import _loading, availability

    build = _loading.build_info()
    path = _loading.library_path()
    loaded = availability.extension_available()
    built_for = None
    if build is not None:
        built_for = {
            "torch": build.torch_version,
            "cuda": build.cuda_version or None,
            "cuda_archs": [arch for arch in build.cuda_archs.split(",") if arch],
            "compiler": build.compiler,
        }
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    cuda_reason = None
    if not availability.cuda_built():
        if not loaded:
            cuda_reason = "the extension is not loaded"
        elif torch.version.cuda is None:
            cuda_reason = f"built for a torch without CUDA, you have torch {torch.__version__}"
        else:
            cuda_reason = (
                f"built without CUDA kernels, you have CUDA {torch.version.cuda}; rebuild with nvcc on PATH"
            )
    elif device is None:
        cuda_reason = "no CUDA device is visible"
    return {
        "versions": {
            "python": platform.python_version(),
            **{package: _version(package) for package in _PACKAGES},
        },
        "extension": {
            "loaded": loaded,
            "reason": availability.unavailable_reason(),
            "path": None if path is None else str(path),
            "built_for": built_for,
        },
        "cpu": {
            "machine": platform.machine(),
            "features": dict(build.cpu_features()) if build is not None else {},
            "levels_built": build.cpu_levels_built.split(",") if build is not None else [],
            "level_used": availability.cpu_kernels(),
        },
        "cuda": {
            "torch": torch.version.cuda,
            "device": device,
            "built": availability.cuda_built(),
            "reason": cuda_reason,
            "nvcc": _nvcc(),
        },
        "threads": torch.get_num_threads(),
    }


def render(facts: dict[str, Any]) -> str:
    """The facts of :func:`collect` as lines for a terminal."""
    lines = ["versions"]
    lines += [f"  {name:<16}{version or 'not installed'}" for name, version in facts["versions"].items()]
    extension, cpu, cuda = facts["extension"], facts["cpu"], facts["cuda"]
    lines += [
        "compiled extension",
        f"  loaded          {'yes' if extension['loaded'] else 'NO, pure-torch fallback'}",
    ]
    if extension["reason"]:
        lines.append(f"  why not         {extension['reason']}")
    built = extension["built_for"]
    if built:
        archs = f" ({', '.join(built['cuda_archs'])})" if built["cuda_archs"] else ""
        lines.append(f"  built for       torch {built['torch']}, CUDA {built['cuda'] or 'none'}{archs}")
        lines.append(f"  you have        torch {facts['versions']['torch']}, CUDA {cuda['torch'] or 'none'}")
        lines.append(f"  compiler        {built['compiler']}")
    if extension["path"]:
        lines.append(f"  library         {extension['path']}")
    features = [name for name, present in cpu["features"].items() if present]
    lines += [
        "cpu",
        f"  machine         {cpu['machine']}, {facts['threads']} threads",
        f"  levels built    {', '.join(cpu['levels_built']) or 'none'}",
        f"  usable here     {', '.join(['portable', *features]) if cpu['levels_built'] else 'none'}",
        f"  level used      {cpu['level_used'] or 'none'}",
        "cuda",
        f"  device          {cuda['device'] or 'none'}",
        f"  kernels built   {'yes' if cuda['built'] else 'no'}",
        f"  nvcc            {cuda['nvcc'] or 'not on PATH'}",
    ]
    if cuda["reason"]:
        lines.append(f"  why not used    {cuda['reason']}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(render(collect()))
