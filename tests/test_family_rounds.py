"""Synchronous search: brackets as planned, the same again, through kills and failures."""

from __future__ import annotations

import contextlib
import math
import random
import socket
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from family_fakes import SETTINGS, FakeTrain, accuracy, draw_nothing

from morph.errors import SearchStateError, StorageError
from morph.family import storage
from morph.family.budgets import Budgets
from morph.family.candidate import best_of, candidate_from
from morph.family.generator import draw_network
from morph.family.rounds import run_rounds
from morph.family.storage import require_packages
from morph.family.study import FamilyStudy, importances, require_fitting

pytest.importorskip("optuna")


@pytest.fixture(autouse=True)
def no_networks(monkeypatch):
    """Most tests look at no network, and drawing large ones takes its time."""
    monkeypatch.setattr("morph.family.running.draw_network", draw_nothing)


def searched(folder, rounds=1, train=None, settings=SETTINGS):
    study = FamilyStudy(str(folder / "study.journal"), settings)
    run_rounds(study, rounds, train or FakeTrain(), folder)
    return study


def plain(rows):
    """Rows without times."""
    return [{k: v for k, v in row.to_json().items() if k not in ("seconds", "overhead")} for row in rows]


def test_a_round_trains_as_planned(tmp_path):
    train = FakeTrain()
    rows = searched(tmp_path, train=train).rows()
    plan = SETTINGS.budgets.plan()
    assert (len(rows), len(train.calls)) == (plan.configurations, plan.trainings)
    assert sum(wanted for _, wanted in train.calls) == plan.epochs
    assert sum(wanted - done for done, wanted in train.calls) == plan.epochs_resumed
    assert Counter((row.bracket, row.state) for row in rows) == {
        (0, "stopped"): 3, (0, "complete"): 1, (1, "stopped"): 2, (1, "complete"): 1, (2, "complete"): 3,
    }  # fmt: skip
    for bracket in range(2):
        members = [row for row in rows if row.bracket == bracket]
        first = SETTINGS.budgets.epochs[bracket]
        by_first = sorted(members, key=lambda row: -row.accuracies[first])
        assert sorted(members, key=lambda row: -row.epochs)[0] is by_first[0]
    for row in rows:
        for epochs, found in row.accuracies.items():
            assert found == accuracy(row.candidate, epochs)
        assert len(row.curve) == row.epochs
        assert candidate_from(row.candidate.to_json()) == row.candidate
    assert len({row.candidate for row in rows}) == len(rows)


def test_the_same_seed_gives_the_same_study_and_another_seed_another(tmp_path):
    found = []
    for i, seed in enumerate((0, 0, 1)):
        (tmp_path / str(i)).mkdir()
        found.append(plain(searched(tmp_path / str(i), 2, settings=replace(SETTINGS, seed=seed)).rows()))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("seed", range(2))
def test_killed_again_and_again_it_ends_with_the_same_study(tmp_path, seed):
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = searched(tmp_path / "whole", 2)
    draws, parts = random.Random(seed), tmp_path / "parts"
    for _ in range(60):
        try:
            searched(parts, 2, FakeTrain(stop_after=draws.randint(0, 3)))
            break
        except KeyboardInterrupt:
            continue
    again = FamilyStudy(str(parts / "study.journal"), SETTINGS)
    assert plain(again.rows()) == plain(whole.rows())
    assert {p.name for p in parts.glob("*.training")} == {p.name for p in (tmp_path / "whole").glob("*.training")}


def test_more_rounds_go_on_where_fewer_ended(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    searched(tmp_path / "a", 1)
    train = FakeTrain()
    assert plain(searched(tmp_path / "a", 2, train).rows()) == plain(searched(tmp_path / "b", 2).rows())
    assert len(train.calls) == SETTINGS.budgets.plan().trainings


def test_later_rounds_propose_better_configurations(tmp_path):
    study = searched(tmp_path, 4)
    rows = study.rows()
    scores = [accuracy(row.candidate, 4) for row in rows]
    assert sum(scores[-20:]) / 20 > sum(scores[:10]) / 10 + 0.02
    shares = importances(rows)
    assert sum(shares.values()) == pytest.approx(1)
    assert set(list(shares)[:3]) & {"weight", "top_nodes"}
    best = best_of(rows)
    assert best.accuracy == max(row.accuracies.get(4, 0) for row in rows)


def test_failed_trials_are_recorded_and_the_search_goes_on(tmp_path):
    broken = {
        1: torch.OutOfMemoryError("CUDA out of memory"),
        2: math.nan,
        3: MemoryError(),
        5: RuntimeError("shape\nand more"),
    }
    rows = searched(tmp_path, train=FakeTrain(broken=broken)).rows()
    failed = [row for row in rows if row.state == "failed"]
    assert [row.reason for row in failed] == [
        "OutOfMemoryError: CUDA out of memory",
        "FloatingPointError: the accuracy is nan",
        "MemoryError: MemoryError",
        "RuntimeError: shape",
    ]
    assert len(rows) == 10
    assert sum(row.state == "complete" for row in rows) >= 4


def test_a_bracket_of_failures_ends_and_the_next_begins(tmp_path):
    broken = {i: RuntimeError("no") for i in range(1, 5)}
    rows = searched(tmp_path, train=FakeTrain(broken=broken)).rows()
    assert [row.state for row in rows[:4]] == ["failed"] * 4
    assert all(row.state != "failed" for row in rows[4:])


def test_limits_that_a_network_misses_fail_it(tmp_path, monkeypatch):
    monkeypatch.setattr("morph.family.running.draw_network", draw_network)
    settings = replace(SETTINGS, task=replace(SETTINGS.task, max_params=12_000))
    rows = searched(tmp_path, settings=settings).rows()
    failed = [row for row in rows if row.state == "failed"]
    assert failed
    assert all("the limit is 12,000" in row.reason for row in failed)
    assert all(row.params <= 12_000 for row in rows if row.state == "complete")


def test_errors_that_are_not_of_one_trial_end_the_search(tmp_path):
    with pytest.raises(KeyError, match="data"):
        searched(tmp_path, train=FakeTrain(broken={2: KeyError("data")}))
    assert [row.state for row in FamilyStudy(str(tmp_path / "study.journal"), SETTINGS).rows()] == ["running"] * 4


def test_without_a_teacher_eight_numbers_are_searched(tmp_path):
    rows = searched(tmp_path, settings=replace(SETTINGS, distil=False)).rows()
    assert all(row.candidate.temperature is None and row.candidate.weight is None for row in rows)
    assert len(importances(rows)) == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"distil": False}, "distil is True there and False here"),
        ({"budgets": Budgets((1, 2))}, r"budgets.epochs is \[1, 2, 4\] there and \[1, 2\] here"),
        ({"task": replace(SETTINGS.task, max_params=5)}, "task.max_params is 400000 there and 5 here"),
        ({"training": {"lr": 0.1}, "seed": 3}, r"seed is 0 there and 3 here \(and 1 more: training.lr\)"),
    ],
)
def test_a_study_made_with_other_settings_is_refused(tmp_path, change, message):
    searched(tmp_path)
    with pytest.raises(SearchStateError, match=message):
        FamilyStudy(str(tmp_path / "study.journal"), replace(SETTINGS, **change))


def test_half_a_line_of_a_killed_writer_is_dropped(tmp_path):
    journal = tmp_path / "study.journal"
    before = plain(searched(tmp_path).rows())
    whole = journal.read_bytes()
    lines = whole.splitlines(keepends=True)
    journal.write_bytes(whole + lines[-1][: len(lines[-1]) // 2])
    study = FamilyStudy(str(journal), SETTINGS)
    assert plain(study.rows()) == before
    study.study.set_user_attr("after", 1)
    assert FamilyStudy(str(journal), SETTINGS).study.user_attrs["after"] == 1


def test_a_lock_of_a_killed_process_does_not_stay(tmp_path):
    code = "import sys, time\nfrom pathlib import Path\nfrom morph.family.storage import _Lock\n"
    code += "_Lock(Path(sys.argv[1])).acquire()\nprint('held', flush=True)\ntime.sleep(60)"
    journal = tmp_path / "study.journal"
    process = subprocess.Popen([sys.executable, "-c", code, str(journal)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    opened = threading.Thread(target=FamilyStudy, args=(str(journal), SETTINGS))
    opened.start()
    opened.join(0.3)
    assert opened.is_alive()
    process.kill()
    process.communicate()
    opened.join(10)
    assert not opened.is_alive()


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("missing/study.journal", "the folder .*missing does not exist"),
        (".", "is a folder"),
        ("picture.png", "not the journal of a study"),
        (
            "postgresql://me:secret@127.0.0.1:1/x",
            r"postgresql://me@127.0.0.1:1/x: (needs psycopg2?, not installed|not reachable)",
        ),
        ("sqlite:////no/such/folder/x.db", "not reachable"),
        ("nonsense://x", "not reachable"),
        ("grpc://127.0.0.1:port", "give grpc://HOST:PORT"),
        ("grpc://127.0.0.1:1", "(not reachable|not installed)"),
    ],
)
def test_storages_that_cannot_be_used(tmp_path, where, message, monkeypatch):
    monkeypatch.setattr("morph.family.storage._SERVER_WAIT", 0.2)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n" * 9)
    place = where if "://" in where else str(tmp_path / where)
    with pytest.raises(StorageError, match=message) as caught:
        FamilyStudy(place, SETTINGS)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 404 Not Found\r\n\r\n"])
def test_a_server_of_another_kind_is_left_after_a_while(monkeypatch, answer):
    pytest.importorskip("grpc")
    monkeypatch.setattr("morph.family.storage._SERVER_WAIT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answers():
            with contextlib.suppress(OSError):
                while True:
                    connection = server.accept()[0]
                    if answer:
                        connection.sendall(answer)

        threading.Thread(target=answers, daemon=True).start()
        where = f"grpc://127.0.0.1:{server.getsockname()[1]}"
        for opened in (FamilyStudy, require_fitting):
            with pytest.raises(StorageError, match="not reachable"):
                opened(where, SETTINGS)


def test_no_database_is_waited_for_without_end():
    options = storage._engine_options("postgresql+psycopg://host/name")
    assert options["connect_args"] == {"connect_timeout": storage._SERVER_WAIT}
    assert "connect_args" not in storage._engine_options("postgresql+psycopg://host/name?connect_timeout=3")
    assert "connect_args" not in storage._engine_options("sqlite:///study.db")


def test_a_look_writes_nothing_and_finds_other_settings(tmp_path):
    journal, database = tmp_path / "study.journal", f"sqlite:///{tmp_path}/study.db"
    for where in (str(journal), database):
        require_fitting(where, SETTINGS)
        assert not list(tmp_path.glob("study.*"))
    for where in (str(journal), database):
        FamilyStudy(where, SETTINGS)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for where in (str(journal), database):
        require_fitting(where, SETTINGS)
        require_fitting(where, replace(SETTINGS, seed=1), name="another")
        with pytest.raises(SearchStateError, match="seed is 0 there and 1 here"):
            require_fitting(where, replace(SETTINGS, seed=1))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    journal.write_bytes(b"\x89PNG\r\n" * 9)
    with pytest.raises(StorageError, match="not the journal of a study"):
        require_fitting(str(journal), SETTINGS)


def test_a_database_does_as_well(tmp_path):
    study = FamilyStudy(f"sqlite:///{tmp_path}/study.db", SETTINGS)
    run_rounds(study, 1, FakeTrain(), tmp_path)
    (tmp_path / "file").mkdir()
    assert plain(study.rows()) == plain(searched(tmp_path / "file").rows())


@pytest.mark.parametrize("name", ["optuna", "scipy"])
def test_a_package_that_is_missing_is_named_before_anything_is_searched(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(StorageError, match=rf"needs {name}, not installed; pip install torch-morph\[search\]"):
        require_packages()


DEADLY = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import morph.family.running
from family_fakes import SETTINGS, FakeTrain, draw_nothing
from morph.family.rounds import run_rounds
from morph.family.study import FamilyStudy

morph.family.running.draw_network = draw_nothing
fake = FakeTrain()

def train(model, candidate, epochs, checkpoint):
    if checkpoint.name == "trial-0-0-1.training" and not (sys.argv[3] == "further" and epochs > 1):
        if sys.argv[3] == "further":
            with checkpoint.open("a") as file:  # a round more is kept each time
                file.write(" ")
            if len(checkpoint.read_text()) == 4:
                checkpoint.unlink()
                return fake(model, candidate, epochs, checkpoint)
        os.kill(os.getpid(), signal.SIGKILL)
    return fake(model, candidate, epochs, checkpoint)

folder = Path(sys.argv[2])
run_rounds(FamilyStudy(str(folder / "study.journal"), SETTINGS), 1, train, folder)
"""


@pytest.mark.parametrize(("how", "kills"), [("stuck", 2), ("further", 3)])
def test_a_trial_that_kills_its_process_twice_at_the_same_place_is_given_up(tmp_path, how, kills):
    command = [sys.executable, "-c", DEADLY, str(Path(__file__).parent), str(tmp_path), how]
    codes = [subprocess.run(command, check=False).returncode for _ in range(kills + 1)]
    assert codes == [-9] * kills + [0]
    rows = FamilyStudy(str(tmp_path / "study.journal"), SETTINGS).rows()
    assert [(row.number, row.reason) for row in rows if row.state == "failed"] == (
        [(1, "its process was killed 2 times, perhaps for want of memory")] if how == "stuck" else []
    )
    assert not [row for row in rows if row.state == "running"]
    assert len(rows) == SETTINGS.budgets.plan().configurations


def test_being_stopped_is_no_death(tmp_path):
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            searched(tmp_path, train=FakeTrain(stop_after=0))
    assert not [row for row in searched(tmp_path).rows() if row.state == "failed"]
