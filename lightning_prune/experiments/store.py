"""Results in an Optuna storage: written the moment they exist, shared by any number of processes and machines."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .trials import Setting, Trial, TrialResult

if TYPE_CHECKING:
    import optuna
    from optuna.study import Study

#: a running trial whose process has not been heard of for so long (seconds) is taken up again
LEASE = 300.0
#: seconds between two signs of life
HEARTBEAT = 30.0
#: a trial that raised so often is not tried again
ATTEMPTS = 2


def _optuna() -> Any:
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "experiments need optuna, which is not installed; pip install 'lightning-prune[sweep]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def open_storage(spec: str) -> Any:
    """The Optuna storage that ``spec`` names.

    Args:
        spec: ``sqlite:///study.db`` or another database URL; or ``journal:study.log``, a plain file that also works on
            network file systems. Missing folders are made.

    Raises:
        ValueError: neither of the two.
    """
    optuna = _optuna()
    scheme, separator, rest = spec.partition(":")
    if scheme == "journal" and rest:
        Path(rest).parent.mkdir(parents=True, exist_ok=True)
        backend = optuna.storages.journal.JournalFileBackend(rest)
        return optuna.storages.JournalStorage(backend)
    if not separator or not rest.startswith("//"):
        raise ValueError(
            f"storage must be a database URL like sqlite:///study.db or journal:study.log; got {spec!r}"
        )
    if scheme == "sqlite" and rest.startswith("///"):
        Path(rest[3:]).parent.mkdir(parents=True, exist_ok=True)
        storage = optuna.storages.RDBStorage(spec, engine_kwargs={"connect_args": {"timeout": 60}})
        _begin_before_reading(storage.engine)
        return storage
    return optuna.storages.RDBStorage(spec)


def _begin_before_reading(engine: Any) -> None:
    """Let every transaction of an SQLite engine begin with its first read.

    Python's driver begins one before the first write only. Optuna reads that a trial waits and then takes it: two processes
    would take the same one. (SQLAlchemy, "SQLite transactions": events of pysqlite.)
    """
    from sqlalchemy import event

    def connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # the driver begins nothing by itself

    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    event.listen(engine, "connect", connect)
    event.listen(engine, "begin", begin)
    engine.dispose()  # connections that were made before


@dataclass(frozen=True)
class Claim:
    """A trial that this process has taken, and Optuna's handle of it."""

    trial: Trial
    handle: optuna.trial.Trial


class TrialStore:
    """The trials of one experiment: results, failures, and who is at work on what.

    Args:
        storage: see :func:`open_storage`.
        name: of the study within the storage.
        settings: of the experiment; a study that was begun with others is refused.

    Raises:
        ValueError: ``storage`` is misspelt, or the study belongs to other settings.
        ModuleNotFoundError: optuna is not installed.
    """

    def __init__(self, storage: str, name: str, settings: Sequence[Setting] = ()) -> None:
        optuna = _optuna()
        self._states = optuna.trial.TrialState
        self.study: Study = optuna.create_study(
            storage=open_storage(storage),
            study_name=name,
            direction="maximize",
            load_if_exists=True,
            sampler=optuna.samplers.RandomSampler(),  # never asked: every trial is enqueued with its description
        )
        self.name = name
        for setting in settings:
            self._check_identity(setting)

    def _check_identity(self, setting: Setting) -> None:
        key = f"setting:{setting.name}"
        mine = json.loads(json.dumps(setting.identity()))
        known = self.study.user_attrs.get(key)
        if known is None:
            self.study.set_user_attr(key, mine)
        elif known != mine:
            differing = [k for k in sorted({*mine, *known}) if mine.get(k) != known.get(k)]
            raise ValueError(
                f"study {self.name!r} was begun with other settings of {setting.name!r}: "
                + "; ".join(f"{k} was {known.get(k)!r}, now {mine.get(k)!r}" for k in differing)
                + ". Give the same ones, or another storage or output folder"
            )

    # ---- reading ---------------------------------------------------------------------------------------------------

    def _trials(self, *states: str) -> list[optuna.trial.FrozenTrial]:
        wanted = tuple(self._states[state] for state in states)
        return self.study.get_trials(deepcopy=False, states=wanted)

    def results(self) -> dict[Trial, TrialResult]:
        """Every complete trial; of one that two processes ran, the first."""
        found: dict[Trial, TrialResult] = {}
        for frozen in self._trials("COMPLETE"):
            result = TrialResult.from_json(frozen.user_attrs["result"])
            found.setdefault(result.trial, result)
        return found

    def failures(self) -> dict[Trial, list[str]]:
        """Messages of the trials that raised, also of those that were complete on a second attempt."""
        found: dict[Trial, list[str]] = {}
        for frozen in self._trials("FAIL"):
            if "error" in frozen.user_attrs and "trial" in frozen.user_attrs:
                found.setdefault(Trial.from_key(frozen.user_attrs["trial"]), []).append(
                    frozen.user_attrs["error"]
                )
        return found

    def hopeless(self) -> dict[Trial, str]:
        """Trials that raised too often to be tried again, with the last message."""
        done = self.results()
        return {t: m[-1] for t, m in self.failures().items() if len(m) >= ATTEMPTS and t not in done}

    # ---- claiming --------------------------------------------------------------------------------------------------

    def release_lost(self, lease: float = LEASE) -> int:
        """Give up running trials whose process is gone, so that they are run again; returns how many."""
        lost = [frozen for frozen in self._trials("RUNNING") if _is_lost(frozen, lease)]
        for frozen in lost:
            self._end(frozen.number)
        return len(lost)

    def _end(self, number: int) -> None:
        self.study.tell(number, state=self._states.FAIL, skip_if_finished=True)

    def claim(self, candidates: Sequence[Trial]) -> Claim | None:
        """Take the first candidate that nobody has run or is running, or None.

        Optuna hands a waiting trial to exactly one process. Two processes may have enqueued the same trial at the same
        moment; the one that sees the other at work steps back.
        """
        wanted = {trial.key for trial in candidates}
        while True:
            taken = {frozen.user_attrs.get("trial", "") for frozen in self._trials("COMPLETE", "RUNNING")}
            key = next((trial.key for trial in candidates if trial.key not in taken), None)
            if key is None:
                return None
            self.study.enqueue_trial({}, user_attrs={"trial": key})
            asked = self.study.ask()
            key = str(asked.user_attrs.get("trial", ""))
            asked.set_user_attr("owner", {"host": socket.gethostname(), "pid": os.getpid()})
            asked.set_user_attr("alive", time.time())
            others = {
                frozen.user_attrs.get("trial")
                for frozen in self._trials("COMPLETE", "RUNNING")
                if frozen.number != asked.number
            }
            if key in wanted and key not in others:
                return Claim(Trial.from_key(key), asked)
            self._end(asked.number)  # left over from another call, or taken meanwhile
            time.sleep(0.05 * (1 + os.getpid() % 7))

    @contextlib.contextmanager
    def alive(self, claim: Claim, every: float = HEARTBEAT) -> Iterator[None]:
        """While the block runs, a thread tells the others that this process is still at work."""
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(every):
                with contextlib.suppress(Exception):  # a storage that is busy now will hear of us next time
                    claim.handle.set_user_attr("alive", time.time())

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    # ---- writing ---------------------------------------------------------------------------------------------------

    def complete(self, claim: Claim, result: TrialResult) -> None:
        """Keep a result; from now on the trial is never run again."""
        claim.handle.set_user_attr("result", result.to_json())
        self.study.tell(claim.handle, result.accuracy)

    def fail(self, claim: Claim, error: str) -> None:
        """Note why a trial gave no result."""
        claim.handle.set_user_attr("error", error)
        self._end(claim.handle.number)

    def release(self, claim: Claim) -> None:
        """Give a trial back (the user interrupted it)."""
        self._end(claim.handle.number)


def _is_lost(frozen: optuna.trial.FrozenTrial, lease: float) -> bool:
    attrs: Mapping[str, Any] = frozen.user_attrs
    owner = attrs.get("owner")
    if owner and owner["host"] == socket.gethostname() and not _process_exists(int(owner["pid"])):
        return True
    started = frozen.datetime_start.timestamp() if frozen.datetime_start is not None else 0.0
    return time.time() - float(attrs.get("alive", started)) > lease


def _process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
