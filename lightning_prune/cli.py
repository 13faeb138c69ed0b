"""The ``lightning-prune`` command: demo, info, inspect, bench, prune.

Exit status: 0 on success, 2 for a mistake on the command line or in what it names, with one line on stderr that says
what was expected, what was found and what to do. Heavy imports happen inside the subcommands, so ``--help`` is quick.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


class UsageError(Exception):
    """Something the user can correct; the message is all they need."""


def parse_shape(text: str) -> tuple[int, ...]:
    """Read "1,3,32,32" (or "1x3x32x32") as a shape.

    Raises:
        argparse.ArgumentTypeError: not a list of positive integers.
    """
    try:
        shape = tuple(int(part) for part in text.lower().replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise argparse.ArgumentTypeError(
            f"expected positive integers separated by commas, batch first, like 1,3,32,32; got {text!r}"
        )
    return shape


def load_model(spec: str) -> nn.Module:
    """Import and call the factory that a spec names.

    Args:
        spec: ``package.module:callable`` (dots after the colon reach into classes); the callable takes no arguments
            and returns a ``torch.nn.Module``. The current folder is on the import path.

    Returns:
        The model.

    Raises:
        UsageError: the spec is malformed, cannot be imported, or does not give a module.
    """
    from torch import nn

    module_name, colon, path = spec.partition(":")
    if not (module_name and colon and path):
        raise UsageError(f"a model is named package.module:callable, got {spec!r}")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        target: object = importlib.import_module(module_name)
    except ImportError as error:
        raise UsageError(f"cannot import {module_name!r} for model {spec!r}: {error}") from error
    for name in path.split("."):
        if not hasattr(target, name):
            raise UsageError(f"{module_name!r} has no {path!r}; check the part of {spec!r} behind the colon")
        target = getattr(target, name)
    if isinstance(target, nn.Module):
        return target
    if not callable(target):
        raise UsageError(
            f"{spec!r} must be a callable without arguments that returns a model, got {target!r:.80}"
        )
    try:
        model = target()
    except TypeError as error:
        raise UsageError(
            f"{spec!r} could not be called without arguments ({error}); name a function that builds the model"
        ) from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"{spec!r} must return a torch.nn.Module, got {type(model).__name__}")
    return model


def _example(shape: tuple[int, ...]) -> Tensor:
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _demo(arguments: argparse.Namespace) -> int:
    # Read by OpenMP when torch is loaded. By default idle threads spin at every barrier, which makes two threads many
    # times slower than one as soon as anything else runs on the same cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from .demo import run_demo

    run_demo(
        arguments.out,
        datasets=arguments.datasets,
        seeds=arguments.seeds,
        target=arguments.target,
        method=arguments.method,
    )
    return 0


def _info(arguments: argparse.Namespace) -> int:
    from .info import collect, render

    print(render(collect()))
    return 0


def _sweep_article(arguments: argparse.Namespace) -> int:
    # Without a sleeping policy idle OpenMP threads of several workers spin on the same cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from .experiments.article import METHODS, ArticleSweep, run_article

    given = {
        name: value
        for name in (
            "targets", "seeds", "epochs", "metric", "data_dir", "samples", "canvas", "widths", "batch_size", "lr", "l1", "l2",
        )
        if (value := getattr(arguments, name)) is not None
    }  # fmt: skip
    for name in ("epochs", "widths"):
        if name in given:
            given[name] = tuple(given[name])
    complete = run_article(
        ArticleSweep(methods=arguments.methods or METHODS, quick=arguments.quick, **given),
        arguments.out,
        storage=arguments.storage,
        study=arguments.study,
        jobs=arguments.jobs,
        threads=arguments.threads,
        report_only=arguments.report,
    )
    return 0 if complete else 1


def _add_sweep(sub: argparse.ArgumentParser) -> None:
    """Arguments of ``sweep article``; what is left out takes the article's values (see ``ArticleSweep``)."""
    sub.add_argument("--methods", nargs="+", metavar="METHOD", help="default: l1 l0 vib taylor slimming magnitude "
                     "random first_k from_scratch from_scratch_compute; also obd, apoz, fpgm, magnitude_one_shot")  # fmt: skip
    sub.add_argument(
        "--targets",
        nargs="+",
        type=float,
        metavar="SHARE",
        help="shares to keep (default: 0.7 0.5 0.3 0.2 0.1)",
    )
    sub.add_argument(
        "--metric", choices=("params", "macs"), help="of the shares (default: params, the weights)"
    )
    sub.add_argument("--seeds", type=int, help="fits per method and share (default: 5)")
    sub.add_argument(
        "--epochs", nargs=3, type=int, metavar=("WARMUP", "LEARN", "FINETUNE"), help="default: 6 3 6"
    )
    sub.add_argument(
        "--data-dir",
        help="folder of CIFAR-10 or CIFAR-100, binary or python version (default: cluttered digits)",
    )
    sub.add_argument(
        "--samples", type=int, help="training samples (default: 4000 cluttered digits, all of CIFAR)"
    )
    sub.add_argument("--canvas", type=int, help="edge length of the cluttered digits (default: 20 pixels)")
    sub.add_argument(
        "--widths",
        nargs=5,
        type=int,
        metavar="N",
        help="channels per layer (default: 32 32 64 64 128, CIFAR-100 twice that)",
    )
    sub.add_argument("--batch-size", type=int, help="default: 32")
    sub.add_argument("--lr", type=float, help="Adam's learning rate, decayed to zero (default: 0.0015)")
    sub.add_argument("--l1", type=float, help="penalty on the absolute weights (default: 5e-5)")
    sub.add_argument("--l2", type=float, help="penalty on the squared weights (default: 2.5e-4)")
    sub.add_argument("--out", default="runs/article", help="folder for the results (default: %(default)s)")
    sub.add_argument(
        "--storage",
        help="Optuna storage, sqlite:///FILE, another database URL or journal:FILE (default: sqlite in --out); "
        "several calls with the same storage share the work",
    )
    sub.add_argument("--study", default="article", help="name within the storage (default: %(default)s)")
    sub.add_argument("--jobs", type=int, default=1, help="worker processes (default: %(default)s)")
    sub.add_argument("--threads", type=int, default=1, help="CPU threads per process (default: %(default)s)")
    sub.add_argument("--quick", action="store_true", help="in miniature: a few seconds per fit")
    sub.add_argument("--report", action="store_true", help="train nothing, draw what is in the storage")


def _inspect(arguments: argparse.Namespace) -> int:
    from .channels import trace_channels
    from .profiling import profile

    model, example = load_model(arguments.model).eval(), _example(arguments.input_shape)
    graph = trace_channels(model, example)
    print(graph.table())
    if arguments.profile:
        print()
        print(profile(model, example).table())
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from .latency import compare_latency, cpu_threads

    model, example = load_model(arguments.model).eval(), _example(arguments.input_shape)
    models = {"model": model}
    if arguments.optimize:
        from .inference import optimize_for_inference

        with cpu_threads(arguments.threads):
            models["optimized"] = optimize_for_inference(model, example)
    measured = compare_latency(
        models,
        example,
        repeats=arguments.repeats,
        min_seconds=arguments.min_seconds,
        threads=arguments.threads,
    )
    for name, latency in measured.items():
        print(latency if len(measured) == 1 else f"{name:<10}{latency}")
    return 0


def _prune(arguments: argparse.Namespace) -> int:
    from . import prune_channels
    from .compaction import save_compact

    out = Path(arguments.out)
    if out.exists() and not arguments.force:
        raise UsageError(f"--out {out} exists; choose another path or add --force to replace it")
    result = prune_channels(
        load_model(arguments.model),
        _example(arguments.input_shape),
        target=arguments.target,
        metric=arguments.metric,
        method=arguments.method,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    save_compact(result.model, result.plan, out)
    print(result.report)
    print(f"written: {out}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The argument parser; each subcommand sets ``run``."""
    parser = argparse.ArgumentParser(
        prog="lightning-prune",
        description="Channel pruning for PyTorch Lightning: smaller, measurably faster convolutional networks.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    def with_model(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("model", metavar="MODEL", help="package.module:callable that builds the model")
        sub.add_argument(
            "--input-shape",
            type=parse_shape,
            required=True,
            metavar="N,C,H,W",
            help="of the example input, batch first",
        )

    demo = command("demo", _demo, "train, prune, compact and time networks on real digits")
    demo.add_argument("--out", default="runs/demo", help="folder for the results (default: %(default)s)")
    demo.add_argument(
        "--datasets", nargs="+", choices=("digits", "cluttered"), default=["digits", "cluttered"]
    )
    demo.add_argument("--seeds", type=int, default=3, help="networks per data set (default: %(default)s)")
    demo.add_argument(
        "--target", type=float, default=0.5, help="share of the MACs to keep (default: %(default)s)"
    )
    demo.add_argument("--method", default="l1", help="how masks are found (default: %(default)s)")

    sweep = commands.add_parser(
        "sweep", help="compare methods at many budgets over several seeds; resumable, parallel"
    )
    experiments = sweep.add_subparsers(dest="experiment", required=True, metavar="EXPERIMENT")
    text = "the source article's experiment: accuracy against the share of weights removed"
    article = experiments.add_parser("article", help=text, description=text)
    article.set_defaults(run=_sweep_article)
    _add_sweep(article)

    command("info", _info, "versions, and whether and how the compiled extension works here")

    inspect = command(
        "inspect", _inspect, "list the channel groups of a model and what is frozen, with the reason"
    )
    with_model(inspect)
    inspect.add_argument("--profile", action="store_true", help="also parameters and MACs per layer")

    bench = command("bench", _bench, "measure the latency of a model")
    with_model(bench)
    bench.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's own choice)")
    bench.add_argument(
        "--repeats", type=int, default=30, help="smallest number of timed calls (default: %(default)s)"
    )
    bench.add_argument(
        "--min-seconds", type=float, default=1.0, help="measure at least so long (default: %(default)s)"
    )

    bench.add_argument(
        "--optimize", action="store_true", help="also the same model through optimize_for_inference, in turns"
    )

    prune = command("prune", _prune, "prune a model without training and save the compact network")
    with_model(prune)
    prune.add_argument(
        "--target", type=float, default=0.5, help="share of the cost to keep (default: %(default)s)"
    )
    prune.add_argument("--metric", default="macs", help="the cost: macs or params (default: %(default)s)")
    prune.add_argument("--method", default="magnitude", help="which channels go first (default: %(default)s)")
    prune.add_argument("--out", required=True, help="safetensors file to write; the plan is inside")
    prune.add_argument("--force", action="store_true", help="replace --out if it exists")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments without the program's name; None takes ``sys.argv``.

    Returns:
        The exit status.
    """
    arguments = build_parser().parse_args(argv)
    from .errors import PruneError

    try:
        run: Callable[[argparse.Namespace], int] = arguments.run
        return run(arguments)
    except (UsageError, PruneError, ValueError, ModuleNotFoundError, FileNotFoundError) as error:
        print(f"lightning-prune {arguments.command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
