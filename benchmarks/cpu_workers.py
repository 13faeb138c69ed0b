"""Runtimes in processes of their own that take turns: what benchmarks on several threads, and of whole networks, share."""

from __future__ import annotations

import contextlib
import multiprocessing
import random
import statistics
import time
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from cpu_runtimes import LEAST_ROUNDS

OURS = "ours"
#: seconds after which a runtime that is not ready does without: torch.compile takes minutes for a ResNet-50
PATIENCE = 400.0
#: seconds before each turn on more than one thread: workers of the last runtime may still spin
PAUSE = 0.02
#: times the best peer's time, beyond which a peer leaves the race after LEAST_ROUNDS
BEHIND = 1.3
#: seconds per runtime and variant
Times = dict[tuple[str, str], list[float]]


def processes() -> Any:
    """What workers are started with: a server that has imported what they need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cpu_network_peers", "networks"])
    return context


class Worker:
    """A runtime in its own process."""

    def __init__(self, context: Any, runtime: str) -> None:
        from cpu_network_peers import serve

        self.runtime = runtime
        self.variants: list[str] = []
        self.pipe, far = context.Pipe()
        self.process = context.Process(target=serve, args=(far, runtime), daemon=True)
        self.process.start()
        far.close()

    def prepare(self, setting: Any) -> None:
        self.variants = list(setting.files)
        self.pipe.send(setting)

    def answer(self) -> Any:
        """What the worker says next: a text where something failed."""
        try:
            return self.pipe.recv() if self.pipe.poll(PATIENCE) else f"no answer after {PATIENCE:.0f} s"
        except EOFError:
            return "the process died"

    def time(self, variant: str) -> tuple[float, float]:
        self.pipe.send(variant)
        answer = self.answer()
        if isinstance(answer, str):
            raise RuntimeError(f"{self.runtime}, {variant}: {answer}")
        cpu, wall = answer
        return cpu, wall

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send(None)
        self.process.join(1)
        self.process.kill()
        self.process.join()


def prepared(
    workers: dict[str, Worker], setting: Mapping[str, Any]
) -> tuple[list[Worker], dict[str, Any], dict[str, str]]:
    """Workers that are ready, their errors at the outputs, and why others failed; those are stopped and taken out.

    Raises:
        RuntimeError: ours failed.
    """
    active, errors, failed = [], {}, {}
    # Ours first, which chooses by measuring: nobody else may run meanwhile.
    for turn in ([OURS], [runtime for runtime in setting if runtime != OURS]):
        for runtime in turn:
            workers[runtime].prepare(setting[runtime])
        for runtime in turn:
            answer = workers[runtime].answer()
            if not isinstance(answer, str):
                errors[runtime] = answer
                active.append(workers[runtime])
            elif runtime == OURS:
                raise RuntimeError(answer)
            else:
                failed[runtime] = answer
                workers.pop(runtime).stop()
    return active, errors, failed


def race(
    workers: Iterable[Worker],
    rounds: int,
    threads: int,
    races: Iterable[Collection[str]],
    stay: Collection[tuple[str, str]],
    deadline: float,
) -> Times:
    """Seconds per call: process CPU time on one thread, wall time on more; one value per round, in another order every round.

    Args:
        workers: ready ones.
        rounds: of all who are in the race.
        threads: what the workers run on.
        races: variants that compete. After ``LEAST_ROUNDS`` a peer leaves that took ``BEHIND`` times as long as the best one.
        stay: runtimes and variants that do not leave.
        deadline: of ``time.monotonic``, from which on only ``LEAST_ROUNDS`` are taken.
    """
    turns = [(worker, variant) for worker in workers for variant in worker.variants]
    times: Times = {(worker.runtime, variant): [] for worker, variant in turns}
    order = random.Random(0)
    for number in range(rounds):
        if number >= LEAST_ROUNDS and time.monotonic() > deadline:
            break
        if number == LEAST_ROUNDS:
            out = behind(times, races) - set(stay)
            turns = [(worker, variant) for worker, variant in turns if (worker.runtime, variant) not in out]
        for worker, variant in order.sample(turns, len(turns)):
            if threads > 1:
                time.sleep(PAUSE)
            cpu, wall = worker.time(variant)
            times[worker.runtime, variant].append(cpu if threads == 1 else wall)
    return times


def behind(times: Times, races: Iterable[Collection[str]]) -> set[tuple[str, str]]:
    """Peers that took ``BEHIND`` times as long as the best one of their race."""
    out: set[tuple[str, str]] = set()
    for variants in races:
        peers = {
            key: statistics.median(s) for key, s in times.items() if key[1] in variants and key[0] != OURS
        }
        best = min(peers.values(), default=0.0)
        out |= {key for key, seconds in peers.items() if seconds > BEHIND * best}
    return out


def medians(times: Times) -> dict[str, dict[str, float]]:
    """Milliseconds per variant and runtime."""
    result: dict[str, dict[str, float]] = {}
    for (runtime, variant), seconds in times.items():
        result.setdefault(variant, {})[runtime] = statistics.median(seconds) * 1e3
    return result


def over_ours(times: Times, peer: tuple[str, str], own: str = "ragged") -> float:
    """How many times as long as our ``own`` variant a runtime and variant took: the median of the ratios within one round.

    A virtual machine may move its processors apart between rounds, and then two threads take up to 1.7 times as long, for
    everybody.
    """
    return statistics.median(theirs / us for theirs, us in zip(times[peer], times[OURS, own], strict=False))
