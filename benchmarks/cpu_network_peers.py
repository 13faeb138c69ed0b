"""Whole networks in every runtime that can be imported, each in a process of its own that times calls on request."""

from __future__ import annotations

import importlib
import importlib.metadata
import io
import os
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_prune import optimize_for_inference
from lightning_prune.inference.sites import FoldedConv2d

Run = Callable[[], Tensor]
LAST = torch.channels_last


def ours(model: nn.Module, x: Tensor, threads: int) -> Run:
    network = optimize_for_inference(model, x)
    return lambda: cast(Tensor, network(x))


def eager(model: nn.Module, x: Tensor, threads: int) -> Run:
    return lambda: cast(Tensor, model(x))


def eager_last(model: nn.Module, x: Tensor, threads: int) -> Run:
    model, x = model.to(memory_format=LAST), x.contiguous(memory_format=LAST)  # type: ignore[call-overload]
    return lambda: cast(Tensor, model(x))


class _Prepacked(nn.Module):
    """oneDNN with weights in its own layout, sum and activation fused: what frozen graphs of torch.compile call."""

    def __init__(self, folded: FoldedConv2d, shape: list[int]) -> None:
        super().__init__()
        conv = folded.conv
        self.bias = conv.bias
        self.settings = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
        self.packed = torch._C._nn.mkldnn_reorder_conv2d_weight(
            conv.weight.to_mkldnn(), *self.settings[:1], *self.settings[1:], shape
        )
        self.activation = folded.activation

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """As FoldedConv2d."""
        six = self.activation == "relu6"
        name, scalars = ("hardtanh", [0.0, 6.0]) if six else (self.activation, [])
        if residual is not None:
            convolve = torch.ops.mkldnn._convolution_pointwise.binary
            after = None if name == "none" else name
            return cast(
                Tensor,
                convolve(
                    x, residual, self.packed, self.bias, *self.settings, "add", 1.0, after, scalars, None
                ),
            )
        return cast(
            Tensor,
            torch.ops.mkldnn._convolution_pointwise(
                x, self.packed, self.bias, *self.settings, name, scalars, None
            ),
        )


def onednn(model: nn.Module, x: Tensor, threads: int) -> Run:
    os.environ["LIGHTNING_PRUNE_BACKEND"] = "vendor"  # batch norms folded by this package, nothing else of it
    network = optimize_for_inference(model, x)
    x = x.contiguous(memory_format=LAST)
    shapes: dict[nn.Module, list[int]] = {}
    handles = [
        m.register_forward_pre_hook(lambda m, args: shapes.setdefault(m, list(args[0].shape)) and None)
        for m in network.modules()
        if isinstance(m, FoldedConv2d)
    ]
    network(x)
    for handle in handles:
        handle.remove()
    for parent in list(network.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, FoldedConv2d):
                parent._modules[name] = _Prepacked(child, shapes[child])
    inner = cast(nn.Module, network.network)
    return lambda: cast(Tensor, inner(x))


def compiled(model: nn.Module, x: Tensor, threads: int) -> Run:
    config = importlib.import_module("torch._inductor.config")
    config.freezing = True
    model, x = model.to(memory_format=LAST), x.contiguous(memory_format=LAST)  # type: ignore[call-overload]
    network = torch.compile(model)
    return lambda: cast(Tensor, network(x))


def _onnx(model: nn.Module, x: Tensor) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), buffer, input_names=["x"], output_names=["y"], dynamo=False)
    return buffer.getvalue()


def onnxruntime(model: nn.Module, x: Tensor, threads: int) -> Run:
    ort = importlib.import_module("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = ort.InferenceSession(_onnx(model, x), options, providers=["CPUExecutionProvider"])
    given = {"x": x.numpy()}
    return lambda: torch.from_numpy(session.run(None, given)[0])


def openvino(model: nn.Module, x: Tensor, threads: int) -> Run:
    ov = importlib.import_module("openvino")
    core = ov.Core()
    config = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    model = core.compile_model(core.read_model(_onnx(model, x), b""), "CPU", config)
    request = model.create_infer_request()
    request.set_input_tensor(ov.Tensor(x.numpy(), shared_memory=True))

    def run() -> Tensor:
        request.infer()
        return torch.from_numpy(request.get_output_tensor(0).data)

    return run


OURS = "ours"
RUNTIMES: dict[str, Callable[[nn.Module, Tensor, int], Run]] = {
    OURS: ours,
    "eager": eager,
    "eager channels_last": eager_last,
    "oneDNN prepacked": onednn,
    "torch.compile": compiled,
    "ONNX Runtime": onnxruntime,
    "OpenVINO": openvino,
}
_PACKAGES = {"ONNX Runtime": ("onnxruntime", "onnx"), "OpenVINO": ("openvino", "onnx")}


def available(capped: bool) -> tuple[list[str], dict[str, str], dict[str, str]]:
    """Runtimes that can run, versions of their packages, and why the others are missing.

    Args:
        capped: the instruction set is capped by environment variables, which the two runtimes do not obey.
    """
    found, versions, missing = [], {}, {}
    for name in RUNTIMES:
        try:
            for package in _PACKAGES.get(name, ()):
                importlib.import_module(package)
                versions[package] = importlib.metadata.version(package)
        except ImportError as error:
            missing[name] = str(error)
            continue
        if capped and name in _PACKAGES:
            missing[name] = "its instruction set cannot be capped"
            continue
        found.append(name)
    return found, versions, missing


def serve(
    pipe: Connection, runtime: str, threads: int, files: dict[str, Path], x: Tensor, expected: Path
) -> None:
    """Load the variants of a network, report errors, then time one call per request until None comes.

    Sends ``{variant: relative error at the logits}``, and per request (cpu seconds, wall seconds) of one call.
    """
    torch.set_num_threads(threads)
    calls: dict[str, Run] = {}
    errors: dict[str, float] = {}
    truth = torch.load(expected)
    try:
        with torch.inference_mode() if runtime != "torch.compile" else torch.no_grad():
            for variant, file in files.items():
                model = torch.load(file, weights_only=False)
                calls[variant] = RUNTIMES[runtime](model, x, threads)
                y = calls[variant]()
                errors[variant] = float(
                    (y.double() - truth[variant]).abs().max() / truth[variant].abs().max()
                )
            pipe.send(errors)
            while (variant := pipe.recv()) is not None:
                pipe.send(_timed(calls[variant]))
    except Exception as failure:
        pipe.send(f"{type(failure).__name__}: {failure}")


def _timed(call: Run, seconds: float = 0.03) -> tuple[float, float]:
    """One call, or several while they are short and the caches belong to another process."""
    at, begin = time.process_time(), time.perf_counter()
    call()
    first = time.perf_counter() - begin
    if first > 2 * seconds:  # longer than it takes to fill a cache
        return time.process_time() - at, first
    calls, at, begin = 0, time.process_time(), time.perf_counter()
    while calls == 0 or time.perf_counter() - begin < seconds:
        call()
        calls += 1
    return (time.process_time() - at) / calls, (time.perf_counter() - begin) / calls


__all__ = ["OURS", "Any", "available", "serve"]
