"""Runs of convolutions and pools as one call of a compiled operator: no Python, no allocation between layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ..nn import CompactConv2d
from ..ops import ACTIVATIONS
from .arena import Arena
from .heads import with_convolution_as_head
from .rewrite import Rewrite
from .sites import plain
from .weights import GatheredWeights

#: fewer layers than this gain too little
MIN_STEPS = 3
# The program's numbers; csrc/kernels/cpu/segment.h has the same.
_VERSION, _NONE, _INPUT, _OUTPUT, _INSIDE = 2, -1, -2, -3, -4
_CONV, _MAX_POOL, _MEAN = 0, 1, 2
_ALIGN = 16  # floats
#: floats in as many bytes as the L1 cache's sets hold once, and an odd number of lines: maps that are read and written together
#: would share sets if they lay multiples of the former apart, as all maps of 56x56 whole lines do
_SETS, _APART = 1024, 17 * _ALIGN
_SMALL = 14 * 14  # pixels; one image has too few tiles of them to keep a weight busy
_MOST_AVERAGED = 64 * 64  # pixels; sums in float32 of more would lose digits
_FEW = 7 * 7  # pixels; fewer gain nothing from going through several layers row by row
Shape = tuple[int, int, int]


class CompactSegment(nn.Module):
    """A run of layers with one input and one output, as one call.

    Maps of the layers between lie in one arena, where they take each other's place as soon as nobody reads them any
    more, and the batch goes through all layers slice by slice, so that a layer finds in the cache what the one before
    it wrote. The convolutions' weights are moved into one tensor, of which their buffers become views. Other shapes,
    dtypes and devices than the planned ones, and inputs that require a gradient, run layer by layer, and so does
    everything while a convolution has hooks or a dispatch mode is active. Under ``torch.compile`` a segment falls apart
    into its layers likewise: the compiled graph calls one operator for each convolution.

    Args:
        layers: what the segment computes.
        convolutions: its convolutions in the order of the program, each with the name of its module in ``layers``.
        program: int64, see ``csrc/kernels/cpu/segment.h``.
        shape: (C, H, W) of the input that the program was made for.
    """

    program: Tensor

    def __init__(self, layers: nn.Module, convolutions: Sequence[str], program: Tensor, shape: Shape) -> None:
        super().__init__()
        self.layers = layers
        self.shape = shape
        self._names = tuple(convolutions)
        self._weights: GatheredWeights | None = None
        self.register_buffer("program", program, persistent=False)
        self.eval()

    @property
    def slice(self) -> int:
        """Images that go through all layers together."""
        return int(self.program[9])

    def with_slice(self, images: int) -> CompactSegment:
        """The same weights and layers, another slice."""
        program = self.program.clone()
        program[9] = images
        return CompactSegment(self.layers, self._names, program, self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """What the layers compute.

        Args:
            x: (N, C, H, W).
        """
        planned = x.shape[1:] == self.shape and self._can_run(x)
        weights = self._current_weights() if planned else None
        if weights is None or weights.hooked():
            y: Tensor = self.layers(x)
            return y
        run = torch.ops.lightning_prune.compact_segment.default
        result: Tensor = run(x, weights.values, weights.places, self._buffers["program"])
        return result

    def _current_weights(self) -> GatheredWeights | None:
        """None where the weights are not of the program's kind."""
        weights = self._weights
        modules = cast(nn.Module, self._modules["layers"])._modules
        if weights is None or weights.modules is not modules or not weights.current():
            try:
                weights = GatheredWeights(modules, self._names)
            except ValueError:
                weights = None
            self._weights = weights
        return weights

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_weights": None}

    def _can_run(self, x: Tensor) -> bool:
        # attributes of modules are slow, what they are kept in is not
        program = cast(Tensor, self._buffers["program"])
        if x.device.type != "cpu" or x.dtype != torch.float32 or program.is_cuda:
            return False
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
            return False
        return not _get_current_dispatch_mode_stack()  # somebody counts or fakes operators

    def extra_repr(self) -> str:
        """How many convolutions, for which input, how many images at a time."""
        return f"{len(self._names)} convolutions, input={self.shape}, slice={self.slice}"


def in_segments(network: nn.Module, batch: int) -> list[nn.Module]:
    """The network with its runs of convolutions and max-pools as :class:`CompactSegment`, for several slices of the batch.

    Inverted residuals run layer by layer or depth first, a few rows at a time through all their layers.

    Args:
        network: a GraphModule whose nodes know their shapes (``meta["seen"]``); not changed, its weights are shared.
        batch: images per call.

    Returns:
        Networks to choose from; none where there is no run of ``MIN_STEPS`` layers.
    """
    if not isinstance(network, fx.GraphModule):
        return []
    if batch == 1:  # more images share the weights of the head: not slice by slice
        network = with_convolution_as_head(network)
    runs = [run for run in _runs(network) if len(run) >= MIN_STEPS]
    if not runs:
        return []
    slices = sorted({max(1, batch // parts) for parts in (1, 2, 4, 8)})
    found: list[nn.Module] = []
    inside = [_inside(network, run) for run in runs]
    for depth_first in (False, True) if any(inside) else (False,):
        segments = [
            _segment(network, run, maps if depth_first else set())
            for run, maps in zip(runs, inside, strict=True)
        ]
        found += [_replaced(network, runs, [s.with_slice(images) for s in segments]) for images in slices]
    # Large maps want few images, to stay in the cache; small ones want many, to share the weights.
    parts = [_cut(run) for run in runs]
    if batch > 1 and any(late for _, late in parts):
        runs = [part for pair in parts for part in pair if part]
        segments = [_segment(network, run, _inside(network, run)) for run in runs]
        late = [part is pair[1] for pair in parts for part in pair if part]
        for images in slices[:2]:
            chosen = [
                s.with_slice(batch if small else images) for s, small in zip(segments, late, strict=True)
            ]
            found.append(_replaced(network, runs, chosen))
    return found


def takes_any_layout(network: nn.Module) -> bool:
    """Whether every input goes to segments alone: they read all memory formats as fast as they could be converted."""
    if not isinstance(network, fx.GraphModule):
        return False
    inputs = [node for node in network.graph.nodes if node.op == "placeholder"]
    readers = {user for node in inputs for user in node.users}
    return all(
        user.op == "call_module" and isinstance(network.get_submodule(str(user.target)), CompactSegment)
        for user in readers
    )


def _cut(run: list[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """Before and behind the first small map that alone leads to a convolution and all that follows; the second may be empty."""
    for i, node in enumerate(run[:-1]):
        _, height, width = _known(node)
        before = set(run[:i])
        alone = not any(before & set(later.all_input_nodes) for later in run[i + 1 :])
        if height * width <= _SMALL and alone and i > 0 and _is(run[i + 1], CompactConv2d):
            return run[: i + 1], run[i + 1 :]
    return run, []


def _shape(node: fx.Node) -> Shape | None:
    seen = node.meta.get("seen")
    if seen is None or len(seen[0]) != 4 or seen[1] is not torch.float32:
        return None
    _, channels, height, width = seen[0]
    return channels, height, width


def _supported(network: fx.GraphModule, node: fx.Node) -> bool:
    if node.op != "call_module" or node.kwargs or not all(isinstance(a, fx.Node) for a in node.args):
        return False
    inputs = [a for a in node.args if isinstance(a, fx.Node)]
    if any(shape is None or min(shape) < 1 for shape in map(_shape, (node, *inputs))):
        return False
    module = network.get_submodule(str(node.target))
    if isinstance(module, CompactConv2d):
        dense = module.in_index is None and module.out_index is None and module.packed.dtype == torch.float32
        return dense and module.packed.device.type == "cpu"
    if len(inputs) != 1 or not plain(module):
        return False
    if type(module) is nn.AdaptiveAvgPool2d:
        return _known(node)[1:] == (1, 1) and _known(inputs[0])[1] * _known(inputs[0])[2] <= _MOST_AVERAGED
    if type(module) is not nn.MaxPool2d:
        return False
    return not module.return_indices and not module.ceil_mode and _pair(module.dilation) == (1, 1)


def _runs(network: fx.GraphModule) -> list[list[fx.Node]]:
    """Neighbours in the order of execution that read one tensor from outside and of which only the last is read outside."""
    runs: list[list[fx.Node]] = []
    run: list[fx.Node] = []
    source: fx.Node | None = None

    def close() -> None:
        while run and any(set(n.users) - set(run) for n in run[:-1]):
            run.pop()
        if run:
            runs.append(list(run))
        run.clear()

    for node in network.graph.nodes:
        if _supported(network, node):
            outside = [n for n in node.all_input_nodes if n not in run]
            if run and any(n is not source for n in outside):
                close()
                outside = list(node.all_input_nodes)
            arena_only = _is(node, nn.MaxPool2d, nn.AdaptiveAvgPool2d)
            if (run or len(outside) == 1) and not (outside and arena_only):
                source = source if run else outside[0]
                run.append(node)
                continue
        close()
    close()
    return runs


def _is(node: fx.Node, *kinds: type[nn.Module]) -> bool:
    module = node.graph.owning_module
    return module is not None and isinstance(module.get_submodule(str(node.target)), kinds)


def _pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _segment(network: fx.GraphModule, run: list[fx.Node], inside: set[fx.Node]) -> CompactSegment:
    source = next(n for n in run[0].all_input_nodes if n not in run)
    graph = fx.Graph()
    copies = {source: graph.placeholder("x")}
    names = {node: f"layer_{number}" for number, node in enumerate(run)}
    root: dict[str, Any] = {}
    for node in run:
        root[names[node]] = network.get_submodule(str(node.target))
        copies[node] = graph.call_module(
            names[node], tuple(copies[a] for a in node.args if isinstance(a, fx.Node))
        )
    graph.output(copies[run[-1]])
    layers = fx.GraphModule(root, graph, "Layers")
    strides = _pixel_strides(network, run, inside)
    places, floats = _places(run, inside, strides)
    places |= {source: _INPUT, run[-1]: _OUTPUT, **dict.fromkeys(inside, _INSIDE)}
    steps: list[int] = []
    convolutions: list[str] = []
    for node in run:
        channels, height, width = _known(node)
        inputs = [a for a in node.args if isinstance(a, fx.Node)]
        maps = [places[inputs[0]], places[node], places[inputs[1]] if len(inputs) > 1 else _NONE]
        apart = [strides[inputs[0]], strides[node], strides[inputs[1]] if len(inputs) > 1 else 0]
        shapes = [*_known(inputs[0]), channels, height, width]
        module = root[names[node]]
        if isinstance(module, CompactConv2d):
            weight = 2 * len(convolutions)
            bias = _NONE if module.bias is None else weight + 1
            convolutions.append(names[node])
            settings = [weight, bias, list(ACTIVATIONS).index(module.activation)]
            window = [*module.weight_shape[2:], *module.stride, *module.padding, *module.dilation]
            steps += [_CONV, *maps, *settings, *shapes, *window, module.groups, *apart, 0]
        elif isinstance(module, nn.AdaptiveAvgPool2d):
            steps += [_MEAN, *maps, 0, _NONE, 0, *shapes, *shapes[1:3], 1, 1, 0, 0, 1, 1, 1, *apart, 0]
        else:
            kernel, padding = _pair(module.kernel_size), _pair(module.padding)
            window = [*kernel, *_pair(module.stride or kernel), *padding, 1, 1]
            steps += [_MAX_POOL, *maps, 0, _NONE, 0, *shapes, *window, 1, *apart, 0]
    first, last = _known(source), _known(run[-1])
    header = [_VERSION, len(run), *first, *last, floats, 1]
    program = torch.tensor([*header, *steps], dtype=torch.int64)
    return CompactSegment(layers, convolutions, program, first)


def _places(
    run: list[fx.Node], inside: set[fx.Node], strides: dict[fx.Node, int]
) -> tuple[dict[fx.Node, int], int]:
    """Where the maps of the arena begin, and its size in floats per image; ``strides``: floats from pixel to pixel."""
    last_reader = {a: i for i, node in enumerate(run) for a in node.all_input_nodes}
    for i in reversed(range(len(run) - 1)):
        if run[i] in inside:  # what a layer reads is needed until those behind it are done
            for a in run[i].all_input_nodes:
                last_reader[a] = max(last_reader[a], last_reader[run[i]])
    arena: Arena[fx.Node] = Arena(_ALIGN)
    for i, node in enumerate(run):
        if node is not run[-1] and node not in inside:
            _, height, width = _known(node)
            size = strides[node] * height * width
            arena.take(node, size if size % _SETS else size + _APART)
        for old in node.all_input_nodes:
            if last_reader[old] == i:
                arena.free(old)
    return arena.places()


def _inside(network: fx.GraphModule, run: list[fx.Node]) -> set[fx.Node]:
    """Maps that need not be whole: between a depthwise convolution and a 1x1 behind it, and between a 1x1 and such a pair."""
    inside: set[fx.Node] = set()
    readers = {node: [later for later in run if node in later.all_input_nodes] for node in run}
    for before, node, after in zip(run, run[1:], run[2:], strict=False):
        _, height, width = _known(node)
        if not _is_depthwise(network, node) or readers[node] != [after] or height * width < _FEW:
            continue
        if not _is_1x1(network, after) or after.args.index(node) != 0 or node in after.args[1:]:
            continue
        if node.args[0] is not before:
            continue
        inside.add(node)
        expands = _is_1x1(network, before) and len(before.args) == 1 and readers[before] == [node]
        if expands and before.args[0] in run and before.args[0] not in inside:
            inside.add(before)
    return inside


def _convolution(network: fx.GraphModule, node: fx.Node) -> tuple[list[int], tuple[int, ...], int] | None:
    """Shape of the weight; stride, padding and dilation; groups."""
    conv = network.get_submodule(str(node.target))
    if not isinstance(conv, CompactConv2d):
        return None
    return conv.weight_shape, (*conv.stride, *conv.padding, *conv.dilation), conv.groups


def _is_1x1(network: fx.GraphModule, node: fx.Node) -> bool:
    found = _convolution(network, node)
    return found is not None and found[0][2:] == [1, 1] and found[1][:4] == (1, 1, 0, 0) and found[2] == 1


def _is_depthwise(network: fx.GraphModule, node: fx.Node) -> bool:
    found = _convolution(network, node)
    if found is None or len(node.args) > 1 or found[1][2:] != (1, 1, 1, 1):
        return False
    shape, window, groups = found
    return shape[1:] == [1, 3, 3] and shape[0] == groups > 1 and window[:2] in ((1, 1), (2, 2))


def _pixel_strides(network: fx.GraphModule, run: list[fx.Node], inside: set[fx.Node]) -> dict[fx.Node, int]:
    """Floats from pixel to pixel of every map.

    Room behind the channels lets every pixel begin on a cache line (else on half of one, where that takes more than a
    quarter of memory more). Maps at the ends, and those of max-pools, are dense.
    """
    steps = {node: _known(node)[0] for node in (*run, *(a for n in run for a in n.all_input_nodes))}
    for node in run[:-1]:
        if not any(_is(n, nn.MaxPool2d) for n in (node, *node.users)):
            line, half = (-(-steps[node] // floats) * floats for floats in (_ALIGN, _ALIGN // 2))
            steps[node] = 0 if node in inside else line if 4 * line <= 5 * half else half
    return steps


def _known(node: fx.Node) -> Shape:
    shape = _shape(node)
    assert shape is not None
    return shape


def _replaced(
    network: fx.GraphModule, runs: list[list[fx.Node]], segments: list[CompactSegment]
) -> nn.Module:
    rewrite = Rewrite(network)
    for number, (run, segment) in enumerate(zip(runs, segments, strict=True)):
        source = next(n for n in run[0].all_input_nodes if n not in run)
        rewrite.replace(run, [source], f"segment_{number}", segment)
    return rewrite.module()


__all__ = ["CompactSegment", "in_segments", "takes_any_layout"]
