"""`morph expand --move deepen`, and the deeper relatives of networks without residual blocks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from models import Snapshot, randomise
from torch import nn

import morph
from morph.cli.main import main
from morph.depth_scaling import can_scale_depth, scale_depth
from morph.errors import NothingToGrowError, PlanMismatchError, TargetError
from morph.zoo import build

X = torch.randn(2, 3, 32, 32)


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(["expand", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def student(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "student.pt"
    morph.save_model(randomise(build("wrn-16-1")), path, input_shape=(3, 32, 32))
    return path


DEEPEN = ["student.pt", "--move", "deepen", "--target-params", "200K"]


def test_deepen_writes_teacher_and_record(capsys, student):
    code, out, _ = run(capsys, *DEEPEN)
    assert code == 0
    assert sorted(p.name for p in Path().iterdir()) == ["student-teacher.json", "student-teacher.pt", "student.pt"]
    record = json.loads(Path("student-teacher.json").read_text())
    assert f"parameters     {record['params_before']:,} -> {record['params_after']:,}\n" in out
    assert "groups.0.0 to groups.0.1  2 -> 3" in out
    assert "check          outputs: max |difference|" in out
    assert "e.g. 0.conv2.weight" in out
    assert record["weight_preserving"] is True
    assert record["max_abs_diff"] < 1e-10
    teacher = morph.open_model("student-teacher.pt").model
    assert sum(p.numel() for p in teacher.parameters()) == record["params_after"] >= 200_000
    original = morph.open_model(student).model
    torch.testing.assert_close(teacher.eval()(X), original.eval()(X), rtol=1e-5, atol=1e-6)
    assert main(["apply", "student-teacher.json", "student.pt", "--out", "again.pt"]) == 0
    one, two = teacher.state_dict(), morph.open_model("again.pt").model.state_dict()
    assert list(one) == list(two)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_json_and_dry_run(capsys, student):
    code, out, _ = run(capsys, "student.pt", "--move", "deepen", "--blocks", "4", "--dry-run", "--json")
    record = json.loads(out)
    assert code == 0
    assert (record["target"], record["target_metric"], record["written"]) == (4, "blocks", [])
    assert sum(unit["copies"] for unit in record["units"]) == 4
    assert [p.name for p in Path().iterdir()] == ["student.pt"]


def test_fisher_reads_images(capsys, student):
    draw = np.random.default_rng(0)
    np.savez("data.npz", images=draw.integers(0, 256, (9, 32, 32, 3), np.uint8), labels=draw.integers(0, 10, 9))
    code, out, _ = run(capsys, *DEEPEN, "--fisher", "--data", "data.npz", "--json", "--dry-run")
    assert code == 0
    assert all(unit["score"] > 0 for unit in json.loads(out)["units"])


def bad(capsys, *arguments: str) -> str:
    before = sorted(p.name for p in Path().iterdir())
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("morph: ")
    assert err.count("\n") == 1
    assert sorted(p.name for p in Path().iterdir()) == before
    return err


def test_bad_input_is_one_line(capsys, student):
    morph.save_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), "plain.pt", input_shape=(3, 32, 32))
    assert "no residual block" in bad(capsys, "plain.pt", *DEEPEN[1:])
    assert "is not above the" in bad(capsys, *DEEPEN[:3], "--target-params", "1K")
    assert "would take more than 1,000 copies" in bad(capsys, *DEEPEN[:3], "--target-params", "100G")
    assert "--fit under" in bad(capsys, *DEEPEN[:3], "--target-params", "176K", "--fit", "under")
    assert "--blocks means nothing to --move regroup" in bad(capsys, "student.pt", "--blocks", "3")
    for flag in ("--random", "--fisher-per-param", "--reinit", "--reuse-scores"):
        assert f"{flag} means nothing to --move deepen" in bad(capsys, *DEEPEN, flag)
    assert "--data means nothing to --move deepen without --fisher" in bad(capsys, *DEEPEN, "--data", "x.npz")
    assert "since .json is taken by the record" in bad(capsys, *DEEPEN, "--out", "x.json")
    assert "exists already" in bad(capsys, *DEEPEN, "--out", "student.pt")
    assert "--at x" in bad(capsys, *DEEPEN, "--at", "x")
    assert "--at means nothing to --move deepen for zoo:darts-4x4" in bad(
        capsys, "zoo:darts-4x4", *DEEPEN[1:], "--at", "x"
    )


def test_darts_becomes_the_deeper_one_of_its_family(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "zoo:darts-4x4", "--move", "deepen", "--blocks", "2", "--seed", "5")
    assert code == 0
    assert "zoo:darts-4x4 -> zoo:darts-6x4, 2 blocks deeper" in out
    assert "not weight-preserving, no function was checked" in out
    assert "fresh weights" in err
    record = json.loads(Path("darts-4x4-teacher.json").read_text())
    assert (record["weight_preserving"], record["checks"], record["plan"]) == (False, [], [])
    teacher = morph.open_model("darts-4x4-teacher.pt")
    assert teacher.arch == "zoo:darts-6x4"
    assert len(teacher.model.cells) == 6
    with pytest.raises(PlanMismatchError, match="has nothing to replay: its network was built afresh as zoo:darts-6x4"):
        morph.load_plan(Path("darts-4x4-teacher.json"))


def test_depth_scaled_darts_has_the_size_of_the_thesis():
    net = build("darts-10-trained")
    shot, state = Snapshot(net), torch.random.get_rng_state()
    one = scale_depth(net, "zoo:darts-10-trained", X, target_params=1.35e6)
    assert shot.same()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert one.record.after["params"] == sum(p.numel() for p in one.model.parameters()) == 1_354_980
    assert one.record.details["architecture"] == "zoo:darts-25"
    assert one.record.details["weight_preserving"] is False


def test_the_seed_decides_the_fresh_weights():
    net = build("densenet-bc-16-6")
    one, two, other = (scale_depth(net, "zoo:densenet-bc-16-6", X, blocks=3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.model.classifier.weight, two.model.classifier.weight)
    assert not torch.equal(one.model.classifier.weight, other.model.classifier.weight)


def test_depth_scaling_fits_and_refusals():
    net = build("densenet-bc-16-6", 7)
    name = "zoo:densenet-bc-16-6"
    deeper = scale_depth(net, name, X, blocks=3)
    assert deeper.record.details["architecture"] == "zoo:densenet-bc-22-6"
    assert deeper.model.classifier.out_features == 7
    size = deeper.record.after["params"]
    assert scale_depth(net, name, X, target_params=size + 1, fit="under").record.after["params"] == size
    assert scale_depth(net, name, X, target_params=size + 9, fit="closest").record.after["params"] == size
    assert scale_depth(net, name, X, target_params=size + 1).record.after["params"] > size
    macs = deeper.record.after["macs"]
    assert scale_depth(net, name, X, target_macs=macs).record.after["macs"] == macs
    for options, text in (
        ({"target_params": 5}, "is not above the"),
        ({"target_params": 1e15}, "would take more than 256 more steps of depth; with so many the network has"),
        ({"target_params": size - 1, "fit": "under"}, "--fit under: one step of depth leads from"),
        ({}, "give one target"),
    ):
        with pytest.raises(TargetError, match=text):
            scale_depth(net, name, X, **options)
    with pytest.raises(NothingToGrowError, match="zoo:wrn-16-2: is no DARTS or DenseNet of the zoo"):
        scale_depth(net, "zoo:wrn-16-2", X, blocks=1)
    assert [can_scale_depth(a) for a in (None, "zoo:darts-v1-10x8", "torchvision:resnet18", "zoo:wrn-16-2")] == [
        False,
        True,
        False,
        False,
    ]
