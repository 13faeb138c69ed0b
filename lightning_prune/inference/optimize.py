"""`optimize_for_inference`: the fastest of several equal networks."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..channels.trace import undisturbed
from ..compaction import max_relative_error
from ..compaction.apply import clone_model
from ..inputs import ExampleInputs, describe_failure, floating_dtype, to_model
from ..latency import compare_latency
from ..nn import CompactConv2d, MaskedConv2d
from ..ops.tensor_cores import tf32_allowed
from .choice import FORMATS, MARGIN, backend, can_run_own, fastest_kind, further_kinds, one_at_a_time
from .cuda_graph import CapturedCall, signature
from .recorded import RecordedBlueprint
from .segment import in_segments, takes_any_layout
from .sites import Blueprint, ConvSite
from .sites import plain as is_plain
from .symbolic import SymbolicBlueprint

#: largest difference from the original on the example, over the largest output
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
#: networks that are so close to the fastest after three calls are measured once more
_CLOSE = 1.15
CudaGraph = bool | Literal["auto"]


class OptimizedModule(nn.Module):
    """A network for inference; made by :func:`optimize_for_inference`.

    It stays in evaluation mode whatever ``train()`` is called with, and none of its parameters requires a gradient.

    Attributes:
        network: what runs.
        memory_format: "channels_last": 4-D inputs are converted to it; "contiguous": they are taken as they come.
        dtype: to which floating-point inputs are converted, or None.
        layers: convolution -> "own", "vendor", "padded" (the vendor's at multiples of 8 channels) or "prepacked" (the vendor's
            with weights in its own layout), where one was replaced.
        cuda_graph: whether calls on a GPU are captured.
    """

    def __init__(
        self,
        network: nn.Module,
        memory_format: str = "contiguous",
        dtype: torch.dtype | None = None,
        layers: dict[str, str] | None = None,
        cuda_graph: CudaGraph = False,
    ) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self._only = _only_module(network)
        self.memory_format = memory_format
        self.dtype = dtype
        self.layers = dict(layers or {})
        self.cuda_graph = cuda_graph
        self._captured: CapturedCall | None = None
        super().train(False)

    def train(self, mode: bool = True) -> OptimizedModule:
        """Stays in evaluation mode: folded norms cannot train."""
        return super().train(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the original returns, up to rounding; 4-D outputs may be in channels_last."""
        if len(args) == 1 and not kwargs and self._captured is None and type(args[0]) is Tensor:
            return self._runner()(self._prepared(args[0]))  # without what is slow about the general case
        args = tuple(
            self._prepared(a) if isinstance(a, Tensor) else tree_map(self._prepared, a) for a in args
        )
        kwargs = tree_map(self._prepared, kwargs) if kwargs else kwargs
        captured = self._captured
        if captured is not None and self._replayable(args, kwargs):
            return captured(args, kwargs)
        return self.network(*args, **kwargs)

    def _runner(self) -> nn.Module:
        """The network, or the only module that its graph calls: around a small layer a graph takes a tenth of the time."""
        network = cast(nn.Module, self._modules["network"])
        if not self._only or torch.compiler.is_compiling() or not is_plain(network):
            return network
        for name in self._only:
            network = cast(nn.Module, network._modules[name])
        return network

    def _replayable(self, args: Any, kwargs: Any) -> bool:
        """Whether the captured graph gives what a call would: same signature, and nobody wants gradients."""
        if torch.compiler.is_compiling() or self._captured is None:
            return False
        leaves = tree_leaves((args, kwargs))
        if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in leaves):
            return False
        return self._captured.signature == signature(args, kwargs)

    def _prepared(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if self.dtype is not None and leaf.is_floating_point():
            leaf = leaf.to(self.dtype)
        if self.memory_format == "channels_last" and leaf.dim() == 4:
            leaf = leaf.contiguous(memory_format=torch.channels_last)
        return leaf

    def capture(self, *args: Any, **kwargs: Any) -> bool:
        """Capture a CUDA graph for inputs like these; calls of other shapes run without it.

        Returns:
            Whether there is one now. With ``cuda_graph=True`` a failure raises instead.

        Raises:
            RuntimeError: ``cuda_graph`` is True and the network cannot be captured.
        """
        args, kwargs = tree_map(self._prepared, (args, kwargs))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not self.cuda_graph or not tensors or not all(t.is_cuda for t in tensors):
            return False
        try:
            self._captured = CapturedCall(self.network, args, kwargs)
        except RuntimeError:
            if self.cuda_graph is True:
                raise
            self._captured = None
        return self._captured is not None

    def _apply(self, fn: Any, recurse: bool = True) -> OptimizedModule:
        self._captured = None  # its buffers do not move along
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_captured": None}

    def extra_repr(self) -> str:
        """Memory format, dtype and how many layers run our kernels."""
        own = sum(kind == "own" for kind in self.layers.values())
        dtype = "" if self.dtype is None else f"dtype={self.dtype}, "
        return f"{dtype}memory_format={self.memory_format}, own kernels in {own} of {len(self.layers)} convolutions"


def _only_module(network: nn.Module) -> list[str]:
    """Where the module is that a graph calls with its input, and whose output it returns; empty where there is more to do."""
    nodes = list(network.graph.nodes) if isinstance(network, fx.GraphModule) else []
    if [node.op for node in nodes] != ["placeholder", "call_module", "output"]:
        return []
    x, call, output = nodes
    alone = call.args == (x,) and not call.kwargs and output.args == (call,)
    return str(call.target).split(".") if alone else []


def optimize_for_inference(
    model: nn.Module,
    example_inputs: ExampleInputs,
    dtype: torch.dtype | None = None,
    cuda_graph: CudaGraph = "auto",
    exact: bool = False,
) -> nn.Module:
    """A copy of ``model`` for inference, as fast as can be had here and equal to it.

    Batch norms are folded into their convolutions, activations and residual adds fused into them. Each convolution is
    timed on the example's shapes with torch's kernel (on a CPU also with oneDNN's and prepacked weights) and with this
    package's, in both memory formats, on this machine with the present number of threads; ours is taken where it is at
    least 3 % faster. The resulting networks are timed as a whole, beside the folded ones that run no kernel of ours, and
    the fastest is returned; there, too, ours must win by 3 %. Measurements of layers
    are kept in the user's cache folder.

    Convolution, norm and activation are found by ``torch.fx`` (then the result's network is a GraphModule) or, where a
    forward cannot be traced symbolically, by watching one run (then it keeps its class, and functional activations stay
    as they are). ``nn.Conv1d``, its norms and pools run as two-dimensional layers over maps of one row (``torch.fx`` only).
    What is not understood stays as it is.

    Environment: ``LIGHTNING_PRUNE_BACKEND`` is ``auto``, ``own`` (our kernels wherever they run) or ``vendor`` (never);
    ``LIGHTNING_PRUNE_CACHE`` is another folder, or ``off``.

    Args:
        model: any module; not changed. Training flags do not matter, the copy is made for evaluation.
        example_inputs: a tensor, a tuple or list of positional arguments or a dict of keyword arguments, of the batch size and
            resolution that the network will mostly see. Other shapes work, and may be slower than they could be.
        dtype: of weights, inputs and outputs; None keeps the model's.
        cuda_graph: capture calls of the example's shapes on a GPU: "auto" where it can be done, True raises where it
            cannot, False never. Ignored on a CPU.
        exact: our kernels never use Winograd's or Strassen's algorithm, or, on a GPU, tf32, whose rounding errors differ from
            those of the plain sum; nor do :class:`lightning_prune.nn.CompactConv2d` and ``MaskedConv2d`` in the copy of
            ``model``. In float32 every output of one of our convolutions is then within ``(n + 3) * 2**-24`` of its own sum of
            ``|x| * |weight|``, bias and residual included, n the number of products; with Winograd it is the largest sum of its
            tile that counts. Slower: 3x3 up to two times. Torch's kernels, where they are faster, sum directly on the CPU;
            on a GPU they do what ``torch.backends.cudnn`` allows.

    Returns:
        OptimizedModule: deep-copies, pickles, saves and loads its ``state_dict``; on a CPU it may be called from several
        threads at once, on a GPU captured calls take turns. Its difference from ``model`` on the example is at most 1e-4
        of the largest output for float32 (1e-9 for float64; for half types 5e-2 (bfloat16), 1e-2 (float16) or twice
        what the dtype alone costs; on a GPU where torch may use tf32, float32 is held to three times what that costs).
        Where nothing faster is equal, an unchanged copy.

    Raises:
        TraceError: ``forward`` fails on the example inputs.
        ValueError: ``dtype`` is not a floating-point type, ``cuda_graph`` or ``LIGHTNING_PRUNE_BACKEND`` is misspelt.
        RuntimeError: ``cuda_graph`` is True and capturing fails.
    """
    if cuda_graph not in (True, False, "auto"):
        raise ValueError(f"cuda_graph must be 'auto', True or False; got {cuda_graph!r}")
    if dtype is not None and dtype not in TOLERANCE:
        names = ", ".join(str(known) for known in TOLERANCE)
        raise ValueError(f"dtype must be one of {names} or None; got {dtype!r}")
    backend()  # a misspelt value shows before any work
    base = clone_model(model).eval()
    if exact:
        _sum_directly(base)
    inputs = to_model(example_inputs, base)
    try:
        error = max_relative_error(base, base, inputs)
    except Exception as failure:
        raise describe_failure(base, example_inputs, failure) from failure
    plain = OptimizedModule(clone_model(base).to(dtype), dtype=dtype, cuda_graph=cuda_graph)
    limit, best = _limit(base, plain, inputs, dtype), plain
    for kind in (SymbolicBlueprint, RecordedBlueprint) if error <= TOLERANCE[torch.float32] else ():
        blueprint = _try(kind, base, inputs)
        candidates = [] if blueprint is None else _candidates(blueprint, dtype, cuda_graph, exact)
        equal = [c for c in candidates if _error(base, c, inputs) <= limit]
        if equal:
            with one_at_a_time():
                best = _fastest(equal, inputs)
            break
    if best.cuda_graph:
        if best._captured is None:
            _capture(best, inputs)
        if best._captured is not None and not _error(base, best, inputs) <= limit:
            best._captured = None
    return best


def _limit(base: nn.Module, plain: nn.Module, inputs: ExampleInputs, dtype: torch.dtype | None) -> float:
    own = floating_dtype(base) or torch.float32
    limit = TOLERANCE.get(own if dtype is None else dtype, 1e-4)
    if (own if dtype is None else dtype) == torch.float32 and _rounds_to_tf32(base):
        # Both networks round, each in its own order; what rounding costs at all is the yardstick.
        limit = max(limit, min(3 * _error(_WithoutTf32(base), base, inputs), TOLERANCE[torch.float16]))
    return limit if dtype in (None, own) else max(limit, 2 * max(_error(base, plain, inputs), 0.0))


def _sum_directly(network: nn.Module) -> None:
    """Modules of this package that the network holds already, too."""
    for module in network.modules():
        if isinstance(module, (CompactConv2d, MaskedConv2d)):
            module.exact = True
        if isinstance(module, CompactConv2d):
            module._pack(module.weight)


def _rounds_to_tf32(base: nn.Module) -> bool:
    return tf32_allowed() and any(p.is_cuda for p in base.parameters())


class _WithoutTf32(nn.Module):
    """The same network with convolutions in full float32."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return self.network(*args, **kwargs)


def _error(base: nn.Module, other: nn.Module, inputs: ExampleInputs) -> float:
    """Relative difference; infinite where the other network fails or gives no numbers."""
    try:
        error = max_relative_error(base, other, inputs)
    except Exception:
        return float("inf")
    return error if error == error else float("inf")


def _try(
    kind: Callable[[nn.Module, ExampleInputs], Blueprint], base: nn.Module, inputs: ExampleInputs
) -> Blueprint | None:
    """A blueprint, or None: anything may happen in a user's forward under a tracer, and not to have one is always right."""
    try:
        model = clone_model(base)
        with undisturbed(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return kind(model, inputs)
    except Exception:
        return None


def _candidates(
    blueprint: Blueprint, dtype: torch.dtype | None, cuda_graph: CudaGraph, exact: bool
) -> list[OptimizedModule]:
    """Networks to choose from, torch's kernels first."""
    mode, found = backend(), []
    sites = [replace(site, exact=True) for site in blueprint.sites] if exact else blueprint.sites
    vendor = [("vendor",) * len(sites)]
    for name in FORMATS:
        kinds = [] if mode == "own" else list(vendor)
        if mode == "auto" and name == "channels_last":
            kinds.append(tuple(_further_kind(site, dtype) for site in sites))
        if mode != "vendor":
            kinds.append(tuple(_kind(site, dtype, mode, name) for site in sites))
        for choice in dict.fromkeys(kinds):
            modules: list[nn.Module] = [
                getattr(site, kind)() or site.vendor() for site, kind in zip(sites, choice, strict=True)
            ]
            network = clone_model(blueprint.build(modules)).to(dtype).to(memory_format=FORMATS[name])  # type: ignore[call-overload]
            layers = {site.name: kind for site, kind in zip(sites, choice, strict=True)}
            found.append(OptimizedModule(network, name, dtype, layers, cuda_graph))
    return found if mode == "vendor" else found + _segmented(blueprint, sites, dtype)


def _segmented(
    blueprint: Blueprint, sites: list[ConvSite], dtype: torch.dtype | None
) -> list[OptimizedModule]:
    """Networks whose runs of layers are single calls: everything ours, since a call of torch would cut a run in two."""
    weights = [site.conv.weight for site in sites]
    if not weights or any(w.is_cuda or (dtype or w.dtype) is not torch.float32 for w in weights):
        return []
    able = [can_run_own(site, torch.float32, site.conv.weight.device) for site in sites]
    modules: list[nn.Module] = [
        (site.own() if own else None) or site.vendor() for site, own in zip(sites, able, strict=True)
    ]
    network = clone_model(blueprint.build(modules)).to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    layers = {site.name: "own" if own else "vendor" for site, own in zip(sites, able, strict=True)}
    batch = sites[0].shape[0]
    found = in_segments(network, batch)
    formats = ["contiguous" if takes_any_layout(n) else "channels_last" for n in found]
    return [OptimizedModule(n, name, dtype, layers) for n, name in zip(found, formats, strict=True)]


def _further_kind(site: ConvSite, dtype: torch.dtype | None) -> str:
    weight = site.conv.weight
    return next(iter(further_kinds(site, dtype or weight.dtype, weight.device)), "vendor")


def _kind(site: ConvSite, dtype: torch.dtype | None, mode: str, memory_format: str) -> str:
    weight = site.conv.weight
    dtype = weight.dtype if dtype is None else dtype
    if not can_run_own(site, dtype, weight.device):
        return "vendor"
    return "own" if mode == "own" else fastest_kind(site, dtype, weight.device, memory_format)


def _fastest(candidates: list[OptimizedModule], inputs: ExampleInputs) -> OptimizedModule:
    if len(candidates) == 1:
        return candidates[0]
    for candidate in candidates:
        # What is timed is what will run: without the graph, small batches would measure Python.
        with contextlib.suppress(RuntimeError):
            _capture(candidate, inputs)
    named: dict[str, nn.Module] = {str(number): c for number, c in enumerate(candidates)}
    first = compare_latency(named, inputs, warmup=1, repeats=2, min_seconds=0.02)
    limit = _CLOSE * min(latency.p10 for latency in first.values())
    named = {name: c for name, c in named.items() if first[name].p10 <= limit}
    times = compare_latency(named, inputs, warmup=0, repeats=7, min_seconds=0.1)
    ranked = [candidates[int(name)] for name in sorted(times, key=lambda name: times[name].median)]
    medians = sorted(latency.median for latency in times.values())
    # The vendor's, unless ours win by the margin, as for each layer.
    close = [c for c, median in zip(ranked, medians, strict=True) if median < MARGIN * medians[0]]
    best = next((c for c in close if "own" not in c.layers.values()), ranked[0])
    for candidate in candidates:
        if candidate is not best:
            candidate._captured = None
    return best


def _capture(best: OptimizedModule, inputs: ExampleInputs) -> None:
    if isinstance(inputs, dict):
        best.capture(**inputs)
    else:
        best.capture(*(inputs if isinstance(inputs, (tuple, list)) else (inputs,)))
