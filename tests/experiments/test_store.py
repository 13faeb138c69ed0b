"""The storage: who runs what, what a dead process leaves behind, what is never run twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lightning_prune.experiments import Setting, Trial, TrialResult, TrialStore, work
from lightning_prune.experiments.store import ATTEMPTS, open_storage
from lightning_prune.experiments.work import Job
from tests.experiments.script import SETTING, TRIALS

SCRIPT = Path(__file__).with_name("script.py")
DENSE = Trial("a", "dense", 1.0, 0)
L1 = Trial("a", "l1", 0.5, 0)


@pytest.fixture(params=["sqlite:///{}/study.db", "journal:{}/study.log"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(request.param).format(tmp_path / "new folder")


def result(trial: Trial, accuracy: float = 0.5) -> TrialResult:
    return TrialResult(
        trial, accuracy, 1.0, 2.0, 1.0, 2.0, 3, 4.0, 0.1, widths={"g": (1, 2)}, plan={"a": [1, 2]}
    )


def test_results_are_kept_and_never_claimed_again(storage: str) -> None:
    store = TrialStore(storage, "study", [SETTING])
    first = store.claim([DENSE, L1])
    assert first is not None
    assert first.trial == DENSE
    other = TrialStore(storage, "study", [SETTING])  # as another process would open it
    second = other.claim([DENSE, L1])
    assert second is not None
    assert second.trial == L1
    assert TrialStore(storage, "study").claim([DENSE, L1]) is None
    store.complete(first, result(DENSE))
    other.complete(second, result(L1, 0.75))
    again = TrialStore(storage, "study", [SETTING])
    assert again.results() == {DENSE: result(DENSE), L1: result(L1, 0.75)}
    assert again.claim([DENSE, L1]) is None


def test_a_fit_that_raises_is_tried_again_but_not_for_ever(storage: str) -> None:
    store = TrialStore(storage, "study")
    for attempt in range(ATTEMPTS):
        assert not store.hopeless()
        claim = store.claim([L1])
        assert claim is not None
        store.fail(claim, f"ValueError: attempt {attempt}")
    assert store.hopeless() == {L1: f"ValueError: attempt {ATTEMPTS - 1}"}


def test_an_interrupted_trial_is_free_again_and_no_failure(storage: str) -> None:
    store = TrialStore(storage, "study")
    claim = store.claim([L1])
    assert claim is not None
    store.release(claim)
    assert not store.failures()
    again = store.claim([L1])
    assert again is not None
    assert again.trial == L1


def test_a_trial_left_over_in_the_queue_is_not_run_by_a_call_that_did_not_ask_for_it(storage: str) -> None:
    store = TrialStore(storage, "study")
    store.study.enqueue_trial({}, user_attrs={"trial": DENSE.key})
    claim = store.claim([L1])
    assert claim is not None
    assert claim.trial == L1


def test_lost_trials_are_told_from_living_ones(storage: str) -> None:
    store = TrialStore(storage, "study")
    claim = store.claim([L1])
    assert claim is not None
    with store.alive(claim, every=0.05):
        time.sleep(0.2)
        assert store.release_lost(lease=60.0) == 0
    with subprocess.Popen(["sleep", "0"]) as gone:  # the id of a process that is no more
        pass
    claim.handle.set_user_attr("owner", {"host": os.uname().nodename, "pid": gone.pid})
    assert store.release_lost(lease=60.0) == 1
    assert store.claim([L1]) is not None


def test_a_machine_that_is_silent_for_too_long_has_lost_its_trial(storage: str) -> None:
    store = TrialStore(storage, "study")
    claim = store.claim([L1])
    assert claim is not None
    claim.handle.set_user_attr("owner", {"host": "another machine", "pid": 1})
    assert store.release_lost(lease=60.0) == 0
    claim.handle.set_user_attr("alive", time.time() - 61.0)
    assert store.release_lost(lease=60.0) == 1


def test_a_waiting_trial_is_given_to_one_process_only(tmp_path: Path) -> None:
    spec, workers, each = f"sqlite:///{tmp_path}/s.db", 4, 10
    study = TrialStore(spec, "study").study
    for number in range(workers * each):
        study.enqueue_trial({}, user_attrs={"trial": str(number)})
    taken: list[int] = []
    together = threading.Barrier(workers)

    def take() -> None:
        own = TrialStore(spec, "study").study
        together.wait()
        taken.extend(own.ask().number for _ in range(each))

    threads = [threading.Thread(target=take) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == list(range(workers * each))


def test_other_settings_do_not_mix(storage: str) -> None:
    TrialStore(storage, "study", [SETTING])
    other = Setting("a", SETTING.make_data, SETTING.make_net, (1, 2, 1))
    with pytest.raises(ValueError, match=r"epochs was \[1, 1, 1\], now \[1, 2, 1\]"):
        TrialStore(storage, "study", [other])
    TrialStore(storage, "another study", [other])


@pytest.mark.parametrize("spec", ["study.db", "journal:", "sqlite:/x", ""])
def test_misspelt_storages_are_refused(spec: str) -> None:
    with pytest.raises(ValueError, match="storage must be"):
        open_storage(spec)


def failing(setting: Setting, trial: Trial, folder: Path, needed: TrialResult | None) -> TrialResult:
    if trial == L1:
        raise RuntimeError("no luck")
    return result(trial)


def test_what_needs_a_hopeless_trial_is_left_out(tmp_path: Path) -> None:
    storage, lines = f"sqlite:///{tmp_path}/s.db", []
    work(Job(storage, "study", {"a": SETTING}, TRIALS, tmp_path, failing), progress=lines.append)
    store = TrialStore(storage, "study")
    blocked = {L1, Trial("a", "from_scratch", 0.5, 0)}
    assert set(store.results()) == set(TRIALS) - blocked
    assert store.hopeless() == {L1: "RuntimeError: no luck"}
    assert sum("no luck" in line for line in lines) == ATTEMPTS


def test_a_killed_process_loses_one_fit_and_two_share_the_rest(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/s.db"
    command = [sys.executable, str(SCRIPT), storage, str(tmp_path)]
    started = tmp_path / "started"

    def wait_for(lines: int, process: subprocess.Popen) -> None:
        deadline = time.monotonic() + 60
        while not started.exists() or len(started.read_text().splitlines()) < lines:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)

    with subprocess.Popen(command, env={**os.environ, "FIT_SECONDS": "0.3"}) as first:
        wait_for(3, first)
        first.send_signal(signal.SIGKILL)
    done = set(TrialStore(storage, "study").results())
    assert len(done) == 2
    workers = [subprocess.Popen(command) for _ in range(2)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    assert set(TrialStore(storage, "study").results()) == set(TRIALS)
    runs = [json.dumps(json.loads(line.partition(" ")[2])) for line in started.read_text().splitlines()]
    repeated = [key for key in set(runs) if runs.count(key) > 1]
    assert len(runs) == len(TRIALS) + 1  # only what was cut off ran twice
    assert len(repeated) == 1
    assert Trial.from_key(repeated[0]) not in done
