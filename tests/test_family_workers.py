"""Asynchronous search: several processes, one of which is killed; nothing is lost."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from family_fakes import SETTINGS, FakeTrain, accuracy, draw_nothing

from morph.errors import StorageError
from morph.family.candidate import Outcome
from morph.family.study import FamilyStudy
from morph.family.takeover import Patience, Watch, signs_of_life, take_up
from morph.family.workers import work

pytest.importorskip("optuna")

SHARED = replace(SETTINGS, asynchronous=True)
QUICK = Patience(0.1, 1.0)

WORKER = textwrap.dedent("""
    import sys, time
    from pathlib import Path
    sys.path.insert(0, sys.argv[3])
    from family_fakes import FakeTrain, draw_nothing
    from test_family_workers import QUICK, SHARED
    import morph.family.running as running
    from morph.family.study import FamilyStudy
    from morph.family.workers import work

    running.draw_network = draw_nothing
    fake = FakeTrain()

    def train(model, candidate, epochs, checkpoint):
        done = checkpoint.exists()
        time.sleep(0.15)
        found = fake(model, candidate, epochs, checkpoint)
        print(checkpoint.name, fake.calls[-1], flush=True)
        time.sleep(float(sys.argv[4]))
        return found

    folder = Path(sys.argv[1])
    work(FamilyStudy(sys.argv[2], SHARED), 10, train, folder, patience=QUICK)
""")


@pytest.fixture(autouse=True)
def no_networks(monkeypatch):
    monkeypatch.setattr("morph.family.running.draw_network", draw_nothing)


def start(folder, where, pause=0.0):
    command = [sys.executable, "-c", WORKER, str(folder), where, str(Path(__file__).parent), str(pause)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def complete(rows, number=10):
    """What must hold of a study that is done."""
    assert len(rows) == number
    assert all(row.state in ("complete", "stopped") for row in rows)
    assert Counter(row.bracket for row in rows) == {0: 4, 1: 3, 2: 3}
    for row in rows:
        assert row.accuracies == {b: accuracy(row.candidate, b) for b in row.accuracies}
    assert any(row.state == "complete" for row in rows)


SERVER = """
import sys
import optuna
storage = optuna.storages.RDBStorage(sys.argv[1])
optuna.storages.run_grpc_proxy_server(storage, host="127.0.0.1", port=int(sys.argv[2]))
"""


@pytest.fixture(params=["database", "server"])
def where(request, tmp_path):
    """A database, or Optuna's server in front of one."""
    database = f"sqlite:///{tmp_path}/study.db"
    if request.param == "database":
        yield database
        return
    pytest.importorskip("grpc")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with subprocess.Popen([sys.executable, "-c", SERVER, database, str(port)], stderr=subprocess.DEVNULL) as server:
        yield f"grpc://127.0.0.1:{port}"
        server.kill()


def test_two_workers_share_a_study_and_one_is_killed(tmp_path, where):
    study = FamilyStudy(where, SHARED)
    doomed = start(tmp_path, where, pause=60)  # stands still after its first training, before it is written down
    assert doomed.stdout is not None
    line = doomed.stdout.readline()
    assert "(0, 1)" in line
    (number,) = [trial.number for trial in study.trials()]
    other = start(tmp_path, where)
    time.sleep(0.5)
    doomed.send_signal(signal.SIGKILL)
    doomed.communicate()
    out, errors = other.communicate(timeout=120)
    assert other.returncode == 0, errors
    complete(study.rows())
    lost = study.storage.get_all_trials(study.id)[number]
    assert lost.state.name == "FAIL"
    successor = int(lost.user_attrs["surplus"].removeprefix("taken up as "))
    (row,) = [row for row in study.rows() if row.number == successor]
    assert {**row.candidate.to_json()} == {
        **row.candidate.to_json(), "seed": lost.user_attrs["seed"], "temperature": lost.params["temperature"]
    }  # fmt: skip
    key = line.split()[0]
    assert f"{key} (1, 1)" in out  # from the state that the killed one left


def test_workers_at_the_same_time_do_each_configuration_once(tmp_path):
    where = str(tmp_path / "journal")
    workers = [start(tmp_path, where) for _ in range(2)]
    outputs = [worker.communicate(timeout=120) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    rows = FamilyStudy(where, SHARED).rows()
    complete(rows)
    assert len({row.candidate.seed for row in rows}) == 10
    done = Counter(line for out, _ in outputs for line in out.splitlines())
    assert all(out for out, _ in outputs)
    assert set(done.values()) == {1}
    assert len(done) == sum(len(row.accuracies) for row in rows)


def rank(rows, row, epochs):
    """Place of a row among those of its bracket that reached a budget, from 0."""
    reached = [r for r in rows if r.bracket == row.bracket and epochs in r.accuracies]
    return sorted(reached, key=lambda r: (-r.accuracies[epochs], r.number)).index(row), len(reached)


@pytest.mark.parametrize("seed", range(3))
def test_one_worker_promotes_whoever_is_among_the_best_when_all_is_done(tmp_path, seed):
    study = FamilyStudy(str(tmp_path / "journal"), replace(SHARED, seed=seed))
    train = FakeTrain()
    work(study, 20, train, tmp_path, patience=QUICK)
    rows = study.rows()
    assert Counter(row.bracket for row in rows) == {0: 8, 1: 6, 2: 6}
    for row in rows:
        assert row.state == ("complete" if row.epochs == 4 else "stopped")
        for epochs in row.accuracies:
            place, reached = rank(rows, row, epochs)
            if place < reached // 2:
                assert row.epochs > epochs or epochs == 4
    assert len(train.calls) == sum(len(row.accuracies) for row in rows)  # nothing is trained twice
    assert all(wanted // 2 == done for done, wanted in train.calls if done)  # and each goes on from its state
    assert not list(tmp_path.glob("*.training"))


def test_a_trial_that_waits_goes_on_when_others_turn_out_worse(tmp_path):
    study, values = FamilyStudy(str(tmp_path / "journal"), SHARED), iter([0.3, 0.2, 0.1, 0.05])
    known: dict[str, float] = {}

    def train(model, candidate, epochs, checkpoint):
        value = known.setdefault(checkpoint.name, next(values, 0.01))
        checkpoint.write_text("state")
        return Outcome(value * epochs, tuple(value * e for e in range(1, epochs + 1)))

    work(study, 4, train, tmp_path, patience=QUICK)
    assert [row.epochs for row in study.rows()] == [4, 2, 1, 1]


def test_no_trial_goes_on_before_another_one_is_worse(tmp_path):
    study, calls = FamilyStudy(str(tmp_path / "journal"), SHARED), []
    fake = FakeTrain()

    def train(model, candidate, epochs, checkpoint):
        calls.append((checkpoint.name, epochs))
        return fake(model, candidate, epochs, checkpoint)

    work(study, 4, train, tmp_path, patience=QUICK)
    assert [epochs for _, epochs in calls[:3]] == [1, 1, 2]
    assert len({name for name, _ in calls[:2]}) == 2


def test_a_worker_told_to_stop_gives_its_trial_back_at_once(tmp_path):
    study = FamilyStudy(str(tmp_path / "journal"), SHARED)
    patient = Patience(0.1, 10_000)
    for _ in range(5):
        with pytest.raises(KeyboardInterrupt):
            work(study, 10, FakeTrain(stop_after=2), tmp_path, patience=patient)
    work(study, 10, FakeTrain(), tmp_path, patience=patient)
    complete(study.rows())


DEADLY = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import morph.family.running
from family_fakes import FakeTrain, draw_nothing
from test_family_workers import SHARED, QUICK
from morph.family.study import FamilyStudy
from morph.family.workers import work

morph.family.running.draw_network = draw_nothing
fake = FakeTrain()
folder = Path(sys.argv[2])
study = FamilyStudy(str(folder / "study.journal"), SHARED)
first = study.trials()[0].user_attrs["key"] if study.trials() else None

def train(model, candidate, epochs, checkpoint):
    if first is None or (first in checkpoint.name and epochs == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    return fake(model, candidate, epochs, checkpoint)

work(study, 10, train, folder, patience=QUICK)
"""


def test_a_trial_that_kills_its_workers_twice_at_the_same_place_is_given_up(tmp_path):
    command = [sys.executable, "-c", DEADLY, str(Path(__file__).parent), str(tmp_path)]
    codes = [subprocess.run(command, check=False).returncode for _ in range(3)]
    assert codes == [-9, -9, 0]
    rows = FamilyStudy(str(tmp_path / "study.journal"), SHARED).rows()
    assert [row.reason for row in rows if row.state == "failed"] == [
        "its process was killed 2 times, perhaps for want of memory"
    ]
    assert not [row for row in rows if row.state == "running"]
    assert len(rows) == 10


def test_clocks_of_other_machines_do_not_matter(tmp_path, monkeypatch):
    study, now = FamilyStudy(str(tmp_path / "journal"), SHARED), [0.0]
    watch = Watch(180.0, lambda: now[0])
    for skew in (-1e9, 1e9):
        trial = study.add(study.propose([1]), key=str(skew), bracket=0, beat=time.time() + skew)
        for beat in range(20):  # alive, seen once in a while
            now[0] += 170.0
            assert take_up(study, watch) is None
            study.note(trial, beat=time.time() + skew + beat)
        now[0] += 170.0
        assert take_up(study, watch) is None
        now[0] += 179.0
        assert take_up(study, watch) is None
        now[0] += 1.0
        taken = take_up(study, watch)
        assert taken.user_attrs["key"] == str(skew)
        study.fail(taken, "enough")


def test_a_storage_that_is_away_for_a_moment_does_not_end_the_signs_of_life(tmp_path, monkeypatch):
    study = FamilyStudy(str(tmp_path / "journal"), SHARED)
    trial = study.add(study.propose([1]), key="a", bracket=0, beat=1.0)
    note, calls, done = study.note, [], threading.Event()

    def shaky(trial, **attributes):
        calls.append(attributes)
        if len(calls) < 3:
            raise OSError("the server is away")
        note(trial, **attributes)
        done.set()

    monkeypatch.setattr(study, "note", shaky)
    with signs_of_life(study, trial, 0.01):
        assert done.wait(30)
    assert study.storage.get_trial(trial._trial_id).user_attrs["beat"] > 1.0


def test_a_trial_that_waits_is_a_stopped_one_to_the_sampler_and_is_not_asked_for_again(tmp_path):
    study = FamilyStudy(str(tmp_path / "journal"), SHARED)
    trial = study.add(study.propose([1]), key="a", bracket=0, beat=1.0)
    study.report(trial, 1, Outcome(0.25, (0.25,)))
    study.pause(trial)
    assert [row.state for row in study.rows()] == ["stopped"]
    assert study.propose([2]).family != study.rows()[0].candidate.family
    assert study.claim(trial)
    assert not study.claim(trial)


def test_many_that_take_up_the_same_trial_get_it_once(tmp_path):
    where = str(tmp_path / "journal")
    study = FamilyStudy(where, SHARED)
    study.add(study.propose([1]), key="a", beat=0.0)
    got, gate = [], threading.Barrier(4)

    def take():
        own = FamilyStudy(where, SHARED)
        gate.wait()
        got.append(take_up(own, Watch(100.0)))

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(trial is not None for trial in got) == 1
    assert [row.state for row in study.rows()] == ["running"]


def test_a_worker_that_stood_still_leaves_the_trial_to_the_other(tmp_path):
    study = FamilyStudy(str(tmp_path / "journal"), SHARED)
    fake, late = FakeTrain(), []

    def train(model, candidate, epochs, checkpoint):
        if not late:
            late.append(study.trials()[0])
            study.note(late[0], beat=0.0)
            taken = take_up(study, Watch(1.0))  # by another one, which finishes it
            study.report(taken, 1, fake(model, candidate, 1, checkpoint))
            study.finish(taken)
        return fake(model, candidate, epochs, checkpoint)

    work(study, 10, train, tmp_path, patience=Patience(50, 100))
    complete(study.rows())
    assert late[0].number not in {row.number for row in study.rows()}


def test_a_worker_that_waits_can_be_stopped(tmp_path):
    study = FamilyStudy(str(tmp_path / "journal"), SHARED)
    study.add(study.propose([1]), key="other", beat=time.time(), bracket=0)
    with pytest.raises(KeyboardInterrupt):
        work(study, 1, FakeTrain(), tmp_path, patience=Patience(0.1, 1000), should_stop=lambda: True)


def test_a_storage_that_is_lost_is_said(tmp_path):
    study = FamilyStudy(f"sqlite:///{tmp_path}/study.db", SHARED)

    def train(model, candidate, epochs, checkpoint):
        (tmp_path / "study.db").write_bytes(b"no database any more" * 4096)
        return FakeTrain()(model, candidate, epochs, checkpoint)

    with pytest.raises(StorageError, match="the storage of the study, or a file of the search, could not be"):
        work(study, 3, train, tmp_path, patience=QUICK)
