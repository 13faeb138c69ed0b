"""One training step while channels die: forward, backward and SGD, in every form in which a fit may run it, and its peers.

Mixed precision (bfloat16 autocast), synthetic images, channels_last unless a form ends in ``/nchw``. The same share of every
group of channels is dead. ``gated`` is what a fit runs: the full-size network, a learned gate on every channel, maps of live
channels, fused norms, dead channels held at zero. Its peers: ``dense``, the network before pruning; ``cut``, the network
without its dead channels; ``multiplied``, the full-size network with gates and torch's kernels, which is what others do.
``cut+gates``: the fit after `reconfigure_every_n_epochs` has cut. Without gates: ``masked``, the same size with dead channels
at zero, ``live_maps``, that with maps of live channels, ``rounded``, cut to multiples of 8; ``+norms``: norms by this
package's operator where they are faster. ``/compiled``: by `torch.compile`, last and within a time box.

A row per form, timed in turns with ``dense`` and ``gated``; ``answers``: how much longer the best of each peer takes than
``gated`` (``cut`` eager and compiled, all others eager).

    python -m benchmarks.gpu.training [--quick] [--device cpu] [--only vgg16]
"""

from __future__ import annotations

import copy
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu.networks import dense_network
from benchmarks.gpu.record import Record, arguments, time_left
from benchmarks.gpu.timing import Timed, interleaved, warm_up
from benchmarks.training_models import NETWORKS, random_mask
from lightning_prune import CompactionPlan, compact, mask_channels, trace_channels
from lightning_prune.channels.groups import ChannelGraph, Mask
from lightning_prune.fused_norms import FusedNorms
from lightning_prune.gates.attach import GateHooks, consumer_channels
from lightning_prune.skipping import DeadChannelSkipper
from lightning_prune.weights import WeightKeeper

#: timed in turns with every other form
BESIDE = ("dense", "gated")
#: what the answers need, what else is of interest, and what takes long; each for all cases before the next
FIRST = (*BESIDE, "cut", "multiplied", "dense/nchw", "cut/nchw", "multiplied/nchw")
MORE = ("cut+gates", "rounded", "masked", "live_maps", "cut+norms", "rounded+norms", "dense+norms")
COMPILED = ("dense/compiled", "cut/compiled")
#: whose best form counts
PEERS = {
    "dense": ("dense", "dense/nchw"),
    "small": ("cut", "cut/nchw", "cut/compiled"),
    "multiplied": ("multiplied", "multiplied/nchw"),
}
#: these compute what the masked network does
ALIKE = {"gated", "cut", "cut/nchw", "cut+norms", "cut+gates", "multiplied", "multiplied/nchw", "live_maps"}
#: seconds below which no form is begun; seconds for one compilation
LEAST, BOX = 8.0, 60.0


class Case(NamedTuple):
    """A network, the share of its channels that is dead, images at a time and the length of their edges."""

    network: str
    share: float
    batch: int
    size: int


_ASKED = [("resnet20", 64, 32), ("vgg16", 64, 32), ("resnet18", 64, 64)]
_LARGER = [("resnet20", 512, 32), ("vgg16", 512, 32), ("resnet18", 512, 64)]
#: most wanted first
CASES = [
    *(Case(name, share, batch, size) for share in (0.5, 0.0) for name, batch, size in _ASKED),
    *(Case(name, share, batch, size) for share in (0.5, 0.0) for name, batch, size in _LARGER),
    *(Case(name, 0.75, batch, size) for name, batch, size in _ASKED),
    Case("resnet18", 0.5, 256, 224),
    Case("resnet50", 0.5, 128, 224),
]
TOY = [Case("toy", 0.5, 4, 16), Case("toy", 0.0, 4, 16)]


def network_of(case: Case) -> nn.Module:
    """The network of the CPU's benchmark at its size of images, else timm's."""
    make, size = NETWORKS.get(case.network, (None, 0))
    if make is None or size != case.size:
        return dense_network(case.network)
    torch.manual_seed(0)
    return make().eval()


class Form(NamedTuple):
    """A network on the device.

    Attributes:
        network: as it is called.
        hung: what hangs on it: kept alive, and asked how much it does.
        memory_format: of the images.
        held: the channels that stay dead in every step.
    """

    network: nn.Module
    hung: Any
    memory_format: torch.memory_format
    held: tuple[ChannelGraph, Mask] | None


class Forms:
    """Networks on the device, ready to train, made when they are asked for."""

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device = case, device
        self._example = torch.randn(2, 3, case.size, case.size)
        self._dense = network_of(case)
        self._graph = trace_channels(self._dense, self._example)
        self._expected: Tensor | None = None

    def names(self, wanted: tuple[str, ...]) -> list[str]:
        """Those of the ``wanted`` that there are: nothing is cut where nothing is dead."""
        if self.case.share > 0:
            return [name for name in wanted if name != "dense/compiled"]
        return [name for name in wanted if name.startswith(("dense", "gated", "multiplied"))]

    def _mask(self, multiple: int = 1) -> Mask:
        return random_mask(self._graph, self.case.share, 1, multiple)

    def _plain(self, origin: str) -> nn.Module:
        if origin == "dense":
            return copy.deepcopy(self._dense)
        plan = CompactionPlan.from_mask(self._graph, self._mask(8 if origin == "rounded" else 1))
        make = compact if origin in ("cut", "rounded") else mask_channels
        return make(self._dense, self._example, plan)

    def get(self, label: str) -> Form:
        """The form of this name."""
        name, _, kind = label.partition("/")
        origin, _, extra = name.partition("+")
        memory_format = torch.contiguous_format if kind == "nchw" else torch.channels_last
        network = self._plain(origin).to(self.device, memory_format=memory_format)  # type: ignore[call-overload]
        network = network.train().requires_grad_(True)
        graph, mask = self._graph, self._mask()
        hung: Any = None
        if extra == "gates":
            graph = trace_channels(copy.deepcopy(network).cpu(), self._example)
            mask = random_mask(graph, 0.0, 1)
        if origin in ("gated", "multiplied") or extra == "gates":
            alive = torch.from_numpy(mask) | ~consumer_channels(graph)
            gates = nn.Parameter(alive.float().to(self.device))
            GateHooks(network, graph, lambda training: gates).attach()
        if origin in ("gated", "live_maps") or extra == "gates":
            hung = DeadChannelSkipper(network, graph, self._example.to(self.device))
            hung.set_mask(mask)
        if extra == "norms":
            hung = FusedNorms(network)
        if kind == "compiled":
            network = torch.compile(network, backend="inductor" if self.device == "cuda" else "eager")
        return Form(network, hung, memory_format, (graph, mask) if origin == "gated" else None)

    def difference(self, label: str, form: Form) -> float | None:
        """Of the outputs in training mode from the masked network's, for forms that have to agree with it."""
        if label not in ALIKE:
            return None
        if self._expected is None:
            self._expected = self._outputs(self.get("masked"))
        return float((self._outputs(form) - self._expected).norm() / self._expected.norm())

    def _outputs(self, form: Form) -> Tensor:
        size = self.case.size
        x = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))
        with torch.no_grad(), torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            y: Tensor = form.network(x.to(self.device).contiguous(memory_format=form.memory_format))
        return y.double()


def step_of(form: Form, case: Case, device: str) -> Callable[[], float]:
    """A function that does one step and returns its seconds, after a few of them."""
    optimizer = torch.optim.SGD(form.network.parameters(), lr=1e-3, momentum=0.9)
    x = torch.randn(case.batch, 3, case.size, case.size, device=device).contiguous(
        memory_format=form.memory_format
    )
    labels = torch.randint(10, (case.batch,), device=device)
    keeper: WeightKeeper | None = None
    if form.held is not None:
        keeper = WeightKeeper(form.network, form.held[0], lambda: [optimizer])
        keeper.set_mask(form.held[1])

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = F.cross_entropy(form.network(x), labels)
        loss.backward()
        optimizer.step()
        if keeper is not None:
            keeper.zero_dead()

    def timed() -> float:
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) * 1e-3
        begun = time.perf_counter()
        step()
        return time.perf_counter() - begun

    for _ in range(3):  # chooses kernels
        timed()
    return timed


@contextmanager
def time_box(seconds: float | None) -> Iterator[None]:
    """TimeoutError in whatever runs inside for longer; None: no limit."""
    if seconds is None:
        yield
        return

    def late(*unused: Any) -> None:
        raise TimeoutError(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measure(known: Forms, wanted: tuple[str, ...], quick: bool, record: Record) -> bool:
    """A row per form, as soon as it is timed; whether there was time for all."""
    case, device = known.case, known.device
    steps: dict[str, Callable[[], float]] = {}
    for label in known.names(tuple(dict.fromkeys((*BESIDE, *wanted)))):
        compiled = label.endswith("/compiled")
        left = time_left()
        if left < LEAST and (steps or label not in wanted):
            return False
        try:
            if compiled:
                torch.compiler.reset()
            with time_box(min(BOX, left) if compiled else None):
                form = known.get(label)
                difference = known.difference(label, form) if label in wanted else None
                step = step_of(form, case, device)
            if label in BESIDE:
                steps[label] = step
            if label not in wanted:
                continue
            timed = interleaved({**steps, label: step}, samples=5 if quick else 10, max_seconds=1.0)
        except Exception as failure:
            record.add(**case._asdict(), form=label, failed=f"{type(failure).__name__}: {failure}"[:500])
            print(f"{case.network} {label}: FAILED: {failure}", flush=True)
            if "CUDA error" in str(failure):
                raise  # nothing after it can be trusted
            continue
        row = record.add(
            **case._asdict(), form=label, difference_from_masked=difference, **timed[label].as_row()
        )
        row |= beside(label, timed)
        if isinstance(form.hung, FusedNorms):
            row["norms_by_operator"] = sum(any(call.won.values()) for call in form.hung._norms.values())
        if isinstance(form.hung, DeadChannelSkipper):
            row["obstacle"] = form.hung.obstacle
        record.content["answers"] = answers(record.rows)
        record.save()
        print(line(row), flush=True)
    return True


def beside(label: str, timed: dict[str, Timed]) -> dict[str, Any]:
    """Times of the forms that ran in turns with this one, and the ratios to it."""
    found: dict[str, Any] = {}
    for other in BESIDE:
        if other in timed and other != label:
            found[f"{other}_beside"] = timed[other].as_row()
            found[f"{other}_over_this"] = timed[other].median / timed[label].median
    return found


def answers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per case and peer: its best form, and how much longer that takes than ``gated``."""
    ratios: dict[Case, dict[str, float]] = {}
    for row in rows:
        found = ratios.setdefault(Case(*(row[name] for name in Case._fields)), {})
        if "gated_over_this" in row:
            found[row["form"]] = 1 / row["gated_over_this"]
        elif row["form"] == "gated" and "dense_over_this" in row:
            found["dense"] = row["dense_over_this"]
    result = []
    for case, found in ratios.items():
        best = {
            peer: min((form for form in forms if form in found), key=found.__getitem__, default=None)
            for peer, forms in PEERS.items()
        }
        peers = {peer: {"form": form, "over_gated": found[form]} for peer, form in best.items() if form}
        if peers:
            result.append({**case._asdict(), **peers})
    return result


def line(row: dict[str, Any]) -> str:
    """One line of the table."""
    parts = [f"{row['network']} {row['size']} {row['share']:.0%} n={row['batch']} {row['form']:16}"]
    parts.append(f"{row['median_us'] / 1e3:8.2f} ms ±{row['noise']:.0%}")
    parts += [f"{other} {row[key]:.2f}x" for other in BESIDE if (key := f"{other}_over_this") in row]
    return " ".join(parts)


def main() -> None:
    given = arguments(__doc__, only={"help": "one network"})
    torch.backends.cudnn.benchmark = True
    cases = [c for c in (TOY if given.device == "cpu" else CASES) if given.only in (None, c.network)]
    if given.quick and given.device == "cuda":
        cases = cases[:2]
    warm_up(given.device)
    record = Record(given.out, "training", given.device)
    for wanted in (FIRST, MORE, COMPILED):
        for case in cases:
            if time_left() < LEAST or not measure(Forms(case, given.device), wanted, given.quick, record):
                print("out of time; what is measured is in the file")
                return
    record.finish()


if __name__ == "__main__":
    main()
