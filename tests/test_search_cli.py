"""`morph search` as a user meets it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import morph
from morph.cli.main import main
from morph.zoo.random_graph import RandomGraphNet

pytest.importorskip("optuna")

SMALLEST = tuple(
    f"--range={name}"
    for name in ("top_nodes=3", "top_neighbours=2,3", "middle_nodes=1,2", "bottom_nodes=3", "bottom_neighbours=2,3")
)  # fmt: skip
FAST = (
    "--data", "data.npz", "--budget-epochs", "1,2", "--rounds", "1", "--max-params", "8K", "--batch-size", "16",
    "--hold-out", "0.3", "--students", "2", "--student-epochs", "1", "--lr", "0.05",
    *SMALLEST,
)  # fmt: skip


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(12, 3))
    morph.save_model(teacher, tmp_path / "teacher.pt", input_shape=(3, 8, 8))
    draw = np.random.default_rng(0)
    labels = np.arange(60) % 3
    images = draw.integers(0, 120, (60, 8, 8, 3)) + 60 * labels[:, None, None, None]
    np.savez(tmp_path / "data.npz", images=images.astype(np.uint8), labels=labels)


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(["search", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def bad(capsys, *arguments: str, code: int = 2) -> str:
    before = {p for p in Path().rglob("*.*") if "out" not in p.parts}
    found, out, err = run(capsys, *arguments)
    assert (found, out) == (code, "")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert {p for p in Path().rglob("*.*") if "out" not in p.parts} == before
    return err


def plain(record):
    """The trials without times."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "overhead")} for row in record["trials"]]


@pytest.mark.parametrize(
    ("budgets", "numbers"),
    [("30,60,120", (10, 14, 1020, 840)), ("7", (1, 1, 7, 7)), ("1,3,9", (17, 22, 78, 69))],
)
def test_dry_run_tells_what_a_round_costs(capsys, budgets, numbers):
    code, out, err = run(capsys, "--budget-epochs", budgets, "--dry-run", "--json", "--rounds", "3")
    found = json.loads(out)
    assert (code, err) == (0, "")
    keys = ("configurations", "trainings", "epochs", "epochs_resumed")
    assert tuple(found[key] for key in keys) == numbers
    assert tuple(found["total"][key] for key in keys) == tuple(3 * n for n in numbers)
    assert found["written"] == []
    code, out, _ = run(capsys, "--budget-epochs", budgets, "--dry-run")
    assert code == 0
    assert f"{numbers[0]} configurations, {numbers[1]} trainings, {numbers[3]} epochs" in out


def test_a_search_with_a_teacher_writes_everything(capsys):
    limits = ("--range", "temperature=4", "--range", "weight=0.5,0.9", "--channels-last")
    code, out, _ = run(capsys, "--teacher", "teacher.pt", *FAST, *limits, "--out", "out", "--json")
    assert code == 0
    record = json.loads(out)
    candidates = [row["candidate"] for row in record["trials"]]
    assert {candidate["temperature"] for candidate in candidates} == {4.0}
    assert all(0.5 <= candidate["weight"] <= 0.9 for candidate in candidates)
    assert {candidate["family"]["top_nodes"] for candidate in candidates} == {3}
    assert json.loads(Path("out/search.json").read_text()) == record
    assert len(record["trials"]) == record["configurations"] == 4
    assert sum(len(row["curve"]) for row in record["trials"]) == record["epochs_resumed"] == 7
    names = {Path(name).name for name in record["written"]}
    assert names >= {"best.json", "student.pt", "student-0.pt", "student-1.pt", "search.json", "families.svg"}
    assert names >= {"accuracy.svg", "correlation.svg", "front.svg"}
    assert all(Path(name).exists() for name in record["written"])
    best = json.loads(Path("out/best.json").read_text())
    assert best["accuracies"]["2"] == max(row["accuracies"].get("2", 0) for row in record["trials"])
    accuracies = [row["accuracy"] for row in record["students"]]
    assert record["spread"]["mean"] == pytest.approx(np.mean(accuracies))
    assert record["spread"]["sd"] == pytest.approx(np.std(accuracies, ddof=1))
    assert record["spread"]["best"] == max(accuracies)
    opened = morph.open_model("out/student.pt")
    assert type(opened.model) is RandomGraphNet
    assert opened.input_shape == (3, 8, 8)
    assert sum(p.numel() for p in opened.model.parameters()) == record["students"][0]["measures"]["params"] <= 8000
    assert record["teacher"]["measures"]["params"] == 39
    again, out, err = run(capsys, "--teacher", "teacher.pt", *FAST, *limits, "--out", "out", "--json")
    assert (again, err) == (0, "")
    assert plain(json.loads(out)) == plain(record)


def test_labels_alone_beside_a_search_with_a_teacher(capsys):
    assert run(capsys, "--teacher", "teacher.pt", *FAST, "--students", "0", "--out", "out")[0] == 0
    code, out, _ = run(
        capsys, "--no-kd", *FAST, "--students", "0", "--out", "plain", "--compare", "out", "--augment"
    )  # fmt: skip
    assert code == 0
    assert "best configurations" in out
    assert "correlation" in out
    pictures = Path("plain/correlation.svg").read_text(), Path("plain/families.svg").read_text()
    assert all("with a teacher" in text and "labels alone" in text for text in pictures)
    record = json.loads(Path("plain/search.json").read_text())
    assert record["teacher"] is None
    assert all(row["candidate"]["temperature"] is None for row in record["trials"])
    assert not record["students"]


def test_without_data_it_is_the_sample_inside(capsys):
    arguments = [value for value in FAST if value not in ("--data", "data.npz")]
    arguments += ["--limit", "48", "--students", "0", "--out", "out", "--json", "--budget-epochs", "1"]
    code, out, _ = run(capsys, "--no-kd", *arguments)
    assert code == 0
    task = json.loads(out)["settings"]["task"]
    assert (task["input_shape"], task["num_classes"]) == ([3, 32, 32], 10)


def test_a_folder_with_a_test_part(capsys):
    from PIL import Image

    draw = np.random.default_rng(1)
    for part, number in (("train", 24), ("test", 6)):
        for label in range(3):
            folder = Path("images") / part / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(number):
                pixels = draw.integers(0, 120, (8, 8, 3)) + 60 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    arguments = [*FAST, "--data", "images", "--no-kd", "--out", "out", "--json"]
    code, out, _ = run(capsys, *arguments)
    record = json.loads(out)
    assert code == 0
    training = record["settings"]["training"]
    assert training["data"]["images"] + training["validation"]["images"] == 72  # the test part is not searched on
    assert all(round(row["accuracy"] * 18, 6) % 1 == 0 for row in record["students"])  # and judges the students


def test_killed_it_goes_on_and_ends_with_the_same_study(capsys):
    arguments = ["search", "--teacher", "teacher.pt", *FAST, "--students", "1"]
    assert main([*arguments, "--out", "whole"]) == 0
    command = [sys.executable, "-m", "morph.cli.main", *arguments, "--out", "parts"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    for wanted in (1, 3):  # trials in the journal when it is killed
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        journal = Path("parts/study.journal")
        until = time.monotonic() + 120
        while time.monotonic() < until and process.poll() is None:
            if journal.exists() and journal.read_text().count('intermediate_value"') >= wanted:
                break
            time.sleep(0.02)
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    records = [json.loads(Path(name, "search.json").read_text()) for name in ("whole", "parts")]
    assert plain(records[0]) == plain(records[1])
    states = [morph.open_model(f"{name}/student.pt").model.state_dict() for name in ("whole", "parts")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_interrupted_it_says_how_to_go_on():
    command = [sys.executable, "-m", "morph.cli.main"]
    command += ["search", "--teacher", "teacher.pt", *FAST, "--budget-epochs", "40,80", "--out", "out"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while not list(Path().glob("out/*.training")) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.strip().endswith("morph: interrupted; the same command goes on from out")
    assert "Traceback" not in err
    assert list(Path().glob("out/*.training"))


def test_workers_search_together(capsys):
    arguments = ["--teacher", "teacher.pt", *FAST, "--students", "0", "--out", "out", "--json", "--rounds", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "morph.cli.main", "search", *arguments, "--join"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    code, out, _ = run(capsys, *arguments, "--workers", "1", "--beat", "0.5")
    _, err = process.communicate(timeout=120)
    assert (code, process.returncode) == (0, 0), err
    record = json.loads(out)
    assert len(record["trials"]) == 8
    assert all(row["state"] in ("complete", "stopped") for row in record["trials"])
    assert "the search is done: 8 configurations" in err


@pytest.mark.parametrize("dies", [False, True])
def test_workers_are_started_and_may_die(capsys, monkeypatch, dies):
    if dies:
        monkeypatch.setattr("morph.cli.search_workers.START", (sys.executable, "-c", "import sys; sys.exit(7)"))
    arguments = ["--teacher", "teacher.pt", *FAST, "--students", "0", "--out", "out", "--workers", "2"]
    code, out, err = run(capsys, *arguments)
    assert code == 0
    assert "configurations  4" in out
    assert (err == "") == (not dies)
    assert not dies or "a worker ended with exit code 7, see out/worker-1.log" in err
    assert dies or "the search is done" in Path("out/worker-1.log").read_text()


def test_the_live_table(monkeypatch):
    from dataclasses import replace

    from family_fakes import SETTINGS, FakeTrain, draw_nothing

    from morph.cli.search_table import Table, duration
    from morph.family.rounds import run_rounds
    from morph.family.study import FamilyStudy

    monkeypatch.setattr("morph.family.running.draw_network", draw_nothing)
    study = FamilyStudy("journal", SETTINGS)
    run_rounds(study, 1, FakeTrain(broken={3: RuntimeError("no memory")}), Path())
    drawn = []
    table = Table(lambda *parts: drawn.append(parts), SETTINGS.budgets, 2, 2)
    assert table.seconds_left() is None
    table.rows = [replace(row, seconds=float(len(row.curve))) for row in study.rows()]  # a second for each epoch
    table.draw(0.0)
    title, header, rows, _ = drawn[0]
    assert title.startswith("10 of 20 configurations ended, about ")
    assert all(len(row) == len(header) for row in rows)
    assert rows[-1][-1] == "RuntimeError: no memory"
    reached = [row.accuracies.get(4, 0) for row in table.rows]
    assert rows[0][header.index("epoch 4")] == f"{max(reached):.2%}"
    done = sum(len(row.curve) for row in table.rows)
    lost = 4 - 0  # what the failed one would have been trained for at most
    assert table.seconds_left() == (SETTINGS.budgets.plan().times(2).epochs_resumed - done - lost) / 2
    table.draw(0.1, often=True)
    assert len(drawn) == 1
    table.draw(1.0, often=True)
    assert len(drawn) == 2
    assert [duration(s) for s in (12, 600, 7300, 200_000)] == ["12 s", "10 min", "2 h 02 min", "2 d 7 h"]


def test_a_storage_elsewhere(capsys):
    arguments = ("--no-kd", *FAST, "--students", "0", "--out", "out", "--storage", "sqlite:///shared.db")
    assert run(capsys, *arguments, "--study", "mine")[0] == 0
    assert Path("shared.db").exists()
    assert not Path("out/study.journal").exists()
    err = bad(capsys, *arguments, "--study", "mine", "--seed", "4")
    assert "seed is 0 there and 4 here" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--teacher", "teacher.pt", *FAST), "give the folder of the search with --out DIR"),
        ((*FAST, "--out", "out"), "give a teacher with --teacher MODEL, or --no-kd"),
        (("--teacher", "teacher.pt", "--no-kd", *FAST, "--out", "out"), "leave one of them out"),
        (("--teacher", "missing.pt", *FAST, "--out", "out"), "missing.pt"),
        (("--teacher", "teacher.pt", *FAST, "--data", "missing", "--out", "out"), "missing"),
        (("--teacher", "teacher.pt", *FAST, "--out", "data.npz"), "data.npz: is a file"),
        (("--no-kd", *FAST, "--max-params", "500", "--out", "out"), "no network meets a limit of 500 parameters"),
        (
            ("--no-kd", "--data", "data.npz", "--range", "depth=1,2", "--out", "out"),
            "there is no number depth to search",
        ),
        (("--no-kd", "--data", "data.npz", "--range", "weight=0,1", "--out", "out"), "there is no number weight to"),
        (("--no-kd", "--data", "data.npz", "--range", "top_nodes=5,3", "--out", "out"), "must be two whole numbers"),
        (("--no-kd", *FAST, "--cache", "--out", "out"), "--cache keeps what the teacher says"),
        (("--no-kd", *FAST, "--range", "top_nodes=4", "--out", "out"), "more than once for top_nodes"),
        (("--no-kd", *FAST, "--budget-epochs", "1,2,5", "--out", "out"), "each must be the same factor"),
        (("--no-kd", *FAST, "--lr", "-1", "--out", "out"), "lr of -1.0"),
        (("--no-kd", *FAST, "--out", "out", "--compare", "nothing"), "nothing/search.json: not the record of a search"),
        (("--no-kd", *FAST, "--out", "out", "--storage", "no/such/journal"), "the folder no/such does not exist"),
        (("--no-kd", *FAST, "--hold-out", "0", "--out", "out"), "too few to set 0 of them aside"),
        (("--no-kd", *FAST, "--beat", "10", "--patience", "19", "--out", "out"), "must be at least twice as long"),
        (("--no-kd", *FAST, "--out", "data.npz/out"), "data.npz: is a file"),
        (("--no-kd", *FAST, "--out", "out", "--storage", "grpc://127.0.0.1:port"), "give grpc://HOST:PORT"),
        (("--no-kd", *FAST, "--device", "gibberish", "--out", "out"), "--device gibberish"),
    ],
)
def test_bad_input_is_one_clear_line(capsys, arguments, message):
    assert message in bad(capsys, *arguments)
    if not any(missing in message for missing in ("with --out DIR", "give a teacher with")):
        assert message in bad(capsys, *arguments, "--dry-run")  # which refuses it too
    assert not Path("out").exists()


def test_a_dry_run_looks_at_a_study_that_is_there_and_writes_nothing(capsys):
    def everything():
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in Path().rglob("*") if path.is_file()}

    for more in (("--storage", "sqlite:///shared.db"), ()):
        arguments = ("--no-kd", *FAST, "--students", "0", "--out", "out", *more)
        before = everything()
        assert run(capsys, *arguments, "--dry-run")[0] == 0
        assert everything() == before
        assert run(capsys, *arguments)[0] == 0
        half = Path("out/study.journal")
        if half.exists():
            half.write_bytes(half.read_bytes() + b'{"op_code": 8, "wor')  # of a writer that was killed
        before = everything()
        assert run(capsys, *arguments, "--dry-run")[0] == 0
        assert "training.lr is 0.05 there and 0.2 here" in bad(capsys, *arguments, "--lr", "0.2", "--dry-run")
        assert everything() == before


def test_a_teacher_of_other_classes_is_refused(capsys):
    wrong = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(12, 2))
    morph.save_model(wrong, "wrong.pt", input_shape=(3, 8, 8))
    assert "classes" in bad(capsys, "--teacher", "wrong.pt", *FAST, "--out", "out")


def test_a_cache_of_the_teacher_changes_nothing_but_the_time(capsys):
    found = []
    for more in ((), ("--cache",)):
        arguments = ("--teacher", "teacher.pt", *FAST, *more, "--out", f"out{len(more)}", "--json")
        code, out, err = run(capsys, *arguments)
        assert (code, err) == (0, "")
        record = json.loads(out)
        found.append([[row["curve"] for row in record["trials"]], [row["accuracy"] for row in record["students"]]])
    assert found[0] == found[1]
    assert {path.name for path in Path("out1").glob("*.logits")} == {"search.logits", "students.logits"}


def test_other_options_in_the_same_folder_are_refused(capsys):
    arguments = ("--no-kd", *FAST, "--students", "0", "--out", "out")
    assert run(capsys, *arguments)[0] == 0
    assert "training.lr is 0.05 there and 0.2 here" in bad(capsys, *arguments, "--lr", "0.2")
    assert "distil is False there" in bad(capsys, *FAST, "--teacher", "teacher.pt", "--students", "0", "--out", "out")


def test_a_search_of_failures_ends_with_the_reason(capsys):
    err = bad(capsys, "--no-kd", *FAST, "--lr", "1e38", "--students", "0", "--out", "out", code=1)
    assert "all 4 trials failed, the first with DivergedError: the loss or a weight is not a finite number" in err


def test_without_optuna_it_says_how_to_get_it(capsys, monkeypatch):
    real = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "optuna" else real(name, *a))
    assert "pip install torch-morph[search]" in bad(capsys, "--no-kd", *FAST, "--out", "out")
