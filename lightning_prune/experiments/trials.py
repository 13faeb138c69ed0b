"""What a fit of an experiment is: the setting shared by all of them, the trial that differs, the result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Protocol

import lightning as L
import torch
from torch import Tensor, nn

from ..config import check_choice, check_fraction, check_positive, methods
from ..data import TensorPairs
from ..models import Classifier

#: whose widths the from-scratch baselines take, and against which the others are compared
DEFAULT_METHOD = "l1"
#: what is trained beside the methods of ``ChannelPruning``
BASELINES: dict[str, str] = {
    "dense": "the dense network, trained for all epochs",
    "magnitude_one_shot": "the smallest weights removed at once after the warmup, finetuned for the rest",
    "from_scratch": f"the widths that {DEFAULT_METHOD} found, fresh weights, as many epochs",
    "from_scratch_compute": f"the widths that {DEFAULT_METHOD} found, fresh weights, as many multiply-accumulates",
}
FROM_SCRATCH = ("from_scratch", "from_scratch_compute")


def known_methods() -> tuple[str, ...]:
    """Every method that a trial can have."""
    return (*methods(), *BASELINES)


def check_methods(names: Sequence[str], extra: Iterable[str] = ()) -> None:
    """Raise ValueError unless ``names`` are known methods (or in ``extra``), each at most once, and at least one."""
    if not names:
        raise ValueError("methods must name at least one method, got none")
    for name in names:
        check_choice("methods", name, (*known_methods(), *extra))
    if len(set(names)) != len(names):
        raise ValueError(f"methods must be named once each, got {', '.join(names)}")


class Data(Protocol):
    """What an experiment needs of a data module."""

    input_shape: tuple[int, int, int]
    num_classes: int

    def part(self, name: str) -> TensorPairs:
        """Inputs and labels of "train", "val" or "test"."""

    def train_dataloader(self) -> Any:
        """Batches in an order that depends on the module's ``shuffle_seed`` and the epoch."""


class ExperimentModule(Classifier):
    """A classifier whose loss can be scaled and whose weights are penalised during the whole fit.

    The loss is ``loss_scale * cross_entropy + l1 * sum |w| + l2 * sum w^2`` over all weights with at least two dimensions.

    Args:
        model: inputs -> logits.
        lr: start of the cosine decay of Adam's learning rate.
        num_classes: number of classes.
        l1: penalty on the absolute weights.
        l2: penalty on the squared weights.
        loss_scale: factor on the cross-entropy.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        num_classes: int = 10,
        *,
        l1: float = 0.0,
        l2: float = 0.0,
        loss_scale: float = 1.0,
    ) -> None:
        super().__init__(model, lr=lr, num_classes=num_classes)
        self.l1, self.l2, self.loss_scale = l1, l2, loss_scale

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Scaled loss of one batch, with penalties; nothing is logged, for speed."""
        inputs, labels = batch
        loss = self.loss_scale * torch.nn.functional.cross_entropy(self(inputs), labels)
        if self.l1 or self.l2:
            for weight in self.parameters():
                if weight.dim() > 1:
                    loss = loss + self.l1 * weight.abs().sum() + self.l2 * weight.square().sum()
        return loss


@dataclass(frozen=True)
class Setting:
    """A network, its data and how it is trained: everything that the trials of a comparison share.

    Attributes:
        name: in tables and files.
        make_data: data module of a seed (which draws the data, where they are drawn, and shuffles).
        make_net: ``(input_shape, num_classes)`` -> untrained network.
        epochs: warmup, mask learning, finetuning; the dense network and the baselines train for their sum.
        lr: start of the cosine decay of Adam's learning rate.
        metric: of the budget, ``"macs"`` or ``"params"``.
        l1: penalty on the absolute weights during the whole fit.
        l2: penalty on the squared weights during the whole fit.
        pruning: further arguments of :class:`~lightning_prune.ChannelPruning`.
        describe: whatever else belongs to the identity of the experiment (sizes of data and network).
        with_norms: name of the setting that takes this one's place for "slimming", which needs batch norms.
        shown_as: under which name tables and plots show the results; default: ``name``.
    """

    name: str
    make_data: Callable[[int], Data]
    make_net: Callable[[tuple[int, int, int], int], nn.Module]
    epochs: tuple[int, int, int]
    lr: float = 1.5e-3
    metric: str = "macs"
    l1: float = 0.0
    l2: float = 0.0
    pruning: dict[str, Any] = field(default_factory=dict)
    describe: dict[str, Any] = field(default_factory=dict)
    with_norms: str = ""
    shown_as: str = ""

    def __post_init__(self) -> None:
        warmup, learn, finetune = self.epochs
        for what, value, least in (("warmup", warmup, 0), ("learn", learn, 1), ("finetune", finetune, 0)):
            check_positive(f"epochs of {what}", value, least=least)
        check_choice("metric", self.metric, ("macs", "params"))

    @property
    def total_epochs(self) -> int:
        """Epochs of one fit."""
        return sum(self.epochs)

    def build(self, data: Data, seed: int, loss_scale: float = 1.0) -> ExperimentModule:
        """The untrained module of a seed, in channels_last."""
        L.seed_everything(seed, verbose=False)
        net = self.make_net(data.input_shape, data.num_classes)
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return ExperimentModule(net, self.lr, data.num_classes, l1=self.l1, l2=self.l2, loss_scale=loss_scale)

    def identity(self) -> dict[str, Any]:
        """All that decides about the results, as JSON data: trials of different identities are never mixed."""
        return {
            "name": self.name, "epochs": list(self.epochs), "lr": self.lr, "metric": self.metric, "l1": self.l1,
            "l2": self.l2, "pruning": self.pruning, **self.describe,
        }  # fmt: skip

    def fingerprint(self) -> str:
        """Short hash of :meth:`identity`, for file names."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, order=True)
class Trial:
    """One fit: a method at a budget with a seed. Equal seeds share data, initial weights and the whole warmup.

    Attributes:
        network: name of the setting.
        method: one of :func:`known_methods`, or a name that the experiment's runner knows.
        target: share of the metric to keep; 1 for "dense".
        seed: of everything random.
        loss_scale: factor on the loss.
    """

    network: str
    method: str
    target: float
    seed: int
    loss_scale: float = 1.0

    def __post_init__(self) -> None:
        check_fraction("target", self.target)
        check_positive("seed", self.seed, least=0)

    @property
    def key(self) -> str:
        """Unique text of this trial within an experiment."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_key(cls, key: str) -> Trial:
        """Inverse of :attr:`key`."""
        return cls(**json.loads(key))

    def __str__(self) -> str:
        scale = "" if self.loss_scale == 1 else f", loss x {self.loss_scale:g}"
        return f"{self.network}, {self.method} at {self.target:.0%}, seed {self.seed}{scale}"

    def needs(self) -> Trial | None:
        """The trial that has to be complete before this one, or None.

        The dense one trains the shared warmup (at other loss scales whoever comes first); from-scratch networks take the
        widths that the default method found.
        """
        if self.method in FROM_SCRATCH:
            return Trial(self.network, DEFAULT_METHOD, self.target, self.seed, self.loss_scale)
        dense = Trial(self.network, "dense", 1.0, self.seed)
        return None if self.method == "dense" or self.loss_scale != 1 else dense


@dataclass(frozen=True)
class TrialResult:
    """What one trial gave.

    Attributes:
        trial: what was run.
        accuracy: share of the test part that is classified correctly.
        macs / dense_macs: multiply-accumulates of one sample, of the compact and of the dense network.
        params / dense_params: parameter elements.
        epochs: that the network was trained for.
        train_macs: multiply-accumulates of one sample's forward passes over all epochs, removed channels counted until
            they are selected: what "equal compute" compares.
        seconds: CPU time of the training, the shared warmup included.
        widths: group -> (live channels, size); empty for methods without channel groups.
        reached: share of the dense MACs that the penalty alone had reached at the end of learning, before the hard
            selection; None for methods without a penalty.
        plan: the compaction plan as JSON data, where a later trial needs it.
    """

    trial: Trial
    accuracy: float
    macs: float
    dense_macs: float
    params: float
    dense_params: float
    epochs: int
    train_macs: float
    seconds: float
    widths: dict[str, tuple[int, int]] = field(default_factory=dict)
    reached: float | None = None
    plan: dict[str, Any] | None = None

    @property
    def macs_share(self) -> float:
        """MACs that are left, as a share of the dense network's."""
        return self.macs / self.dense_macs

    @property
    def params_share(self) -> float:
        """Parameters that are left, as a share of the dense network's."""
        return self.params / self.dense_params

    def to_json(self, *, with_plan: bool = True) -> dict[str, Any]:
        """Plain JSON data; inverse of :meth:`from_json` if the plan is in."""
        data = asdict(self)
        data["widths"] = {group: list(width) for group, width in self.widths.items()}
        if not with_plan:
            del data["plan"]
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TrialResult:
        """Read what :meth:`to_json` gave; unknown entries are an error."""
        unknown = set(data) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"a trial's result has unknown entries {sorted(unknown)}")
        widths = {group: (int(live), int(size)) for group, (live, size) in data.get("widths", {}).items()}
        return cls(**{**data, "trial": Trial(**data["trial"]), "widths": widths})


def grid(
    settings: Mapping[str, Setting],
    method_names: Sequence[str],
    targets: Sequence[float],
    seeds: Sequence[int],
) -> list[Trial]:
    """Every combination, seed by seed, with the trials that others need, needed ones first."""
    trials: dict[Trial, None] = {}

    def add(trial: Trial) -> None:
        needed = trial.needs()
        if needed is not None:
            add(needed)
        trials.setdefault(trial)

    for seed in seeds:
        for setting in settings.values():
            if setting.shown_as:
                continue
            add(Trial(setting.name, "dense", 1.0, seed))
            for target in targets:
                for method in method_names:
                    if method != "dense":
                        name = (setting.with_norms or setting.name) if method == "slimming" else setting.name
                        add(Trial(name, method, float(target), seed))
    return list(trials)
