from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import Net, randomise
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import morph.checkpoints as checkpoints
from morph.checkpoints import edit_checkpoint
from morph.cli.main import main
from morph.cut import apply_plan
from morph.errors import CheckFailedError, EditError, ModelFileError, OutputError, PlanMismatchError
from morph.plan import Deepen, Perturb, Plan, Record, Regroup, Reinitialise, Resize, SetAttribute, UseGraph

PLAN = Plan(
    (
        Regroup("blocks.1.mix", 6, 2, (30, 5, 3, 3)),
        Resize("head.weight", 0, 7, (6, 0, 0, 3), (1.0, 0.5, 0.5, 1.0)),
        Resize("head.weight", 1, 30, (*range(29), 28, 28)),
        Resize("head.bias", 0, 7, (6, 0, 0, 3), (1.0, 0.5, 0.5, 1.0)),
        Regroup("blocks.2.mix", 10, 1, (30, 3, 3, 3)),
    )
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "student.safetensors"
    save_file(randomise(Net()).state_dict(), path, {"format": "pt", "mine": "kept"})
    return path


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return sorted(a) == sorted(b) and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("chunk", [1 << 24, 200])
def test_the_file_is_what_the_edited_model_would_have_saved(file, tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(checkpoints, "_CHUNK", chunk)
    before = file.read_bytes()
    done = edit_checkpoint(PLAN, file, tmp_path / "new.safetensors")
    expected = apply_plan(randomise(Net()), PLAN).state_dict()
    got = load_file(tmp_path / "new.safetensors")
    assert same(got, expected)
    assert not same(got, apply_plan(randomise(Net()), Plan(PLAN.edits[:-1])).state_dict())
    assert file.read_bytes() == before
    assert (done.tensors, done.edited) == (len(expected), 4)
    assert done.elements_after == sum(t.numel() for t in expected.values())
    assert done.elements_before == sum(t.numel() for t in load_file(file).values())
    with safe_open(file, "pt") as old, safe_open(tmp_path / "new.safetensors", "pt") as new:
        assert list(new.offset_keys()) == list(old.offset_keys())
        metadata = new.metadata()
    assert (metadata["format"], metadata["mine"]) == ("pt", "kept")
    assert metadata["morph"].startswith("5 edits of the plan with sha256 ")


TYPES = ["float64", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8", "int64", "bool", "uint8"]


@pytest.mark.parametrize("name", TYPES)
def test_types_stay(tmp_path, name):
    dtype = getattr(torch, name)
    values = torch.randint(0, 100, (7, 5, 3)).to(dtype)
    save_file(
        {"a": values, "scalar": torch.ones((), dtype=dtype), "empty": torch.zeros(0, 4).to(dtype)},
        tmp_path / "x.safetensors",
    )
    plan = Plan((Resize("a", 1, 5, (4, 0, 0)), Resize("a", 2, 3, (2, 1, 0, 2)), Resize("empty", 1, 4, (0, 1))))
    edit_checkpoint(plan, tmp_path / "x.safetensors", tmp_path / "y.safetensors")
    got = load_file(tmp_path / "y.safetensors")
    assert got["a"].dtype == dtype
    assert torch.equal(got["a"].double(), values.double()[:, [4, 0, 0]][:, :, [2, 1, 0, 2]])
    assert got["empty"].shape == (0, 2)
    assert torch.equal(got["scalar"].double(), torch.ones((), dtype=torch.float64))


def test_factors_need_numbers_with_a_fraction(tmp_path):
    halves = Plan((Resize("a", 0, 3, (0, 0, 1, 2), (0.5, 0.5, 1.0, 1.0)),))
    values = torch.tensor([1.0, 2.0, 3.0])
    save_file({"a": values.to(torch.float8_e5m2)}, tmp_path / "x.safetensors")
    edit_checkpoint(halves, tmp_path / "x.safetensors", tmp_path / "y.safetensors")
    assert load_file(tmp_path / "y.safetensors")["a"].double().tolist() == [0.5, 0.5, 2, 3]
    save_file({"a": values.to(torch.int32)}, tmp_path / "x.safetensors")
    with pytest.raises(EditError, match="a: is of type I32, and a factor on it would not be exact"):
        edit_checkpoint(halves, tmp_path / "x.safetensors", tmp_path / "z.safetensors")


def test_numbers_of_half_a_byte_are_copied_and_not_edited(tmp_path):
    header = {
        "a": {"dtype": "F4", "shape": [2, 4], "data_offsets": [0, 4]},
        "b": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(range(8)))
    edit_checkpoint(Plan((Resize("b", 0, 4, (3, 1)),)), path, tmp_path / "y.safetensors")
    assert (tmp_path / "y.safetensors").read_bytes()[-6:] == bytes([0, 1, 2, 3, 7, 5])
    with pytest.raises(EditError, match="a: is of type F4, several numbers in a byte, and cannot be edited"):
        edit_checkpoint(Plan((Resize("a", 0, 2, (0,)),)), path, tmp_path / "z.safetensors")


def test_the_name_that_a_tied_weight_has_in_the_file_is_found(tmp_path):
    weight = torch.randn(5, 3)
    save_file({"embed.weight": weight}, tmp_path / "x.safetensors", {"head.weight": "embed.weight"})
    one, other = Resize("head.weight", 1, 3, (2, 0)), Resize("embed.weight", 1, 3, (2, 0))
    for i, edits in enumerate([(one,), (other,), (one, other)]):
        edit_checkpoint(Plan(edits), tmp_path / "x.safetensors", tmp_path / f"y{i}.safetensors")
        assert torch.equal(load_file(tmp_path / f"y{i}.safetensors")["embed.weight"], weight[:, [2, 0]])


def test_a_plan_for_another_model_is_refused(file, tmp_path):
    out = tmp_path / "new.safetensors"
    gone = [Resize(f"gone{i}.weight", 0, 7, (0,)) for i in range(4)]
    with pytest.raises(
        PlanMismatchError,
        match=r"another checkpoint: 5 of 6 edits do not fit \(head.bias: plan has size 8 on axis 0, found shape \[7\]; "
        r"gone0.weight: plan has size 7 on axis 0, found no such tensor; gone1.weight[^;]*\)$",
    ):
        edit_checkpoint(Plan((Resize("head.bias", 0, 8, (0,)), PLAN.edits[0], *gone)), file, out)
    with pytest.raises(PlanMismatchError, match=r"head.bias: plan has size 7"):
        edit_checkpoint(Plan((Resize("head.bias", 0, 7, (0, 7)),)), file, out)
    assert not out.exists()
    edit_checkpoint(PLAN, file, out)
    with pytest.raises(PlanMismatchError, match=r"5 of 5 edits .* applied already: start from the original checkpoint"):
        edit_checkpoint(PLAN, out, tmp_path / "twice.safetensors")
    turn = Plan((Resize("head.bias", 0, 7, (6, 5, 4, 3, 2, 1, 0)),))
    edit_checkpoint(turn, file, out, force=True)
    with pytest.raises(PlanMismatchError, match="says that this plan was applied to it already"):
        edit_checkpoint(turn, out, tmp_path / "twice.safetensors")
    edit_checkpoint(Plan(PLAN.edits[:1]), out, out, force=True)
    with safe_open(out, "pt") as new:
        assert new.metadata()["morph"].count("sha256") == 2


def test_edits_that_need_the_model_are_refused(file, tmp_path):
    plan = Plan((Reinitialise(0), Deepen("blocks", ("1",), 1, (), 3, 0), Perturb("a", 0, 3, (1,), 0.1, 0)))
    with pytest.raises(EditError, match="kind deepen, perturb, reinitialise make new weights and need the model"):
        edit_checkpoint(plan, file, tmp_path / "new.safetensors")


def test_groups_that_cannot_be_split_exactly(file, tmp_path):
    plan = Plan((Regroup("blocks.1.mix", 1, 5, (30, 5, 3, 3)),))
    with pytest.raises(EditError, match=r"1 groups cannot become 5: .* are not zero"):
        edit_checkpoint(plan, file, tmp_path / "new.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == [file.name]


def test_damaged_and_missing_files(file, tmp_path):
    out = tmp_path / "new.safetensors"
    short = tmp_path / "short.safetensors"
    for cut in (0, 5, 300, file.stat().st_size - 1):
        short.write_bytes(file.read_bytes()[:cut])
        with pytest.raises(ModelFileError, match=r"short.safetensors: damaged, cut short, or not a safetensors file"):
            edit_checkpoint(PLAN, short, out)
    with pytest.raises(ModelFileError, match=r"none.safetensors: no such file, or it cannot be read"):
        edit_checkpoint(PLAN, tmp_path / "none.safetensors", out)
    out.write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        edit_checkpoint(PLAN, file, out)
    assert out.read_text() == "mine"


def test_a_file_that_is_not_whole_is_not_kept(file, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "_copy", lambda reader, entry, writer: None)
    with pytest.raises(CheckFailedError, match=r"new.safetensors: the new file is not whole .*; it was not kept"):
        edit_checkpoint(PLAN, file, tmp_path / "new.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == [file.name]


def save_shards(folder: Path) -> dict[str, torch.Tensor]:
    state = randomise(Net()).state_dict()
    names = list(state)
    folder.mkdir()
    parts = {"model-1-of-2.safetensors": names[:9], "model-2-of-2.safetensors": names[9:]}
    for file, some in parts.items():
        save_file({name: state[name] for name in some}, folder / file, {"format": "pt"})
    size = sum(t.numel() * t.element_size() for t in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": {n: f for f, some in parts.items() for n in some}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    return state


def test_a_checkpoint_in_several_files(tmp_path):
    state = save_shards(tmp_path / "old")
    done = edit_checkpoint(PLAN, tmp_path / "old", tmp_path / "new")
    expected = apply_plan(randomise(Net()), PLAN).state_dict()
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    got = {n: load_file(tmp_path / "new" / f)[n] for n, f in index["weight_map"].items()}
    assert same(got, expected)
    assert not same(got, state)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in expected.values())
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == sorted(p.name for p in done.files)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "old"]
    with pytest.raises(OutputError, match="needs the name of a new folder"):
        edit_checkpoint(PLAN, tmp_path / "old", tmp_path / "new", force=True)
    with pytest.raises(OutputError, match=r"the folder .*absent does not exist"):
        edit_checkpoint(PLAN, tmp_path / "old", tmp_path / "absent" / "new")


def test_a_checkpoint_in_several_files_that_is_not_whole(tmp_path):
    save_shards(tmp_path / "old")
    index = tmp_path / "old" / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    for bad, message in [
        ("{", "not a JSON document"),
        ("[]", "weight_map must map tensors to files beside it"),
        ('{"weight_map": {"a": "../other.safetensors"}}', "weight_map must map tensors to files beside it"),
        ('{"weight_map": {"a": "none.safetensors"}}', "none.safetensors: no such file"),
        (json.dumps({"weight_map": {**good["weight_map"], "new": "model-1-of-2.safetensors"}}), r"1 tensors .*\(new\)"),
    ]:
        index.write_text(bad)
        with pytest.raises(ModelFileError, match=message):
            edit_checkpoint(PLAN, index, tmp_path / "new")
    index.unlink()
    with pytest.raises(ModelFileError, match=r"model.safetensors.index.json: No such file"):
        edit_checkpoint(PLAN, index, tmp_path / "new")
    with pytest.raises(ModelFileError, match="old: holds 2 safetensors checkpoints"):
        edit_checkpoint(PLAN, tmp_path / "old", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_failure_half_way_leaves_nothing(tmp_path, monkeypatch):
    save_shards(tmp_path / "old")
    monkeypatch.setattr(Path, "rename", lambda self, target: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OutputError, match="new: not written: No space left"):
        edit_checkpoint(PLAN, tmp_path / "old", tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["old"]


PEAK = """
import sys
from pathlib import Path
from safetensors.torch import load_file
from morph.checkpoints import edit_checkpoint
from morph.plan import Plan, Resize

def kib(key):
    return int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1])

n = 2560
copies = tuple(range(0, n, 2)) + tuple(range(n // 2))
edits = [Resize(f"t{i}", i % 2, n, copies, (0.5,) * n) for i in range(5)] + [Resize("t5", 0, n, copies)]
before = kib("VmRSS")
edit_checkpoint(Plan(tuple(edits)), Path(sys.argv[1]), Path(sys.argv[2]))
print((kib("VmHWM") - before) / 1024)
whole = load_file(sys.argv[1])
assert sum(float(t.sum()) for t in whole.values()) > 0
print((kib("VmHWM") - before) / 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures memory as Linux reports it")
def test_memory_is_that_of_about_one_tensor(tmp_path):
    """262 MB in ten tensors."""
    base = torch.ones(2560, 2560)
    save_file({f"t{i}": base + i for i in range(10)}, tmp_path / "x.safetensors")
    command = [sys.executable, "-c", PEAK, str(tmp_path / "x.safetensors"), str(tmp_path / "y.safetensors")]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    edited, loaded = map(float, out.split())
    assert edited < 100
    assert loaded > 200  # the measure sees a file that is loaded
    with safe_open(tmp_path / "y.safetensors", "pt") as new:
        assert torch.equal(new.get_tensor("t3"), (base + 3) / 2)
        assert torch.equal(new.get_tensor("t9"), base + 9)


def save_record(path: Path, plan: Plan) -> None:
    Record("widen", {}, plan, {"params": 1, "macs": 1}, {"params": 1, "macs": 1}, ()).save(path)


def test_the_command(file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_record(tmp_path / "record.json", Plan((*PLAN.edits, SetAttribute("head", "out_features", 7, 4))))
    assert main(["apply", "record.json", "student.safetensors"]) == 0
    out, err = capsys.readouterr()
    assert "4 of 31 tensors edited" in out
    assert "the model has to be built with head.out_features: 7 -> 4" in out
    assert "written: student-applied.safetensors" in out
    assert "not verified: no model was built" in err
    assert same(load_file("student-applied.safetensors"), apply_plan(randomise(Net()), PLAN).state_dict())
    assert main(["apply", "record.json", "student-applied.safetensors"]) == 2
    assert "looks applied already" in capsys.readouterr().err
    assert main(["apply", "record.json", "student.safetensors", "--out", "b.safetensors", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["edited"], document["written"]) == (4, ["b.safetensors"])
    assert main(["apply", "record.json", "none.safetensors"]) == 2
    assert "no such file" in capsys.readouterr().err


def test_the_command_on_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_shards(tmp_path / "old")
    save_record(tmp_path / "record.json", Plan((UseGraph("symbolic"), *PLAN.edits)))
    assert main(["apply", "record.json", "old"]) == 0
    out = capsys.readouterr().out
    assert "the traced graph in place of the class, 0 constants" in out
    assert len(list((tmp_path / "old-applied").iterdir())) == 3
    (tmp_path / "empty").mkdir()
    assert main(["apply", "record.json", "empty"]) == 2
    assert "holds 0 safetensors checkpoints (none)" in capsys.readouterr().err
