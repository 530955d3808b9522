"""`morph train` and `morph evaluate` as a user meets them."""

from __future__ import annotations

import csv
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
from PIL import Image
from torch import nn
from training_support import bad, equal, run, weights

import morph

FAST = ("--epochs", "3", "--batch-size", "8", "--lr", "0.05", "--data", "data.npz")


def small(classes=3, size=8):
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, classes)
    )


@pytest.fixture(autouse=True)
def model(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    morph.save_model(small(), tmp_path / "model.pt", input_shape=(3, 8, 8))
    draw = np.random.default_rng(0)
    labels = np.arange(40) % 3
    images = draw.integers(0, 120, (40, 8, 8, 3)) + 60 * labels[:, None, None, None]
    np.savez(tmp_path / "data.npz", images=images.astype(np.uint8), labels=labels)
    return tmp_path / "model.pt"


def files() -> set[str]:
    return {p.name for p in Path().iterdir()}


def folder(root: Path, classes=("ant", "bee"), number=4, size=8) -> Path:
    draw = np.random.default_rng(1)
    for i, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for k in range(number):
            pixels = draw.integers(0, 120, (size, size, 3)) + 100 * i
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{k}.png")
    return root


def test_it_writes_model_record_curve_and_history(capsys, model):
    before = model.read_bytes()
    code, out, err = run(capsys, "train", "model.pt", *FAST, "--augment", "--nesterov", "--out", "new.pt")
    assert (code, err) == (0, "")
    assert model.read_bytes() == before
    assert files() == {"model.pt", "data.npz", "new.pt", "new.json", "new.svg", "new.csv"}
    record = json.loads(Path("new.json").read_text())
    rows = list(csv.DictReader(Path("new.csv").read_text().splitlines()))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3]
    assert [float(row["val_top1"]) for row in rows] == [row["val_top1"] for row in record["history"]]
    assert record["scores_after"]["top1"] == record["history"][-1]["val_top1"]
    assert record["scores_after"]["images"] == 4
    assert record["environment"]["data"]["augmentation"]
    assert record["environment"]["validation"]["images"] == 4
    assert f"validation     top-1 {record['scores_before']['top1']:.2%} -> {record['scores_after']['top1']:.2%}" in out
    assert "top-1" in Path("new.svg").read_text()
    assert not equal(weights("new.pt"), weights("model.pt"))
    assert run(capsys, "report", "new.pt")[0] == 0
    assert "has nothing to replay: the weights were trained" in bad(capsys, "apply", "new.json", "model.pt")


def test_json_and_the_best_weights(capsys):
    code, out, _ = run(capsys, "train", "model.pt", *FAST, "--keep", "both", "--hold-out", "0.3", "--json")
    assert code == 0
    record = json.loads(out)
    assert {"top1", "top5", "loss", "images"} == set(record["scores_before"]) == set(record["scores_after"])
    assert record["written"] == [f"model-trained{suffix}" for suffix in (".pt", ".json", ".svg")]
    assert record["best"] == "model-trained-best.pt"
    assert run(capsys, "train", "model.pt", *FAST, "--keep", "best", "--hold-out", "0.3", "--out", "b.pt")[0] == 0
    assert equal(weights("b.pt"), weights("model-trained-best.pt"))
    best = json.loads(Path("b.json").read_text())
    assert best["scores_after"]["top1"] == max(row["val_top1"] for row in best["history"])


def test_fresh_weights_and_no_validation(capsys):
    for seed in ("1", "1", "2"):
        code, out, _ = run(
            capsys, "train", "model.pt", *FAST, "--fresh", "--hold-out", "0", "--seed", seed, "--out", "f.pt", "--force"
        )
        assert code == 0
        assert "validation     none" in out
        assert json.loads(Path("f.json").read_text())["begin"] == f"drawn afresh, seed {seed}"
        Path("f.pt").rename(f"f{len(list(Path().glob('f[0-9].pt')))}.pt")
    assert equal(weights("f0.pt"), weights("f1.pt"))
    assert not equal(weights("f0.pt"), weights("f2.pt"))


def test_the_test_part_of_a_folder_is_what_it_is_validated_on(capsys, tmp_path):
    folder(tmp_path / "images" / "train", ("ant", "bee", "cat"))
    folder(tmp_path / "images" / "test", ("ant", "bee", "cat"), number=2)
    code, out, _ = run(
        capsys, "train", "model.pt", "--data", "images", "--epochs", "1", "--json", "--out", "a.pt", "--lr", "0.01"
    )
    assert code == 0
    facts = json.loads(out)["environment"]
    assert (facts["data"]["images"], facts["validation"]["images"]) == (12, 6)
    assert facts["validation"]["source"].endswith("test")


def test_events_for_tensorboard(capsys):
    pytest.importorskip("tensorboard")
    assert run(capsys, "train", "model.pt", *FAST, "--tensorboard", "events")[0] == 0
    assert [p.name.split(".")[2] for p in Path("events").iterdir()] == ["tfevents"]


def test_a_dry_run_writes_nothing(capsys):
    before = files()
    code, out, _ = run(capsys, "train", "model.pt", *FAST, "--dry-run", "--json")
    assert code == 0
    assert json.loads(out)["steps"] == 15
    assert "steps          15 in 3 rounds" in run(capsys, "train", "model.pt", *FAST, "--dry-run")[1]
    assert files() == before


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_started_again_it_ends_with_the_same_weights(capsys, tmp_path, sent):
    command = ["train", "model.pt", *FAST, "--augment", "--epochs", "300", "--checkpoint-every", "7"]
    assert run(capsys, *command, "--out", "whole.pt")[0] == 0
    program = [sys.executable, "-c", "from morph.cli.main import main; raise SystemExit(main())"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums depend on how they are split
    first = subprocess.Popen([*program, *command, "--out", "two.pt"], cwd=tmp_path, env=environment, stderr=-1)
    while not Path("two.state").exists() and first.poll() is None:
        time.sleep(0.01)
    first.send_signal(sent)
    error = first.communicate(timeout=300)[1].decode()
    assert first.returncode == (130 if sent == signal.SIGINT else -9)
    assert error == ("morph: interrupted; the same command goes on from two.state\n" if sent == signal.SIGINT else "")
    assert not Path("two.pt").exists()
    code, _, error = run(capsys, *command, "--out", "two.pt")
    assert code == 0
    assert error == "going on from two.state\n"
    assert not Path("two.state").exists()
    assert equal(weights("whole.pt"), weights("two.pt"))
    records = [json.loads(Path(f"{name}.json").read_text()) for name in ("whole", "two")]
    for record in records:
        record.update(log=None, seconds=0, history=[{**row, "seconds": 0} for row in record["history"]])
    assert records[0] == records[1]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([*FAST, "--lr", "-1"], "lr of -1.0"),
        ([*FAST, "--optimizer", "adam", "--nesterov"], "Nesterov"),
        ([*FAST, "--label-smoothing", "2"], "label smoothing of 2.0"),
        ([*FAST, "--device", "nonsense"], "--device nonsense"),
        ([*FAST, "--out", "a/b.pt"], "the folder a does not exist"),
        ([*FAST, "--out", "model.pt"], "exists already"),
        ([*FAST, "--out", "x.csv"], "give names that differ"),
        ([*FAST, "--hold-out", "0.001"], "too few to set 0.001 of them aside"),
        (["--data", "nowhere"], "no such file"),
        (["--data", "empty"], "no folders of classes"),
        (["--data", "one"], "all 8 images are of one class, 'ant'"),
        (["--data", "broken"], "2 of 8 images cannot be read; mend or remove them: "),
        (["--data", "many.npz"], "has label 3"),
        (["--data", "large.npz"], "images of 9x9x3, the model takes 3x8x8"),
    ],
)
def test_bad_input(capsys, tmp_path, arguments, text):
    (tmp_path / "empty").mkdir()
    folder(tmp_path / "one", ("ant",), number=8)
    broken = folder(tmp_path / "broken")
    for name in ("ant/0.png", "bee/3.png"):
        (broken / name).write_bytes(b"no image")
    np.savez("many.npz", images=np.zeros((12, 8, 8, 3), np.uint8), labels=np.arange(12) % 5)
    np.savez("large.npz", images=np.zeros((12, 9, 9, 3), np.uint8), labels=np.arange(12) % 3)
    error = bad(capsys, "train", "model.pt", *arguments)
    assert text in error
    if "broken" in arguments:
        assert "ant/0.png" in error
        assert "bee/3.png" in error


def test_no_number_keeps_the_last_good_state(capsys):
    wild = ("--milestones", "0.5", "--gamma", "1e37", "--epochs", "4")
    code, out, err = run(capsys, "train", "model.pt", *FAST, *wild)
    assert (code, out, err.count("\n")) == (1, "", 1)  # as `morph prune-for-student` ends: the input was not bad
    assert "not a finite number after step 15" in err
    assert "the last good state is in model-trained.state" in err
    assert len(Path("model-trained.csv").read_text().splitlines()) == 3
    state = torch.load("model-trained.state", weights_only=True)
    assert state["done"]["step"] == 10
    assert not Path("model-trained.pt").exists()


def test_no_number_at_the_first_step(capsys):
    code, out, err = run(capsys, "train", "model.pt", *FAST, "--lr", "1e38")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "not a finite number" in err


def test_a_disk_that_is_full_costs_nothing(capsys, monkeypatch):
    import morph.search_checkpoint

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(morph.search_checkpoint.torch, "save", full)
    error = bad(capsys, "train", "model.pt", *FAST)
    assert "model-trained.state: not written: No space left on device" in error


def test_another_state_is_refused(capsys):
    Path("model-trained.state").write_bytes(b"something else")
    code, _, err = run(capsys, "train", "model.pt", *FAST)
    assert code == 2
    assert "model-trained.state: not a checkpoint of a training run" in err
    assert Path("model-trained.state").read_bytes() == b"something else"


def test_evaluation_is_what_a_twin_counts(capsys):
    code, out, _ = run(capsys, "evaluate", "model.pt", "model.pt", "--data", "data.npz", "--json", "--per-class")
    assert code == 0
    rows = json.loads(out)["models"]
    assert rows[0] == rows[1]
    images = morph.data.open_data("data.npz", input_shape=(3, 8, 8), num_classes=3)
    with torch.no_grad():
        logits = morph.open_model("model.pt").model.eval()(images.images).double().numpy()
    labels = images.labels.numpy()
    hits = logits.argmax(1) == labels
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert rows[0]["top1"] == pytest.approx(hits.mean())
    assert rows[0]["top5"] == 1
    assert rows[0]["loss"] == pytest.approx(-logs[np.arange(40), labels].mean(), rel=1e-5)
    assert rows[0]["class_top1"] == pytest.approx([hits[labels == c].mean() for c in range(3)])
    assert rows[0]["class_images"] == [14, 13, 13]
    code, out, _ = run(capsys, "evaluate", "model.pt", "--data", "data.npz", "--per-class", "--batch-size", "7")
    assert f"model.pt  {hits.mean():.2%}" in out
    assert "top-1 of each class" in out


def test_bad_input_of_an_evaluation(capsys):
    assert "missing.pt" in bad(capsys, "evaluate", "model.pt", "missing.pt", "--data", "data.npz")
    broken = small()
    with torch.no_grad():
        broken[5].bias[0] = float("nan")
    morph.save_model(broken, "nan.pt", input_shape=(3, 8, 8))
    error = bad(capsys, "evaluate", "nan.pt", "--data", "data.npz")
    assert "the outputs for 40 of 40 samples are not finite" in error
