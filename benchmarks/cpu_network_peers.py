"""Whole networks in every runtime that can be imported, each in a process of its own that times calls on request."""

from __future__ import annotations

import importlib
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from lightning_prune import optimize_for_inference
from lightning_prune.inference.sites import FoldedConv2d

Run = Callable[[], Tensor]
LAST = torch.channels_last


@dataclass(frozen=True)
class Given:
    """One variant of a network, as a torch file and, once :func:`export` has run, as ONNX beside it."""

    file: Path
    x: Tensor
    threads: int

    @property
    def model(self) -> nn.Module:
        """The network, freshly loaded."""
        return cast(nn.Module, torch.load(self.file, weights_only=False))

    @property
    def onnx(self) -> Path:
        """Where the ONNX file is."""
        return self.file.with_suffix(".onnx")


def export(file: Path, x: Tensor) -> None:
    """The ONNX file of a network, for any batch size ``N``."""
    model = torch.load(file, weights_only=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (x[:1],), str(file.with_suffix(".onnx")), input_names=["x"], output_names=["y"],
            dynamic_axes={"x": {0: "N"}, "y": {0: "N"}}, dynamo=False,
        )  # fmt: skip


def ours(given: Given) -> Run:
    x = given.x
    network = optimize_for_inference(given.model, x)
    return lambda: cast(Tensor, network(x))


def eager(given: Given) -> Run:
    model, x = given.model, given.x
    return lambda: cast(Tensor, model(x))


def eager_last(given: Given) -> Run:
    model = given.model.to(memory_format=LAST)  # type: ignore[call-overload]
    x = given.x.contiguous(memory_format=LAST)
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


def onednn(given: Given) -> Run:
    os.environ["LIGHTNING_PRUNE_BACKEND"] = "vendor"  # batch norms folded by this package, nothing else of it
    network = optimize_for_inference(given.model, given.x[:1])  # what is timed there is replaced below
    x = given.x.contiguous(memory_format=LAST)
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


def compiled(given: Given) -> Run:
    config = importlib.import_module("torch._inductor.config")
    config.freezing = True
    x = given.x.contiguous(memory_format=LAST)
    network = torch.compile(given.model.to(memory_format=LAST))  # type: ignore[call-overload]
    return lambda: cast(Tensor, network(x))


def onnxruntime(given: Given) -> Run:
    ort = importlib.import_module("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = given.threads, 1
    options.add_free_dimension_override_by_name("N", len(given.x))
    session = ort.InferenceSession(str(given.onnx), options, providers=["CPUExecutionProvider"])
    inputs = {"x": given.x.numpy()}
    return lambda: torch.from_numpy(session.run(None, inputs)[0])


def openvino(given: Given) -> Run:
    ov = importlib.import_module("openvino")
    core, x = ov.Core(), given.x
    config = {
        "INFERENCE_NUM_THREADS": given.threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    network = core.read_model(str(given.onnx))
    network.reshape(list(x.shape))
    model = core.compile_model(network, "CPU", config)
    request = model.create_infer_request()
    shared = x.numpy()
    request.set_input_tensor(ov.Tensor(shared, shared_memory=True))

    def run(kept: object = shared) -> Tensor:
        request.infer()
        return torch.from_numpy(request.get_output_tensor(0).data)

    return run


RUNTIMES: dict[str, Callable[[Given], Run]] = {
    "ours": ours,
    "eager": eager,
    "eager channels_last": eager_last,
    "oneDNN prepacked": onednn,
    "torch.compile": compiled,
    "ONNX Runtime": onnxruntime,
    "OpenVINO": openvino,
}


@dataclass(frozen=True)
class Setting:
    """What a worker prepares: networks of some variants, a batch for each or all, threads, and the logits that are right.

    ``seconds``: calls that are shorter are repeated for so long.
    """

    files: dict[str, Path]
    x: Tensor | dict[str, Tensor]
    threads: int
    expected: Path
    seconds: float = 0.03


def serve(pipe: Connection, runtime: str) -> None:
    """Answer requests until None comes.

    A :class:`Setting` is prepared and answered by ``{variant: relative error at the logits}``, or by a text that says what
    failed; the name of a variant, by (cpu seconds, wall seconds) of one call.
    """
    calls: dict[str, Run] = {}
    seconds = 0.0
    with torch.inference_mode() if runtime != "torch.compile" else torch.no_grad():
        while (request := pipe.recv()) is not None:
            try:
                if isinstance(request, str):
                    pipe.send(_timed(calls[request], seconds))
                    continue
                calls.clear()
                seconds = request.seconds
                torch.set_num_threads(request.threads)
                errors, truth = {}, torch.load(request.expected)
                for variant, file in request.files.items():
                    x = request.x if isinstance(request.x, Tensor) else request.x[variant]
                    calls[variant] = RUNTIMES[runtime](Given(file, x, request.threads))
                    right = truth[variant]
                    error = (calls[variant]().double() - right).abs().max() / right.abs().max()
                    errors[variant] = float(error)
                pipe.send(errors)
            except Exception as failure:
                pipe.send(f"{type(failure).__name__}: {failure}")


def _timed(call: Run, seconds: float) -> tuple[float, float]:
    """CPU and wall time of one call, the latter a median where calls are short.

    Short calls are repeated for so many seconds before the clock counts, and again while it does: caches belong to another
    process at first, threads sleep, or share a processor.
    """
    at, begin = time.process_time(), time.perf_counter()
    call()
    first = time.perf_counter() - begin
    if first > 2 * seconds:  # longer than it takes to fill a cache
        return time.process_time() - at, first
    _repeated(call, seconds)
    at = time.process_time()
    taken = _repeated(call, seconds)
    return (time.process_time() - at) / len(taken), statistics.median(taken)


def _repeated(call: Run, seconds: float) -> list[float]:
    """Wall time of each call."""
    taken: list[float] = []
    begin = now = time.perf_counter()
    while not taken or now - begin < seconds:
        before = now
        call()
        now = time.perf_counter()
        taken.append(now - before)
    return taken


__all__ = ["RUNTIMES", "Setting", "export", "serve"]
