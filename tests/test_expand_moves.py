"""`morph expand --move widen` and `--move auto`, and which options each move reads."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from models import randomise
from torch import nn

import morph
from morph.cli.main import main
from morph.errors import NothingToGrowError
from morph.expansion import require_groups
from morph.zoo import build
from morph.zoo.darts import DARTS_V2, DartsNet

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def plain(tmp_path, monkeypatch) -> Path:
    """A student without groups, and images."""
    monkeypatch.chdir(tmp_path)
    morph.save_model(randomise(build("wrn-16-1")), tmp_path / "student.pt", input_shape=(3, 32, 32))
    draw = np.random.default_rng(0)
    np.savez(
        tmp_path / "data.npz", images=draw.integers(0, 256, (20, 32, 32, 3), np.uint8), labels=draw.integers(0, 10, 20)
    )
    return tmp_path / "student.pt"


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(["expand", "student.pt", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def check_files(name: str) -> dict:
    """Teacher, record and picture are there, say the same, and replay to the bit."""
    record = json.loads(Path(f"{name}.json").read_text())
    teacher, student = (morph.open_model(f"{path}.pt").model.eval() for path in (name, "student"))
    assert sum(p.numel() for p in teacher.parameters()) == record["params_after"]
    torch.testing.assert_close(teacher(X), student(X), rtol=1e-4, atol=1e-5)
    assert Path(f"{name}.svg").read_text().startswith("<?xml")
    assert main(["apply", f"{name}.json", "student.pt", "--out", "again.pt"]) == 0
    one, two = teacher.state_dict(), morph.open_model("again.pt").model.state_dict()
    assert list(one) == list(two)
    assert all(torch.equal(one[key], two[key]) for key in one)
    return record


def test_widen_to_a_ratio(capsys, plain):
    code, out, _ = run(capsys, "--move", "widen", "--ratio", "1.25")
    assert code == 0
    record = check_files("student-teacher")
    units = {row["name"]: (row["units_before"], row["units_after"]) for row in record["couplings"]}
    assert units["stem.weight[0]"] == (16, 20)
    assert all(after == round(before * 1.25) for before, after in units.values())
    assert "16 -> 20" in out
    assert "target " not in out
    assert "check          outputs: max |difference|" in out
    assert "written: student-teacher.pt, student-teacher.json, student-teacher.svg" in out


def test_widen_with_noise_tells_how_far_it_moves(capsys, plain):
    code, out, _ = run(capsys, "--move", "widen", "--ratio", "1.25", "--noise", "1e-6")
    assert code == 0
    record = check_files("student-teacher")
    assert record["weight_preserving"] is False
    assert [check["limit"] for check in record["checks"]] == [1e-9, None]
    assert re.search(r"check +outputs, moved by the noise: max .*\(no limit, float64, \d+ samples\)", out)
    assert "noise          on the weights that make the copies" in out


@pytest.mark.parametrize("text", ["-1", "some", "inf", "nan"])
def test_noise_that_is_none(capsys, text):
    with pytest.raises(SystemExit) as caught:
        main(["expand", "student.pt", "--move", "widen", "--ratio=1.5", f"--noise={text}"])
    assert caught.value.code == 2
    assert "is not a share of the size of weights, 0 or above" in capsys.readouterr().err


@pytest.mark.parametrize("metric", ["params", "macs"])
def test_widen_to_a_target_by_fisher_scores(capsys, plain, metric):
    size = {"params": "220K", "macs": "40M"}[metric]
    options = ["--score", "fisher", "--data", "data.npz", "--batch-size", "4", "--probe-batches", "2"]
    code, out, _ = run(capsys, "--move", "widen", f"--target-{metric}", size, *options, "--dry-run", "--json")
    assert code == 0
    record = json.loads(out)
    assert record["written"] == []
    assert record[f"{metric}_after"] >= record["target"]
    assert record["distance"] == record[f"{metric}_after"] - record["target"]
    assert record["options"]["score"] == "fisher"
    assert record["environment"]["data"]["probe_batches"] == 2


def test_widen_leaves_what_it_is_told(capsys, plain):
    code, out, _ = run(capsys, "--move", "widen", "--ratio", "1.5", "--ignore", "stem*", "--form", "class", "--dry-run")
    assert code == 0
    assert "left whole     1 couplings, e.g. stem.weight[0]: asked to be left" in out
    assert "dry run: nothing written" in out
    assert re.search(r"^stem\.weight\[0\] +16$", out, re.MULTILINE)


def test_auto_on_a_model_with_groups(capsys, plain):
    net = randomise(DartsNet(DARTS_V2, layers=4, channels=4))
    morph.save_model(net, plain, input_shape=(3, 32, 32), force=True)
    size = sum(p.numel() for p in net.parameters())
    options = ["--target-params", str(round(size * 1.1)), "--data", "data.npz", "--batch-size", "4"]
    code, out, _ = run(capsys, "--move", "auto", *options, "--out", "grown.pt")
    assert code == 0
    record = check_files("grown")
    assert {step["move"] for step in record["steps"]} == {"regroup", "widen"}
    assert {edit["edit"] for edit in record["plan"]} >= {"regroup", "resize"}
    assert record["params_after"] >= record["target"]
    assert "\nregroup  cells." in out
    assert "gain per param" in out
    assert "not a promise of training" in out
    drawn = Path("grown.svg").read_text()
    assert " groups" in drawn
    assert "→" in drawn


def test_auto_on_a_model_without_groups_tells_what_it_widens(capsys, plain):
    options = ["--target-macs", "30M", "--data", "data.npz", "--batch-size", "4", "--ignore", "stem*", "--dry-run"]
    code, out, _ = run(capsys, "--move", "auto", *options)
    assert code == 0
    assert "wider couplings (" in out
    assert "gain per mac" in out
    assert "asked to be left" in out


def test_a_model_without_groups_is_told_of_widening_before_data_is_asked_for(capsys, plain):
    code, out, err = run(capsys, "--target-params", "15M")
    assert (code, out) == (2, "")
    assert "WideResNet has no grouped convolution to merge; widening is another move (--move widen" in err
    with pytest.raises(NothingToGrowError, match="Linear has no grouped convolution to merge"):
        require_groups(nn.Linear(3, 3))
    require_groups(nn.Conv2d(4, 4, 1, groups=2))


MOVES = {
    "regroup": ["--target-params", "300K"],
    "deepen": ["--blocks", "1"],
    "widen": ["--ratio", "1.5"],
    "auto": ["--target-params", "300K"],
}
READ = {
    "--blocks 2": ["deepen"],
    "--ratio 1.5": ["widen"],
    "--fisher": ["regroup", "deepen"],
    "--uniform": ["regroup", "deepen"],
    "--random": ["regroup"],
    "--fisher-per-param": ["regroup"],
    "--fit under": ["regroup", "deepen"],
    "--at x": ["regroup", "deepen", "auto"],
    "--reuse-scores": ["regroup"],
    "--reinit": ["regroup"],
    "--score l2": ["widen"],
    "--ignore x": ["widen", "auto"],
    "--form graph": ["widen", "auto"],
    "--noise 0.1": ["widen"],
    "--probe-batches 2": ["widen", "auto"],
}


@pytest.mark.parametrize(
    ("move", "option"), [(m, o) for m in MOVES for o in READ if m not in READ[o] and o.split()[0] not in MOVES[m]]
)
def test_an_option_that_a_move_does_not_read_is_refused(capsys, move, option):
    target = [] if option.split()[0] in ("--blocks", "--ratio") else MOVES[move]
    code, out, err = run(capsys, "--move", move, *target, *option.split())
    assert (code, out) == (2, "")
    assert f"{option.split()[0]} means nothing to --move {move}" in err


@pytest.mark.parametrize("text", ["1", "0.5", "wide", "inf", "nan"])
def test_ratios_that_are_not(capsys, text):
    with pytest.raises(SystemExit) as caught:
        main(["expand", "student.pt", "--move", "widen", f"--ratio={text}"])
    assert caught.value.code == 2
    assert "is not a width over the present one, above 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("widen", "--target-params", "10"), "the target of 10 params is not above the present"),
        (("widen", "--ratio", "1.5", "--data", "data.npz"), "--data means nothing to --score random"),
        (("widen", "--ratio", "1.5", "--out", "x.svg"), "x.svg: give a name that ends in .pt"),
        (("auto", "--target-params", "10", "--data", "data.npz"), "the target of 10 params is not above the"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_file(capsys, plain, arguments, message):
    code, out, err = run(capsys, "--move", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert {p.name for p in Path().iterdir()} == {"student.pt", "data.npz"}
