"""`morph prune-for-student` as a user meets it."""

from __future__ import annotations

import itertools
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
from models import randomise
from PIL import Image

import morph
from morph.cli.main import main
from morph.zoo import build

FAST = ("--epochs", "4", "--batch-size", "8", "--lr", "0.01", "--count-every", "3", "--data", "data.npz")
KEYS = "macs_before macs_after params_before params_after gates_open gates_total max_abs_diff"


@pytest.fixture(autouse=True)
def teacher(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    morph.save_model(randomise(build("densenet-bc-10-4")), tmp_path / "teacher.pt", input_shape=(3, 32, 32))
    draw = np.random.default_rng(0)
    np.savez(
        tmp_path / "data.npz", images=draw.integers(0, 256, (24, 32, 32, 3), np.uint8), labels=draw.integers(0, 10, 24)
    )
    return tmp_path / "teacher.pt"


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(["prune-for-student", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def files() -> set[str]:
    return {p.name for p in Path().iterdir()}


def bad(capsys, *arguments: str) -> str:
    before = files()
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert files() == before
    return err


def test_it_writes_student_record_and_picture(capsys, teacher):
    before = teacher.read_bytes()
    code, out, _ = run(capsys, "teacher.pt", "--target-flops", "0.4M", *FAST, "--out", "student.pt")
    assert code == 0
    assert teacher.read_bytes() == before
    assert files() == {"teacher.pt", "data.npz", "student.pt", "student.json", "student.svg"}
    record = json.loads(Path("student.json").read_text())
    student = morph.open_model("student.pt")
    counts = morph.count(student.model, torch.zeros(1, 3, 32, 32))
    assert (counts.macs, counts.params) == (record["macs_after"], record["params_after"])
    assert counts.macs <= 400_000
    assert f"gates open     {record['gates_open']} of {record['gates_total']}" in out
    assert f"multiply-adds  {record['macs_before']:,} -> {record['macs_after']:,}" in out
    assert "check          gated model: max |difference|" in out
    assert "weights        drawn afresh" in out
    assert "course of the search" in Path("student.svg").read_text()
    assert main(["apply", "student.json", "teacher.pt", "--out", "again.pt"]) == 0
    one, two = student.model.state_dict(), morph.open_model("again.pt").model.state_dict()
    assert list(one) == list(two)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_what_a_steep_penalty_takes_is_told(capsys):
    """A net of residual blocks from which next to nothing may stay."""
    torch.manual_seed(0)
    morph.save_model(randomise(build("wrn-10-1")), Path("wrn.pt"), input_shape=(3, 32, 32))
    code, out, _ = run(capsys, "wrn.pt", "--target-params", "200", *FAST, "--lambda2", "100", "--out", "few.pt")
    record = json.loads(Path("few.json").read_text())
    assert code == 0
    one = record["thin"][0]
    assert (
        f"thin           {len(record['thin'])} layers keep less than a tenth of their gates, e.g. {one['site']}" in out
    )
    assert record["branches_gone"]
    assert f"dropped        {len(record['branches_gone'])} residual branches whole, e.g. that of groups." in out
    assert morph.open_model("few.pt").model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_json_and_parameters_and_inherit(capsys):
    code, out, err = run(
        capsys, "teacher.pt", "--target-params", "2K", *FAST, "--inherit", "--json", "--mode", "np", "--augment"
    )
    assert code == 0
    assert err == ""
    record = json.loads(out)
    assert set(KEYS.split()) <= set(record)
    assert record["params_after"] <= 2000
    assert record["distance"] == record["params_after"] - 2000
    assert record["weights"].startswith("those of the search")
    assert record["environment"]["data"]["augmentation"]
    assert record["written"] == [f"teacher-student{suffix}" for suffix in (".pt", ".json", ".svg")]


def test_a_dry_run_counts_and_writes_nothing(capsys):
    before = files()
    code, out, _ = run(capsys, "teacher.pt", "--target-macs", "0.4M", "--dry-run", "--json")
    assert code == 0
    record = json.loads(out)
    assert set(KEYS.split()) <= set(record)
    assert record["gates_open"] == record["gates_total"] == sum(site["gates"] for site in record["sites"]) == 98
    assert (record["macs_after"], record["max_abs_diff"], record["written"]) == (None, None, [])
    code, out, _ = run(capsys, "teacher.pt", "--target-macs", "0.4M", "--dry-run")
    assert "gates          98\n" in out
    assert "dry run: nothing trained, nothing written" in out
    assert files() == before


def test_the_dry_run_of_the_papers_teacher(capsys):
    code, out, _ = run(capsys, "zoo:densenet-bc-100-12", "--target-flops", "90M", "--dry-run", "--json")
    record = json.loads(out)
    assert (code, record["gates_total"]) == (0, 11_994)
    assert (record["macs_before"], record["params_before"]) == (287_929_692, 769_162)
    assert round(record["macs_paper_before"] / 1e6, 2) == 296.48


def test_the_papers_count(capsys):
    code, out, _ = run(capsys, "teacher.pt", "--target-flops", "0.4M", "--count", "paper", "--json", *FAST)
    record = json.loads(out)
    assert code == 0
    assert record["macs_after"] < record["macs_paper_after"] <= 400_000
    assert record["distance"] == record["macs_paper_after"] - 400_000


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_started_again_it_ends_with_the_same_student(capsys, tmp_path, sent):
    command = ["teacher.pt", "--target-macs", "0.35M", *FAST, "--checkpoint-every", "2", "--epochs", "12"]
    assert run(capsys, *command, "--out", "whole.pt")[0] == 0
    program = [sys.executable, "-c", "from morph.cli.main import main; raise SystemExit(main())", "prune-for-student"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums depend on how they are split
    first = subprocess.Popen([*program, *command, "--out", "two.pt"], cwd=tmp_path, env=environment, stderr=-1)
    while not Path("two.search").exists() and first.poll() is None:
        time.sleep(0.01)
    first.send_signal(sent)
    error = first.communicate(timeout=300)[1].decode()
    assert first.returncode == (130 if sent == signal.SIGINT else -9)
    assert error == ("morph: interrupted; the same command goes on from two.search\n" if sent == signal.SIGINT else "")
    assert not Path("two.pt").exists()
    assert Path("two.search").exists()
    code, _, error = run(capsys, *command, "--out", "two.pt")
    assert code == 0
    assert "going on from two.search" in error
    assert not Path("two.search").exists()
    one, two = (morph.open_model(f"{name}.pt").model.state_dict() for name in ("whole", "two"))
    assert list(one) == list(two)
    assert all(torch.equal(one[key], two[key]) for key in one)
    records = [json.loads(Path(f"{name}.json").read_text()) for name in ("whole", "two")]
    assert records[0] == records[1]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["teacher.pt", "--target-macs", "90M", *FAST], "within the target of 90,000,000: nothing to search for"),
        (["teacher.pt", "--target-params", "10", *FAST], "are out of reach: with all 98 gates closed"),
        (["teacher.pt", "--target-params", "2K", *FAST, "--lr", "-1"], "lr of -1.0"),
        (["teacher.pt", "--target-params", "2K", *FAST, "--tau", "0"], "temperature of 0.0"),
        (["teacher.pt", "--target-params", "2K", *FAST, "--device", "nonsense"], "--device nonsense"),
        (["teacher.pt", "--target-params", "2K", "--data", "nowhere"], "no such file"),
        (["teacher.pt", "--target-params", "2K", *FAST, "--out", "a/b.pt"], "the folder a does not exist"),
        (["teacher.pt", "--target-params", "2K", *FAST, "--out", "teacher.pt"], "exists already"),
        (["missing.pt", "--target-params", "2K", *FAST], "missing.pt"),
    ],
)
def test_bad_input(capsys, arguments, text):
    assert text in bad(capsys, *arguments)


def test_classes_that_differ(capsys):
    np.savez("more.npz", images=np.zeros((12, 32, 32, 3), np.uint8), labels=np.arange(12))
    assert "label" in bad(capsys, "teacher.pt", "--target-params", "2K", "--data", "more.npz")


def test_another_checkpoint_is_refused(capsys):
    Path("state.search").write_bytes(b"something else")
    error = bad(capsys, "teacher.pt", "--target-params", "2K", *FAST, "--checkpoint", "state.search")
    assert "state.search: not a checkpoint of a search" in error
    assert Path("state.search").read_bytes() == b"something else"


def test_no_number_ends_with_one_line_and_keeps_the_teacher(capsys):
    code, out, err = run(capsys, "teacher.pt", "--target-params", "2K", *FAST, "--lr", "1e30", "--lambda2", "0")
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert "not a finite number" in err
    assert "student.pt" not in " ".join(files())


@pytest.mark.parametrize(
    ("other", "what"),
    [(("--seed", "1"), "seed is 0 there and 1 here"), (("--tau", "2"), "tau is 4.0 there and 2.0 here")],
)
def test_a_search_with_other_numbers_does_not_go_on_from_this_one(capsys, monkeypatch, other, what):
    command = ["teacher.pt", "--target-params", "2K", *FAST, "--checkpoint-every", "2", "--out", "new.pt"]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full(2, Path.write_bytes))
        assert run(capsys, *command)[0] == 2
    state = Path("new.search").read_bytes()
    code, out, err = run(capsys, *command, *other)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("morph: new.search: belongs to another search: ")
    assert what in err
    assert Path("new.search").read_bytes() == state
    assert run(capsys, *command)[0] == 0


def full(allowed: int, write):
    """A writer whose disk is full after some files."""
    calls = itertools.count(1)

    def to_disk(path: Path, content: bytes) -> int:
        if next(calls) > allowed:
            raise OSError(28, "No space left on device")
        return write(path, content)

    return to_disk


@pytest.mark.parametrize("allowed", [0, 3, 5])
def test_a_disk_that_is_full_costs_nothing(capsys, monkeypatch, allowed):
    """State after steps 2, 4, ...; then no more room. With room again the same command ends with the same student."""
    command = ["teacher.pt", "--target-params", "2K", *FAST, "--checkpoint-every", "2", "--out"]
    assert run(capsys, *command, "whole.pt")[0] == 0
    before = files()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full(allowed, Path.write_bytes))
        code, out, err = run(capsys, *command, "two.pt")
    name = "two.pt" if allowed == 5 else "two.search"  # the sixth file is the student
    assert (code, out) == (2, "")
    assert err == f"morph: {name}: not written: No space left on device\n"
    assert files() - before == ({"two.search"} if allowed else set())
    code, _, err = run(capsys, *command, "two.pt")
    assert code == 0
    assert ("going on from two.search" in err) == bool(allowed)
    assert Path("two.json").read_bytes() == Path("whole.json").read_bytes()
    one, two = (morph.open_model(f"{name}.pt").model.state_dict() for name in ("whole", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_interrupted_while_the_student_is_written_it_goes_on_from_its_state(capsys, monkeypatch):
    command = ["teacher.pt", "--target-params", "2K", *FAST, "--out", "two.pt"]
    before = files()

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("morph.search_picture.search_picture", interrupt)
        code, out, err = run(capsys, *command)
    assert (code, out) == (130, "")
    assert err == "morph: interrupted; the same command goes on from two.search\n"
    assert files() == before | {"two.search"}
    assert run(capsys, *command)[0] == 0
    assert files() == before | {"two.pt", "two.json", "two.svg"}


def test_a_file_that_may_not_grow_is_one_line():
    """As the operating system says it, not as a mock does."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
    program = limit + "from morph.cli.main import main; raise SystemExit(main())"
    command = ["prune-for-student", "teacher.pt", "--target-params", "2K", *FAST]
    before = files()
    done = subprocess.run([sys.executable, "-c", program, *command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "morph: teacher-student.search: not written: File too large\n"
    assert files() == before


@pytest.mark.parametrize(
    ("folders", "text"),
    [
        (0, "images: has no folders of classes with images in them"),
        (3, "images: has 3 classes, the model has 10"),
        (12, "images: has 12 classes, the model has 10; give data of the model's classes"),
    ],
)
def test_image_folders_that_do_not_fit(capsys, folders, text):
    Path("images").mkdir()
    for number in range(folders):
        Path(f"images/{number:02}").mkdir()
        Image.new("RGB", (32, 32)).save(f"images/{number:02}/one.png")
    assert text in bad(capsys, "teacher.pt", "--target-params", "2K", "--data", "images", "--epochs", "1")


def test_no_number_later_keeps_the_last_good_state(capsys, monkeypatch):
    command = ["teacher.pt", "--target-params", "2K", *FAST, "--checkpoint-every", "2", "--out"]
    assert run(capsys, *command, "whole.pt")[0] == 0
    steps = itertools.count(1)

    def poisoned(*args):
        return morph.search_losses.kl_divergence(*args) * (float("nan") if next(steps) == 5 else 1)

    with monkeypatch.context() as patch:
        patch.setattr("morph.search_losses.DistillationLoss.__call__", lambda _, s, t, y: poisoned(s, t))
        code, out, err = run(capsys, *command, "two.pt")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "not a finite number after step 6" in err
    assert "the last good state is in two.search" in err
    assert run(capsys, *command, "two.pt")[0] == 0
    assert Path("two.json").read_bytes() == Path("whole.json").read_bytes()
