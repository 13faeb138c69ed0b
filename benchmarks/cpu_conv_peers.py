"""The fused operation conv + bias + ReLU in every runtime that can be imported, as callables without arguments."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_prune import ops
from lightning_prune.nn import CompactConv2d
from lightning_prune.ops.compact_conv2d import prepared_settings
from lightning_prune.ops.winograd import algorithm_for

Run = Callable[[], object]


@dataclass(frozen=True)
class Shape:
    """One convolution; ``live`` of ``channels`` are read and written when it gathers and scatters."""

    inputs: int
    outputs: int
    size: int
    batch: int
    kernel: int = 3
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    stream: int = 0  # width of the residual stream that is gathered from and added to; 0: plain convolution
    runs: bool = False  # the stream's live channels lie in one run

    @property
    def padding(self) -> int:
        return self.dilation * (self.kernel // 2)

    @property
    def output(self) -> tuple[int, int]:
        return (math.ceil(self.size / self.stride),) * 2

    @property
    def flops(self) -> float:
        out = math.prod(self.output) * self.batch
        return 2.0 * out * self.outputs * self.inputs // self.groups * self.kernel**2

    @property
    def name(self) -> str:
        text = f"{self.inputs}->{self.outputs}@{self.size}"
        text += f" {self.kernel}x{self.kernel}" + (f" s{self.stride}" if self.stride > 1 else "")
        text += f" d{self.dilation}" if self.dilation > 1 else ""
        text += " depthwise" if self.groups > 1 else ""
        text += f" of {self.stream}" + (" (runs)" if self.runs else "") if self.stream else ""
        return f"{text} n{self.batch}"

    def padded(self) -> Shape | None:
        """The same with channels rounded up to multiples of 8; None when they are."""
        inputs, outputs = (-(-c // 8) * 8 for c in (self.inputs, self.outputs))
        if (inputs, outputs) == (self.inputs, self.outputs) or self.stream:
            return None
        groups = inputs if self.groups > 1 else 1
        return Shape(inputs, outputs, self.size, self.batch, self.kernel, self.stride, self.dilation, groups)


@dataclass
class Problem:
    """Tensors of one shape."""

    shape: Shape
    x: Tensor
    weight: Tensor
    bias: Tensor
    residual: Tensor | None
    index: Tensor | None
    out_index: Tensor | None

    @classmethod
    def of(cls, shape: Shape) -> Problem:
        generator = torch.Generator().manual_seed(0)
        s = shape
        x = torch.randn(s.batch, s.stream or s.inputs, s.size, s.size, generator=generator)
        weight = torch.randn(s.outputs, s.inputs // s.groups, s.kernel, s.kernel, generator=generator)
        weight /= math.sqrt(weight[0].numel())
        bias = torch.randn(s.outputs, generator=generator)
        if not s.stream:
            return cls(s, x, weight, bias, None, None, None)
        picks = [
            torch.randperm(s.stream, generator=generator)[:c].sort().values for c in (s.inputs, s.outputs)
        ]
        if s.runs:
            picks = [torch.arange(c) + s.stream // 8 for c in (s.inputs, s.outputs)]
        out = math.ceil(s.size / s.stride)
        residual = torch.randn(s.batch, s.stream, out, out, generator=generator)
        return cls(s, x, weight, bias, residual, *picks)

    def reference(self) -> Tensor:
        """The result in float64."""
        x = self.x.double() if self.index is None else self.x[:, self.index].double()
        y = F.conv2d(x, self.weight.double(), self.bias.double(), *self.settings)
        if self.residual is not None and self.out_index is not None:
            y = self.residual.double().index_add(1, self.out_index, y)
        return y.relu()

    @property
    def settings(self) -> tuple[int, int, int, int]:
        return self.shape.stride, self.shape.padding, self.shape.dilation, self.shape.groups


def _finish(problem: Problem, y: Tensor, residual: Tensor | None) -> Tensor:
    if residual is None or problem.out_index is None:
        return y.relu_()
    return residual.index_add(1, problem.out_index, y).relu_()


def own(problem: Problem) -> Run:
    """The project's operator, channels_last."""
    last = torch.channels_last
    shape = problem.shape
    algorithm = algorithm_for(problem.weight.shape, shape.batch, *shape.output, shape.stride)
    packed = ops.pack_conv2d_weight(problem.weight, problem.shape.groups, algorithm)
    x = problem.x.contiguous(memory_format=last)
    residual = None if problem.residual is None else problem.residual.contiguous(memory_format=last)
    arguments = (packed, problem.bias, residual, problem.index, problem.out_index)
    settings = prepared_settings(problem.weight.shape, *problem.settings, "relu")
    convolve = torch.ops.lightning_prune.compact_conv2d_prepared.default
    return lambda: convolve(x, *arguments, settings)


def module(problem: Problem) -> Run:
    """``CompactConv2d(backend="auto")``, which takes this project's kernel only where it measured it to be faster."""
    last, s = torch.channels_last, problem.shape
    conv = torch.nn.Conv2d(s.inputs, s.outputs, s.kernel, s.stride, s.padding, s.dilation, s.groups)
    conv.weight.data, conv.bias = problem.weight, torch.nn.Parameter(problem.bias)
    algorithm = algorithm_for(conv.weight.shape, s.batch, *s.output, s.stride)
    chosen = CompactConv2d.from_conv(
        conv, None, "relu", problem.index, problem.out_index, backend="auto", algorithm=algorithm
    )
    x = problem.x.contiguous(memory_format=last)
    residual = None if problem.residual is None else problem.residual.contiguous(memory_format=last)
    return lambda: chosen(x, residual)


def eager(problem: Problem, layout: torch.memory_format) -> Run:
    x, weight = (t.contiguous(memory_format=layout) for t in (problem.x, problem.weight))
    residual = None if problem.residual is None else problem.residual.contiguous(memory_format=layout)

    def run() -> Tensor:
        inputs = x if problem.index is None else x.index_select(1, problem.index)
        return _finish(problem, F.conv2d(inputs, weight, problem.bias, *problem.settings), residual)

    return run


def onednn(problem: Problem) -> Run:
    """Prepacked weights and a fused ReLU, channels_last: what torch.compile's frozen graphs call."""
    last = torch.channels_last
    x = problem.x.contiguous(memory_format=last)
    residual = None if problem.residual is None else problem.residual.contiguous(memory_format=last)
    s = problem.shape
    pads, strides, dilations = [s.padding] * 2, [s.stride] * 2, [s.dilation] * 2
    inputs = [s.batch, s.inputs, s.size, s.size]
    packed = torch._C._nn.mkldnn_reorder_conv2d_weight(
        problem.weight.to_mkldnn(), pads, strides, dilations, s.groups, inputs
    )
    after = "none" if s.stream else "relu"
    convolve = torch.ops.mkldnn._convolution_pointwise

    def run() -> Tensor:
        given = x if problem.index is None else x.index_select(1, problem.index)
        y = convolve(given, packed, problem.bias, pads, strides, dilations, s.groups, after, [], "")
        return _finish(problem, y, residual) if s.stream else y

    return run


def _onnx_model(problem: Problem) -> bytes:
    onnx = importlib.import_module("onnx")
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    s = problem.shape
    node = helper.make_node(
        "Conv",
        ["x", "w", "b"],
        ["c"],
        kernel_shape=[s.kernel] * 2,
        strides=[s.stride] * 2,
        pads=[s.padding] * 4,
        dilations=[s.dilation] * 2,
        group=s.groups,
    )
    out = math.ceil(s.size / s.stride)
    value = helper.make_tensor_value_info
    float32 = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [node, helper.make_node("Relu", ["c"], ["y"])],
        "conv",
        [value("x", float32, [s.batch, s.inputs, s.size, s.size])],
        [value("y", float32, [s.batch, s.outputs, out, out])],
        [
            numpy_helper.from_array(problem.weight.numpy(), "w"),
            numpy_helper.from_array(problem.bias.numpy(), "b"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def onnxruntime(problem: Problem) -> Run:
    ort = importlib.import_module("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(_onnx_model(problem), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(problem.x.numpy()))
    out = math.ceil(problem.shape.size / problem.shape.stride)
    y = torch.empty(problem.shape.batch, problem.shape.outputs, out, out)
    binding.bind_ortvalue_output("y", ort.OrtValue.ortvalue_from_numpy(y.numpy()))

    def run() -> object:
        session.run_with_iobinding(binding)
        return binding.get_outputs()[0].numpy

    return run


def openvino(problem: Problem) -> Run:
    ov = importlib.import_module("openvino")
    core = ov.Core()
    config = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    model = core.compile_model(core.read_model(_onnx_model(problem), b""), "CPU", config)
    request = model.create_infer_request()
    request.set_input_tensor(ov.Tensor(problem.x.numpy(), shared_memory=True))

    def run() -> object:
        request.infer()
        return lambda: request.get_output_tensor(0).data

    return run


PEERS: dict[str, Callable[[Problem], Run]] = {
    "eager": lambda p: eager(p, torch.contiguous_format),
    "eager channels_last": lambda p: eager(p, torch.channels_last),
    "oneDNN prepacked": onednn,
    "ONNX Runtime": onnxruntime,
    "OpenVINO": openvino,
}


def as_tensor(result: object) -> Tensor:
    """The result of a run as a tensor."""
    if isinstance(result, Tensor):
        return result
    assert callable(result)
    return torch.from_numpy(result())
