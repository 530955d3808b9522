"""`morph distill` as a user meets it."""

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
from lightning_fabric import Fabric
from training_support import bad, contents, equal, make_files, network, run, weights

import morph
from morph.data import open_data
from morph.teaching.distillation import Distillation
from morph.teaching.feature_losses import AttentionTransfer
from morph.teaching.losses import LogitRegression, SoftLabels
from morph.teaching.terms import Features, Outputs

MODELS = ("distill", "--teacher", "teacher.pt", "--student", "student.pt")
FAST = ("--data", "data.npz", "--epochs", "2", "--batch-size", "8", "--lr", "0.05", "--hold-out", "0.2")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_files(tmp_path)


def test_it_writes_the_student_alone(capsys):
    before = contents()
    code, out, err = run(capsys, *MODELS, *FAST, "--kd", "--at", "--hint", "--out", "new.pt")
    assert (code, err) == (0, "")
    assert {p: b for p, b in contents().items() if p in before} == before
    assert {str(p) for p in contents()} - {str(p) for p in before} == {"new.pt", "new.json", "new.svg", "new.csv"}
    assert list(weights("new.pt")) == list(weights("student.pt"))  # no adapter is left in it
    assert not equal(weights("new.pt"), weights("student.pt"))
    record = json.loads(Path("new.json").read_text())
    assert set(record["history"][0]) >= {"part_soft_labels", "part_attention", "part_hint", "val_top1"}
    assert record["stages"][0]["adapter_params"] == 8 * 18 + 18
    assert record["options"]["temperature"] == 4.0
    for name in ("before", "after", "teacher"):
        assert set(record[f"scores_{name}"]) == {"top1", "top5", "loss", "images"}
    assert f"teacher        top-1 {record['scores_teacher']['top1']:.2%}" in out
    images = open_data("data.npz", input_shape=(3, 8, 8), num_classes=3)
    assert morph.evaluate(morph.open_model("new.pt").model, images).images == 40
    assert run(capsys, "report", "new.pt")[0] == 0


def test_the_command_does_what_python_does(capsys):
    code, _, _ = run(
        capsys,
        *MODELS,
        *FAST,
        "--hold-out",
        "0",
        "--kd",
        "--temperature",
        "3",
        "--alpha",
        "0.7",
        "--t-squared",
        "--logits",
        "--logits-weight",
        "0.2",
        "--at",
        "--beta",
        "50",
        "--at-pair",
        "0=0",
        "--at-pair",
        "2=2",
    )
    assert code == 0
    student, teacher = (morph.open_model(f"{name}.pt").model for name in ("student", "teacher"))
    images = open_data("data.npz", input_shape=(3, 8, 8), num_classes=3, limit=None)
    terms = [
        Outputs(SoftLabels(3.0, 0.7, t_squared=True, label_weight=1 - 0.7)),
        Outputs(LogitRegression(), 0.2),
        Features(AttentionTransfer(beta=50), [("0", "0"), ("2", "2")]),
    ]
    objective = Distillation(student, teacher, terms, example_inputs=images.images[:2])
    fabric = Fabric(accelerator="cpu", devices=1)
    morph.fit(objective, images, fabric=fabric, epochs=2, batch_size=8, lr=0.05)
    assert equal(weights("student-distilled.pt"), student.state_dict())


def test_hints_first_and_then_the_rest(capsys):
    code, out, _ = run(capsys, *MODELS, *FAST, "--hint", "--hint-epochs", "1", "--kd", "--json")
    assert code == 0
    record = json.loads(out)
    first, second = record["stages"]
    assert (first["stage"], first["epochs"], list(first["terms"])) == ("hints", 1, ["hint"])
    assert "val_top1" not in first["history"][0]
    assert (second["stage"], second["epochs"], list(second["terms"])) == ("rest", 2, ["soft_labels"])
    assert "part_hint" in first["history"][0]
    assert Path("student-distilled-hints.csv").exists()
    assert not list(Path().glob("*.state"))


def test_a_dry_run_shows_pairs_and_writes_nothing(capsys):
    before = contents()
    code, out, _ = run(capsys, *MODELS, *FAST, "--hint", "--at", "--assistant", "assistant.pt", "--dry-run")
    assert code == 0
    assert "teacher.pt teaches assistant.pt" in out
    assert "assistant.pt teaches student.pt" in out
    assert "1x1 convolution 8 -> 12" in out
    code, out, _ = run(capsys, *MODELS, *FAST, "--hint", "--at", "--dry-run", "--json")
    stage = json.loads(out)["links"][0]["stages"][0]
    assert [row["student"] for row in stage["pairs"]["hint"]] == [stage["pairs"]["attention"][-1]["student"]]
    assert contents() == before


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_chain_that_was_killed_ends_with_the_same_student(capsys, tmp_path, sent):
    command = [*MODELS, "--assistant", "assistant.pt", *FAST, "--epochs", "60", "--hint", "--hint-epochs", "20", "--kd"]
    assert run(capsys, *command, "--out", "whole.pt")[0] == 0
    assert {"whole-assistant1.pt", "whole-assistant1.json", "whole-assistant1.svg"} < {str(p) for p in contents()}
    program = [sys.executable, "-c", "from morph.cli.main import main; raise SystemExit(main())"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums depend on how they are split
    first = subprocess.Popen([*program, *command, "--out", "two.pt"], cwd=tmp_path, env=environment, stderr=-1)
    wanted = "two-assistant1.state" if sent == signal.SIGKILL else "two-hints.state"
    while not Path(wanted).exists() and first.poll() is None:
        time.sleep(0.01)
    first.send_signal(sent)
    error = first.communicate(timeout=300)[1].decode()
    assert first.returncode == (130 if sent == signal.SIGINT else -9)
    if sent == signal.SIGINT:
        assert error.endswith("morph: interrupted; the same command goes on from two-hints.state\n")
    assert not Path("two.pt").exists()
    code, _, error = run(capsys, *command, "--out", "two.pt")
    assert code == 0
    assert ("two-assistant1.pt is there already" in error) == (sent == signal.SIGINT)
    assert not list(Path().glob("*.state"))
    for end in ("", "-assistant1"):
        assert equal(weights(f"whole{end}.pt"), weights(f"two{end}.pt"))
    records = [json.loads(Path(f"{name}.json").read_text()) for name in ("whole", "two")]
    for record in records:
        record.update(log=None, seconds=0, history=[{**row, "seconds": 0} for row in record["history"]])
        for stage in record["stages"]:
            stage.update(log=None, history=[{**row, "seconds": 0} for row in stage.get("history", [])])
    assert records[0] == records[1]


def test_an_assistant_of_another_run_is_in_the_way(capsys):
    command = (*MODELS, "--assistant", "assistant.pt", *FAST, "--epochs", "1", "--out", "a.pt")
    assert run(capsys, *command)[0] == 0
    assert "a.pt: exists already" in bad(capsys, *command)
    Path("a.pt").unlink()
    assert "a.json: exists already" in bad(capsys, *command)
    for suffix in (".json", ".svg", ".csv"):
        Path(f"a{suffix}").unlink()
    assert "a-assistant1.pt: exists already" in bad(capsys, *command, "--seed", "1")
    code, _, err = run(capsys, *command)
    assert (code, err) == (0, "a-assistant1.pt is there already\n")


def label_teacher(capsys) -> None:
    numbers = ("--label-channels", "4", "--label-kernel", "2", "--label-stride", "2")
    code, _, err = run(capsys, "train", "teacher.pt", *FAST, *numbers, "--out", "labels.pt", "--hold-out", "0")
    assert (code, err) == (0, "")


def test_multi_channel_labels_from_teacher_to_student(capsys):
    label_teacher(capsys)
    command = ("distill", "--teacher", "labels.pt", "--student", "student.pt", *FAST, "--multi-channel")
    code, out, _ = run(capsys, *command, "--json", "--out", "live.pt")
    assert code == 0
    record = json.loads(out)
    assert list(record["stages"][0]["terms"]) == ["multi_channel"]
    student = morph.open_model("live.pt").model
    assert student(torch.randn(5, 3, 8, 8)).shape == (5, 3)
    assert sum(p.shape[0] == 12 for name, p in student.named_parameters() if name.endswith("score.weight")) == 1
    assert run(capsys, *command, "--cache", "bits.cache", "--out", "cached.pt")[0] == 0
    assert equal(weights("live.pt"), weights("cached.pt"))
    before = Path("bits.cache").read_bytes()
    assert run(capsys, *command, "--cache", "bits.cache", "--out", "again.pt")[0] == 0
    assert equal(weights("again.pt"), weights("cached.pt"))
    assert Path("bits.cache").read_bytes() == before
    Path("bits.cache").write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    assert "bits.cache" in bad(capsys, *command, "--cache", "bits.cache", "--out", "b.pt")
    Path("bits.cache").write_bytes(before)
    other = ("--seed", "3", "--limit", "30")
    assert "is of another setting: samples is 32, expected 24" in bad(
        capsys, *command, "--cache", "bits.cache", "--out", "b.pt", *other
    )
    assert run(capsys, "apply", "live.json", "student.pt", "--out", "structure.pt")[0] == 0
    assert list(weights("structure.pt")) == list(weights("live.pt"))


def test_cached_logits_teach_what_the_live_teacher_does(capsys):
    for name, more in (("live", []), ("cached", ["--cache", "logits.cache"])):
        assert run(capsys, *MODELS, *FAST, "--kd", *more, "--out", f"{name}.pt")[0] == 0
    one, two = weights("live.pt"), weights("cached.pt")
    assert all(torch.allclose(one[key], two[key], atol=1e-5) for key in one)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--kd", "--temperature", "0"], "a temperature of 0.0"),
        (["--kd", "--alpha", "1.5"], "an alpha of 1.5"),
        (["--at", "--beta", "-1"], "attention transfer (beta)"),
        (["--kd", "--beta", "10"], "--beta is given without --at"),
        (["--hint", "--hint-epochs", "2", "--label-weight", "0"], "name what follows"),
        (["--at", "--at-pair", "first=0"], "no module or node 'first'"),
        (["--at", "--at-pair", "3=0"], "no bridge"),
        (["--kd", "--student", "ten.pt"], "the teacher has 3 classes, the student 10"),
        (["--at", "--student", "two.pt"], "has label 2, expected 0 to 1, the classes of the model"),
        (["--kd", "--teacher", "large.pt"], "takes images of 3x16x16, student.pt of 3x8x8"),
        (["--kd", "--teacher", "flat.pt", "--input", "3x8x8"], "does not accept inputs of shape"),
        (["--kd", "--teacher", "missing.pt"], "missing.pt"),
        (["--kd", "--data", "nowhere"], "no such file"),
        (["--multi-channel"], "morph train teacher.pt --label-channels"),
        (["--multi-channel", "--kd"], "leave one of them out"),
        (["--at", "--cache", "c"], "neither is learned"),
        (["--kd", "--out", "teacher.pt", "--force", "--checkpoint", "teacher.pt"], "give names that differ"),
    ],
)
def test_bad_input(capsys, arguments, text):
    for name, model, shape in (
        ("ten", network(4, 10), (3, 8, 8)),
        ("two", network(4, 2), (3, 8, 8)),
        ("large", network(4), (3, 16, 16)),
        ("flat", torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 3)), (3, 16, 16)),
    ):
        morph.save_model(model, f"{name}.pt", input_shape=shape)
    assert text in bad(capsys, *MODELS, *FAST, *arguments)


def test_no_number_ends_the_run(capsys):
    code, out, err = run(capsys, *MODELS, *FAST, "--kd", "--lr", "1e38")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "not a finite number" in err


def test_a_pair_that_is_none(capsys):
    with pytest.raises(SystemExit) as caught:
        run(capsys, *MODELS, "--at", "--at-pair", "layer1")
    assert caught.value.code == 2
    assert "is no pair" in capsys.readouterr().err


def test_a_teacher_of_other_classes_may_teach_layers(capsys):
    morph.save_model(network(9, 7), "seven.pt", input_shape=(3, 8, 8))
    code, out, _ = run(capsys, "distill", "--teacher", "seven.pt", "--student", "student.pt", *FAST, "--at", "--json")
    assert code == 0
    record = json.loads(out)
    assert set(record["stages"][0]["terms"]) == {"labels", "attention"}
    assert np.isfinite(record["history"][-1]["loss"])
