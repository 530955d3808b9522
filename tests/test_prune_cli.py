"""`morph prune` as a user meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from models import randomise

import morph
from morph.cli.main import main
from morph.picture import UnitRow, units_figure
from morph.zoo import build

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    morph.save_model(randomise(build("wrn-16-1")), tmp_path / "model.pt", input_shape=(3, 32, 32))
    draw = np.random.default_rng(0)
    np.savez(
        tmp_path / "data.npz", images=draw.integers(0, 256, (20, 32, 32, 3), np.uint8), labels=draw.integers(0, 10, 20)
    )
    return tmp_path / "model.pt"


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(["prune", "model.pt", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def bad(capsys, *arguments: str) -> str:
    before = sorted(p.name for p in Path().iterdir())
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert sorted(p.name for p in Path().iterdir()) == before
    return err


def test_prune_writes_model_record_and_picture(capsys, model):
    before = model.read_bytes()
    code, out, _ = run(capsys, "--ratio", "0.5")
    assert code == 0
    assert model.read_bytes() == before
    assert {p.name for p in Path().iterdir()} == {
        "data.npz",
        "model.pt",
        "model-pruned.pt",
        "model-pruned.json",
        "model-pruned.svg",
    }
    record = json.loads(Path("model-pruned.json").read_text())
    pruned = morph.open_model("model-pruned.pt")
    assert sum(p.numel() for p in pruned.model.parameters()) == record["params_after"]
    assert f"parameters     {record['params_before']:,} -> {record['params_after']:,}\n" in out
    row = record["couplings"][0]
    assert f"{row['units_before']} -> {row['units_after']}" in out
    assert "form           the model's own class" in out
    assert "never cut      output of the model" in out
    assert "check          zeroing reference: max |difference|" in out
    assert "zeros where its readers saw what was cut" in out
    drawn = Path("model-pruned.svg").read_text()
    assert f"{row['units_before']} → {row['units_after']}" in drawn
    assert main(["apply", "model-pruned.json", "model.pt", "--out", "again.pt"]) == 0
    one, two = pruned.model.state_dict(), morph.open_model("again.pt").model.state_dict()
    assert list(one) == list(two)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("metric", ["params", "macs"])
def test_targets_are_met_and_the_distance_is_told(capsys, model, metric):
    target = {"params": "100K", "macs": "15M"}[metric]
    code, out, _ = run(capsys, f"--target-{metric}", target, "--json", "--dry-run", "--local", "--steps", "2")
    assert code == 0
    record = json.loads(out)
    assert record["written"] == []
    assert record["target_metric"] == metric
    assert record[f"{metric}_after"] - record["target"] == record["distance"] <= 0
    assert record["options"]["steps"] == 2
    assert len(record["checks"]) == 2


def test_options_reach_the_pruning(capsys, model):
    options = ["--ratio", "0.4", "--score", "l1", "--multiple", "4", "--minimum", "3", "--normalise", "none"]
    ignored = ["--ignore", "stem.*", "--ignore", "groups.2.*", "--heads", "both", "--form", "graph", "--seed", "7"]
    code, out, _ = run(capsys, *options, *ignored, "--no-verify", "--json", "--dry-run")
    assert code == 0
    record = json.loads(out)
    assert record["checks"] == []
    assert "not verified" in record["verified"]
    assert record["form"] == "graph"
    asked = record["options"]
    assert (asked["score"], asked["multiple"], asked["minimum"], asked["normalise"]) == ("l1", 4, 3, None)
    assert (asked["heads"], asked["form"], asked["seed"]) == ("both", "graph", 7)
    assert asked["ignore"] == ["stem.*", "groups.2.*"]
    after = {row["name"]: (row["units_before"], row["units_after"]) for row in record["couplings"]}
    assert after["stem.weight[0]"] == (16, 16)
    assert all(n % 4 == 0 for _, n in after.values())
    assert any(n < m for m, n in after.values())


@pytest.mark.parametrize("score", ["taylor", "fisher"])
def test_scores_that_look_at_data(capsys, model, score):
    arguments = ["--ratio", "0.3", "--score", score, "--data", "data.npz", "--batch-size", "4", "--json", "--dry-run"]
    one, three = (json.loads(run(capsys, *arguments, "--probe-batches", n)[1]) for n in ("1", "3"))
    assert one["environment"]["data"]["batch_size"] == 4
    assert (one["environment"]["data"]["probe_batches"], three["environment"]["data"]["probe_batches"]) == (1, 3)
    units = [[row["units_after"] for row in record["couplings"]] for record in (one, three)]
    assert units[0] != units[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ratio", "0.3", "--data", "data.npz"), "--data means nothing to --score l2, which looks at no data"),
        (("--ratio", "0.3", "--probe-batches", "3"), "--probe-batches means nothing to --score l2"),
        (("--target-params", "10"), "target_params 10 is out of reach: at least"),
        (("--target-params", "1G"), "the target of 1,000,000,000 params is not below the present "),
        (("--ratio", "0.3", "--out", "x.json"), "x.json: give a name that ends in .pt, since .json and .svg are taken"),
        (("--ratio", "0.3", "--out", "no/x.pt"), "no/x.pt: the folder no does not exist"),
        (("--ratio", "0.3", "--score", "fisher", "--data", "none.npz"), "none.npz: there is no such file or folder"),
        (("--ratio", "0.3", "--input", "4x32x32"), "does not accept inputs of shape"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_file(capsys, model, arguments, message):
    assert message in bad(capsys, *arguments)


def test_files_that_exist_stay_unless_forced(capsys, model):
    Path("model-pruned.svg").write_text("mine")
    assert "model-pruned.svg: exists already" in bad(capsys, "--ratio", "0.3")
    assert Path("model-pruned.svg").read_text() == "mine"
    assert run(capsys, "--ratio", "0.3", "--force")[0] == 0
    assert Path("model-pruned.svg").read_text() != "mine"


@pytest.mark.parametrize("text", ["1", "-0.1", "half", "nan"])
def test_shares_that_are_not(capsys, text):
    with pytest.raises(SystemExit) as caught:
        main(["prune", "model.pt", f"--ratio={text}"])
    assert caught.value.code == 2
    assert "is not a share of the units from 0 to below 1" in capsys.readouterr().err


def test_a_target_is_needed(capsys):
    with pytest.raises(SystemExit):
        main(["prune", "model.pt"])
    assert "one of the arguments --ratio --target-params --target-macs is required" in capsys.readouterr().err


def test_no_torch_for_help():
    script = "import sys\nfrom morph.cli.main import build_parser\nbuild_parser()\nprint('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "False\n"


def texts(rows: list[UnitRow]) -> list[list[str]]:
    """The labels of each column of the picture."""
    figure = units_figure(rows, title="t")
    figure.canvas.draw()
    return [[label.get_text() for label in axes.get_yticklabels()] for axes in figure.axes]


def test_the_picture_puts_blocks_under_headings_and_repeats_them_in_the_next_column():
    rows = [UnitRow("stem.weight[0]", 16, 8)]
    rows += [UnitRow(f"cells.{c}.ops.{i}.weight[0]", 16, 16 - i) for c in range(4) for i in range(30)]
    columns = texts(rows)
    assert columns[0][:3] == ["stem", "cells.0", "    ops.0"]
    assert len(columns) == 3
    assert max(map(len, columns)) <= 48
    for column in columns:
        assert not column[0].startswith(" ")
        assert column[-1].startswith(" ")
    shown = [text for column in columns for text in column if text.startswith(" ")]
    assert len(shown) == 120


def test_a_row_knows_whether_it_grew():
    cut, kept, grown = UnitRow("a", 8, 4), UnitRow("b", 8, 8), UnitRow("c", 4, 8)
    merged = UnitRow("cells.0 groups", 16, 4, inverse=True)
    assert (cut.share, grown.share, merged.share) == (0.5, 2.0, 4.0)
    assert merged.colour == grown.colour
    assert len({cut.colour, kept.colour, grown.colour}) == 3
