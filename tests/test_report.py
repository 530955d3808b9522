from __future__ import annotations

import argparse
import csv
import io
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import morph.files
from morph.cli import report as command
from morph.counts import Counts, ModuleCount, count
from morph.errors import OutputError
from morph.report import ABSENT, Report, Row, ratio


def tower(width: int, *, blocks: int = 2, extra: bool = False) -> nn.Sequential:
    model = nn.Sequential()
    model.add_module("stem_in", nn.Conv2d(3, width, 3))
    model.add_module("act", nn.ReLU())
    body = nn.Sequential(*(nn.Sequential(nn.Conv2d(width, width, 1), nn.BatchNorm2d(width)) for _ in range(blocks)))
    model.add_module("body", body)
    if extra:
        model.add_module("gate", nn.Conv2d(width, width, 1, bias=False))
    model.add_module("flat", nn.Flatten())
    model.add_module("head", nn.Linear(width * 25, 5))
    return model


X = torch.zeros(2, 3, 7, 7)
ONE, OTHER = count(tower(7), X), count(tower(11, blocks=3, extra=True), X)


def test_rows_of_one_model_follow_the_tree_to_the_depth():
    assert [row.path for row in Report(ONE, depth=1).rows] == ["", "stem_in", "act", "body", "flat", "head"]
    assert [row.path for row in Report(ONE).rows if row.path.startswith("body")] == ["body", "body.0", "body.1"]
    everything = Report(ONE, depth=0).rows
    assert [row.path for row in everything] == [path for path, _ in tower(7).named_modules()]
    assert all(row.one == ONE.by_module[row.path] and row.other is None for row in everything)
    assert [row.level for row in everything[:5]] == [0, 1, 1, 1, 2]


def test_rows_of_two_models_are_matched_by_path():
    rows = {row.path: row for row in Report(ONE, OTHER, depth=0).rows}
    assert set(rows) == set(ONE.by_module) | set(OTHER.by_module)
    for path, row in rows.items():
        assert (row.one, row.other) == (ONE.by_module.get(path), OTHER.by_module.get(path))
    order = list(rows)
    assert order.index("body.1.1") < order.index("body.2") < order.index("body.2.0") < order.index("flat")
    assert order.index("gate") > order.index("head")
    assert rows["gate"].one is None
    assert {row.path for row in Report(OTHER, ONE, depth=0).rows if row.other is None} == {
        "gate", "body.2", "body.2.0", "body.2.1",
    }  # fmt: skip


def test_cells_of_one_model():
    cells = Report(ONE, names=("tower", "")).cells
    assert Report(ONE).header == ["module", "type", "params", "multiply-adds", "share"]
    assert cells[0] == ["total", "Sequential", f"{ONE.params:,}", f"{ONE.macs:,}", "100.0%"]
    assert cells[1] == ["  stem_in", "Conv2d", "196", "4,725", f"{4725 / ONE.macs:.1%}"]
    assert [row[0] for row in cells] == ["total", "  stem_in", "  body", "    0", "    1", "  head"]


def test_cells_of_two_models():
    report = Report(ONE, OTHER)
    cells = {row[0].strip(): row[1:] for row in report.cells}
    assert len(report.header) == len(report.cells[0]) == 7
    assert cells["stem_in"] == ["196", "308", "1.571", "4,725", "7,425", "1.571"]
    assert cells["gate"] == [ABSENT, "121", ABSENT, ABSENT, "3,025", ABSENT]
    assert cells["total"][2] == f"{OTHER.params / ONE.params:.3f}"
    assert Row("x", ModuleCount(1, 1, "Conv2d"), ModuleCount(1, 1, "Linear")).type == "Conv2d / Linear"


def test_ratio():
    assert ratio(4, 2) == 0.5
    assert ratio(4, 2) != ratio(2, 4)
    assert ratio(0, 2) is ratio(None, 2) is ratio(2, None) is None


def test_notes_state_the_convention_and_what_is_not_in_the_table():
    notes = Report(ONE, names=("tower", "")).notes()
    text = "\n".join(notes)
    assert notes[0].startswith("1 multiply-add = 1, per sample")
    assert "Input 3x7x7; counted by fvcore; torch.utils.flop_counter counts the same." in notes
    assert f"{ONE.params:,} parameters, {ONE.params:,} of them trainable; 30 values in buffers." in notes
    assert f"Not in the multiply-adds: batch_norm {ONE.elementwise['batch_norm']:,} operations." in notes
    assert "no parameters and no multiply-adds: 2 modules." in text
    pair = Report(ONE, OTHER, ("small", "big")).notes()
    assert "ratio = other / first; first: small; other: big." in pair
    assert any(note.startswith("big: input 3x7x7; ") for note in pair)


def test_notes_tell_of_disagreement_idle_modules_and_skipped_operators():
    leaf, idle = ModuleCount(5, 7, "Linear"), ModuleCount(3, 0, "Head")
    modules = {"": ModuleCount(8, 7, "Net"), "fc": leaf, "aux": idle, "aux.0": idle, "drop": ModuleCount(0, 0, "D")}
    skipped = {"aten::lstm": 2, "aten::add": 1}
    counts = Counts(
        8, 8, 0, 7, {}, modules, skipped, ("aux", "aux.0", "drop"), 6, "in fc they differ", "fvcore", ((3,), ())
    )  # fmt: skip
    notes = Report(counts).notes()
    assert "Input 3, one number; counted by fvcore; in fc they differ." in notes
    assert "Not counted at all: add, lstm." in notes
    assert "Not run in evaluation mode, though its parameters are counted: aux (3 parameters)." in notes


def test_markdown():
    lines = Report(ONE, names=("tower", "")).to_markdown().splitlines()
    assert lines[0] == "| module | type | params | multiply-adds | share |"
    assert lines[1] == "| :-- | :-- | --: | --: | --: |"
    assert lines[3] == f"| &nbsp;&nbsp;stem\\_in | Conv2d | 196 | 4,725 | {4725 / ONE.macs:.1%} |"
    assert lines[2 + len(Report(ONE).cells)] == ""
    assert lines[-1].startswith("- ")
    two = Report(ONE, OTHER).to_markdown().splitlines()
    assert {line.count("|") for line in two if line.startswith("|")} == {8}


def test_csv_holds_bare_numbers_and_all_rows():
    rows = list(csv.DictReader(io.StringIO(Report(ONE, OTHER, depth=0).to_csv())))
    assert [row["path"] for row in rows] == [row.path for row in Report(ONE, OTHER, depth=0).rows]
    total = rows[0]
    assert (int(total["params"]), int(total["macs"])) == (ONE.params, ONE.macs)
    assert float(total["macs_ratio"]) == OTHER.macs / ONE.macs
    gate = next(row for row in rows if row["path"] == "gate")
    assert (gate["params"], gate["other_params"], gate["params_ratio"]) == ("", "121", "")
    alone = Report(ONE).to_csv()
    assert alone.splitlines()[0] == "path,type,params,macs"
    assert "act,ReLU,0,0" in alone.splitlines()


def test_json_holds_both_models():
    document = json.loads(Report(ONE, OTHER, ("small", "big"), depth=1).to_json())
    assert (document["schema"], document["depth"], document["model"]) == (1, 1, "small")
    assert (document["params"], document["macs"], document["second"]) == (ONE.params, ONE.macs, ONE.second)
    assert document["difference"] is None
    assert document["input_shapes"] == [[3, 7, 7]]
    assert [module["path"] for module in document["modules"]] == ["", "stem_in", "act", "body", "flat", "head"]
    assert document["modules"][1] == {"path": "stem_in", "type": "Conv2d", "params": 196, "macs": 4725}
    assert document["other"]["macs"] == OTHER.macs
    assert document["other"]["model"] == "big"
    assert document["params_ratio"] == OTHER.params / ONE.params
    assert document["macs_ratio"] == OTHER.macs / ONE.macs
    assert "other" not in Report(ONE).document()


@pytest.fixture
def models(monkeypatch):
    """Let the command open two towers by name."""

    def open_model(source, *, arch=None, trust=(), allow_code=False):
        model = {"small": tower(7), "big": tower(11, blocks=3, extra=True), "half": tower(7).double()}[source]
        shape = None if source == "big" else (3, 7, 7)
        return SimpleNamespace(model=model, source=source, kind="zoo", arch=arch, input_shape=shape)

    monkeypatch.setattr(morph.files, "open_model", open_model, raising=False)


def run(*argv: object) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(arg) for arg in argv]))


@pytest.mark.usefixtures("models")
def test_command_prints_a_table_with_its_notes(capsys):
    assert run("small", "big", "--depth", "1") == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == "small and big"
    assert lines[1].split() == ["module", "params", "other", "ratio", "multiply-adds", "other", "ratio"]
    assert lines[3].startswith("  stem_in")
    assert "1 multiply-add = 1" in out
    assert all(len(line) <= 100 for line in lines)
    assert err == ""
    assert run("half") == 0
    assert "counts the same" in capsys.readouterr().out


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize(
    ("flags", "start"), [(["--json"], "{"), (["--format", "csv"], "path,"), (["--format", "markdown"], "| module")]
)
def test_command_prints_each_format(flags, start, capsys):
    assert run("small", *flags) == 0
    out, _ = capsys.readouterr()
    assert out.startswith(start)
    assert out.endswith("\n")
    assert not out.endswith("\n\n")


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize(
    ("name", "start"), [("a.csv", "path,"), ("a.json", "{"), ("a.md", "| module"), ("a.txt", "| module")]
)
def test_command_writes_what_the_suffix_says(name, start, tmp_path, capsys):
    path = tmp_path / name
    assert run("small", "--out", path) == 0
    assert path.read_text().startswith(start)
    assert capsys.readouterr() == ("", f"written: {path}\n")
    kept = path.read_bytes()
    with pytest.raises(OutputError, match="exists already"):
        run("big", "--input", "3x7x7", "--out", path)
    assert path.read_bytes() == kept
    assert run("big", "--input", "3x7x7", "--out", path, "--force") == 0
    assert path.read_bytes() != kept


@pytest.mark.usefixtures("models")
def test_command_refuses_what_makes_no_sense(tmp_path, capsys):
    with pytest.raises(OutputError, match=r"a table is for the terminal; write --format markdown, csv or json"):
        run("small", "--format", "table", "--out", tmp_path / "a.md")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SystemExit):
        run("small", "--depth", "-1")
    assert "'-1' is no depth; give 0 for all levels, or a number of levels" in capsys.readouterr().err
