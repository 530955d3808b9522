"""Conversion between file formats."""

import argparse
import copy
import errno
import json
import os
import resource
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import onnx
import pytest
import torch
import torchvision
from safetensors.torch import load_file, load_model
from torch import Tensor, nn

from morph import zoo
from morph.cli import convert as command
from morph.cli.model_arguments import add_model, input_shape_from, open_from
from morph.errors import CheckFailedError, ModelFileError, OutputError, TraceError
from morph.files import OpenedModel
from morph.files import convert as converter
from morph.files.convert import FORMATS, convert

TENSORS, PROGRAMS = ("state-dict", "safetensors"), ("torch-export", "onnx")


def randomise(model: nn.Module) -> nn.Module:
    """Give every BatchNorm values that no default hides, and mix the train flags."""
    generator = torch.Generator().manual_seed(4)
    for i, module in enumerate(model.modules()):
        module.training = i % 3 > 0
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias.data):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
            for tensor in (module.running_var, module.weight.data):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    torch.manual_seed(0)
    return {
        "wrn": (randomise(zoo.build("wrn-16-2")), (3, 32, 32)),
        "darts": (randomise(zoo.build("darts-10")), (3, 32, 32)),
        "resnet18": (randomise(torchvision.models.resnet18(weights=None, num_classes=7)), (3, 64, 64)),
    }


@pytest.fixture
def small() -> nn.Module:
    torch.manual_seed(1)
    stem, classifier = nn.Conv2d(3, 64, 3, stride=2), nn.Linear(64, 7)
    layers = {"stem": stem, "bn": nn.BatchNorm2d(64), "relu": nn.ReLU(), "pool": nn.AdaptiveAvgPool2d(1)}
    return randomise(nn.Sequential(OrderedDict(layers | {"flatten": nn.Flatten(), "classifier": classifier})))


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).eval()(x)


def fingerprint(model: nn.Module) -> tuple[list[object], dict[str, Tensor]]:
    """All that must not change: train flags, hooks, gradients' absence, and every tensor."""
    facts = [(n, m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()]
    facts += [(n, p.requires_grad, p.grad is None, p.data_ptr()) for n, p in model.named_parameters()]
    return facts, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: tuple[list[object], dict[str, Tensor]], b: tuple[list[object], dict[str, Tensor]]) -> bool:
    return a[0] == b[0] and a[1].keys() == b[1].keys() and all(torch.equal(t, b[1][n]) for n, t in a[1].items())


def reopen(file: Path, to: str, model: nn.Module, x: Tensor) -> Tensor:
    """Open a file the way its user would, and run it."""
    if to == "onnx":
        (array,) = onnx.reference.ReferenceEvaluator(str(file)).run(None, {"input": x.numpy()})
        return torch.from_numpy(array)
    if to == "torch-export":
        return torch.export.load(file).module()(x)
    if to == "module":
        return outputs(torch.load(file, weights_only=False), x)
    if to == "morph":
        from morph.files import open_model

        return outputs(open_model(file).model, x)
    fresh = copy.deepcopy(model)
    for tensor in fresh.state_dict().values():
        tensor.zero_()
    if to == "safetensors":
        load_model(fresh, file)
    else:
        fresh.load_state_dict(torch.load(file, weights_only=True))
    return outputs(fresh, x)


def check_program(file: Path, to: str) -> None:
    """One input with a free batch axis, one output, all weights inside, and nothing of an auxiliary head."""
    if to == "torch-export":
        nodes = torch.export.load(file).graph.nodes
        assert len(next(node for node in nodes if node.op == "output").args[0]) == 1
        weights = [node.name for node in nodes if node.op == "placeholder" and node.users]
    else:
        graph = onnx.load(file).graph
        assert [value.name for value in graph.output] == ["output"]
        assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
        assert all(tensor.data_location == onnx.TensorProto.DEFAULT for tensor in graph.initializer)
        weights = [tensor.name for tensor in graph.initializer]
    assert len(weights) > 20
    assert not [name for name in weights if "auxiliary" in name]


SLOW = [pytest.param(name, to, marks=pytest.mark.slow) for name, to in [("darts", "torch-export"), ("darts", "onnx")]]
QUICK = [(name, to) for name in ("wrn", "darts", "resnet18") for to in FORMATS if name != "darts" or to not in PROGRAMS]


@pytest.mark.parametrize(("name", "to"), [*QUICK, *SLOW])
def test_round_trip(name: str, to: str, models, tmp_path, capfd) -> None:
    model, shape = models[name]
    before, random_state, file = fingerprint(model), torch.get_rng_state(), tmp_path / "converted.pt2"
    done = convert(model, file, to, input_shape=shape)
    assert same(fingerprint(model), before)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert capfd.readouterr() == ("", "")
    assert os.listdir(tmp_path) == ["converted.pt2"]
    assert (done.path, done.format, done.bytes) == (file, to, file.stat().st_size)
    x = torch.randn(5 if to == "onnx" else 1, *shape, generator=torch.Generator().manual_seed(9))
    expected = outputs(model, x)
    got = reopen(file, to, model, x)
    if to in PROGRAMS:
        check_program(file, to)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    else:
        assert torch.equal(got, expected)
    assert got.std() > 0
    assert done.checked
    assert (done.max_difference is None) == (to in TENSORS)
    assert not done.max_difference or done.max_difference < 1e-4 * expected.abs().max()


class Tied(nn.Module):
    """Two layers with one weight, a buffer, and several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.tensor([1.5, float("nan")]))

    def forward(self, x: Tensor) -> dict[str, object]:
        y = self.first(x)
        return {"a": y, "b": (self.second(y), [y.argmax(1)])}


@pytest.mark.parametrize("to", ["module", "state-dict", "safetensors", "torch-export", "onnx"])
def test_tied_tensors_and_nested_outputs(to: str, tmp_path) -> None:
    model = Tied()
    done = convert(model, tmp_path / "tied.bin", to, input_shape=(5,))
    assert done.checked
    if to == "safetensors":
        stored = load_file(done.path)
        assert ("first.weight" in stored) != ("second.weight" in stored)
        assert torch.equal(stored.get("first.weight", stored.get("second.weight")), model.first.weight)
    if to == "onnx":
        assert [v.name for v in onnx.load(done.path).graph.output] == ["output_0", "output_1", "output_2"]


def test_double_precision(small, tmp_path) -> None:
    model = small.double()
    done = convert(model, tmp_path / "a.onnx", "onnx", input_shape=(3, 32, 32), opset=20)
    assert done.max_difference < 1e-12
    assert onnx.load(done.path).opset_import[0].version == 20


def test_without_a_shape_tensors_are_still_compared(small, tmp_path) -> None:
    done = convert(small, tmp_path / "a.pt", "module", input_shape=None)
    assert done.max_difference is None
    assert done.checked == (f"{len(small.state_dict())} tensors are equal bit for bit",)


@pytest.mark.parametrize("to", list(FORMATS))
def test_a_full_disk_costs_no_file(to: str, small, tmp_path, monkeypatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        Path(next(tmp_path.glob(".*"))).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for writer in ("torch.save", "torch.export.save", "torch.onnx.ONNXProgram.save"):
        monkeypatch.setattr(writer, fail)
    monkeypatch.setattr(converter, "save_safetensors", fail)
    file = tmp_path / "a.bin"
    file.write_bytes(b"old")
    before = fingerprint(small)
    with pytest.raises(OutputError, match=r"a\.bin.*No space left on device") as caught:
        convert(small, file, to, input_shape=(3, 32, 32), force=True)
    assert "\n" not in str(caught.value)
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]
    assert same(fingerprint(small), before)


@pytest.mark.parametrize("to", list(FORMATS))
def test_a_real_limit_on_file_size_costs_no_file(to: str, small, tmp_path) -> None:
    file = tmp_path / "a.bin"
    file.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, hard))
    try:
        with pytest.raises(OutputError, match=r"a\.bin") as caught:
            convert(small, file, to, input_shape=(3, 32, 32), force=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert to == "morph" or "File too large" in str(caught.value)
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_existing_files_are_kept(small, tmp_path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"old")
    with pytest.raises(OutputError, match=r"a\.safetensors: exists already; give another name, or --force"):
        convert(small, file, "safetensors", input_shape=None)
    assert file.read_bytes() == b"old"
    convert(small, file, "safetensors", input_shape=None, force=True)
    assert torch.equal(load_file(file)["stem.weight"], small.stem.weight)


def spoil(monkeypatch, to: str) -> None:
    """Let the file of a format hold another weight than the model."""

    def wrap(write, index: int):
        def wrong(*args, **kwargs):
            args = list(args)
            args[index] = copy.deepcopy(args[index])
            state = args[index] if isinstance(args[index], dict) else args[index].state_dict()
            state["classifier.bias"][3] += 0.25
            return write(*args, **kwargs)

        return wrong

    if to in ("module", "state-dict"):
        monkeypatch.setattr(torch, "save", wrap(torch.save, 0))
    elif to == "safetensors":
        monkeypatch.setattr(converter, "save_safetensors", wrap(converter.save_safetensors, 0))
    elif to == "morph":
        monkeypatch.setattr(converter, "save_model", wrap(converter.save_model, 0))
    else:
        monkeypatch.setattr(torch.export, "export", wrap(torch.export.export, 0))


@pytest.mark.parametrize("to", list(FORMATS))
def test_a_wrong_file_is_rejected(to: str, small, tmp_path, monkeypatch) -> None:
    spoil(monkeypatch, to)
    text = "outputs are off by 2.50e-01" if to in PROGRAMS else "the file holds another classifier.bias than the model"
    with pytest.raises(CheckFailedError, match=text):
        convert(small, tmp_path / "a.bin", to, input_shape=(3, 32, 32))
    assert os.listdir(tmp_path) == []


def test_the_comparisons_reject_other_shapes_names_and_numbers() -> None:
    one, nan = torch.ones(2, 3), torch.full((2, 3), float("nan"))
    assert converter._difference([one], [one + 1e-6]) == pytest.approx(1e-6, rel=0.1)
    for got in ([one + 1e-3], [nan]):
        with pytest.raises(CheckFailedError, match="outputs are off by"):
            converter._difference([one], got)
    for got in ([one[:1]], [one, one], []):
        with pytest.raises(CheckFailedError, match="the file gives outputs of shape"):
            converter._difference([one], got)
    with pytest.raises(CheckFailedError, match=r"differ in 2 names, e\.g\. a; nothing"):
        converter._same_tensors({"a": one}, {"b": one})
    for other in (one.double(), one.T.contiguous(), one + 1e-7, nan):
        with pytest.raises(CheckFailedError, match="holds another a than the model"):
            converter._same_tensors({"a": one}, {"a": other})
    assert converter._same_tensors({"a": nan, "b": torch.tensor(3)}, {"a": nan.clone(), "b": torch.tensor(3)})


def test_requests_that_cannot_end_well(small, tmp_path, monkeypatch) -> None:
    file, shape = tmp_path / "a.onnx", (3, 32, 32)
    with pytest.raises(OutputError, match=r"a\.onnx: 'pickle' is no format; known are morph, module, state-dict"):
        convert(small, file, "pickle", input_shape=shape)
    with pytest.raises(OutputError, match="an opset belongs to onnx alone, got opset=18 for morph"):
        convert(small, file, "morph", input_shape=shape, opset=18)
    with pytest.raises(OutputError, match="onnx needs the shape of one sample; give --input"):
        convert(small, file, "onnx", input_shape=None)
    with pytest.raises(OutputError, match="cannot write opset 7 for this model, it gives 18"):
        convert(small, file, "onnx", input_shape=shape, opset=7)
    with pytest.raises(TraceError, match=r"does not run on samples of 4x32x32 \(see --input\): .*to have 3 channels"):
        convert(small, file, "onnx", input_shape=(4, 32, 32))
    monkeypatch.setattr(converter.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OutputError, match=r"needs onnx and onnxscript, not installed; pip install torch-morph\[onnx\]"):
        convert(small, file, "onnx", input_shape=shape)
    assert os.listdir(tmp_path) == []


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(3, -1) if x.shape[0] == 3 else x


class Counting(nn.Module):
    def get_extra_state(self) -> dict[str, int]:
        return {"steps": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_models_that_do_not_fit(tmp_path) -> None:
    class Local(nn.Module):
        pass

    for to in PROGRAMS:
        with pytest.raises(TraceError, match="cannot export the model for any batch size: Constraints violated"):
            convert(FixedBatch(), tmp_path / "a.bin", to, input_shape=(5,))
    for to in TENSORS:
        with pytest.raises(OutputError, match="_extra_state in the state_dict is no tensor, and this format"):
            convert(Counting(), tmp_path / "a.bin", to, input_shape=None)
    with pytest.raises(OutputError, match=r"a\.bin: not written as module: .*Local"):
        convert(Local(), tmp_path / "a.bin", "module", input_shape=None)
    assert os.listdir(tmp_path) == []


def run(*argv: object) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(a) for a in argv]))


def test_command(tmp_path, capsys) -> None:
    file = tmp_path / "wrn.safetensors"
    assert run("zoo:wrn-10-1", "--out", file) == 0
    text = capsys.readouterr()
    assert text.err == ""
    assert text.out.splitlines() == [
        "check: 46 tensors are equal bit for bit",
        f"written: {file} (safetensors, {file.stat().st_size:,} bytes)",
    ]
    assert run(file, "--arch", "zoo:wrn-10-1", "--out", tmp_path / "w.pt2", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == 1
    assert document["written"] == [str(tmp_path / "w.pt2")]
    assert document["format"] == "torch-export"
    assert document["bytes"] == (tmp_path / "w.pt2").stat().st_size
    assert document["max_difference"] < 1e-5
    stored = load_file(file)
    with torch.no_grad():
        x = torch.randn(2, 3, 32, 32)
        fresh = zoo.build("wrn-10-1").eval()
        fresh.load_state_dict(stored)
        assert torch.allclose(torch.export.load(tmp_path / "w.pt2").module()(x), fresh(x), atol=1e-5)


def test_command_opens_an_exported_program_for_onnx(tmp_path) -> None:
    convert(nn.Linear(3, 5), tmp_path / "w.pt2", "torch-export", input_shape=(3,))
    assert run(tmp_path / "w.pt2", "--allow-code", "--input", "3", "--out", tmp_path / "w.onnx") == 0
    assert onnx.load(tmp_path / "w.onnx").graph.node


def test_command_refuses(tmp_path) -> None:
    with pytest.raises(OutputError, match=r"w\.pt: the suffix does not say the format; give --to, one of morph"):
        run("zoo:wrn-10-1", "--out", tmp_path / "w.pt")
    (tmp_path / "w.onnx").write_bytes(b"old")
    with pytest.raises(OutputError, match=r"w\.onnx: exists already"):
        run("zoo:no-such-model", "--out", tmp_path / "w.onnx")
    with pytest.raises(ModelFileError, match="zoo:no-such-model: no model has this name"):
        run("zoo:no-such-model", "--out", tmp_path / "v.onnx")
    assert os.listdir(tmp_path) == ["w.onnx"]


def test_command_knows_every_format() -> None:
    assert set(command.FORMATS) == set(FORMATS)
    assert set(command.SUFFIXES.values()) <= set(FORMATS)


def test_model_arguments(monkeypatch) -> None:
    parser = argparse.ArgumentParser()
    add_model(parser)
    args = parser.parse_args(["m.pt", "--trust", "a.B", "--trust", "c", "--arch", "zoo:wrn-10-1", "--input", "3X8x9"])
    assert args.input == (3, 8, 9)
    calls = []
    monkeypatch.setattr("morph.files.open_model", lambda source, **options: calls.append((source, options)))
    open_from(args)
    assert calls == [("m.pt", {"arch": "zoo:wrn-10-1", "trust": ("a.B", "c"), "allow_code": False})]
    opened = OpenedModel(nn.Identity(), "m.pt", "state_dict", None, (1, 2, 3))
    assert input_shape_from(args, opened) == (3, 8, 9)
    args.input = None
    assert input_shape_from(args, opened) == (1, 2, 3)
    unknown = OpenedModel(nn.Identity(), "m.pt", "state_dict", None, None)
    with pytest.raises(ModelFileError, match=r"m\.pt: does not say what its input is; .* --input 3x224x224"):
        input_shape_from(args, unknown)


@pytest.mark.parametrize("text", ["", "3x", "0x3", "3x-2", "3 x 3", "3,32,32", "3x3.0", "²x3"])
def test_shapes_that_are_none(text: str, capsys) -> None:
    parser = argparse.ArgumentParser()
    add_model(parser)
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(["m.pt", "--input", text])
    assert caught.value.code == 2
    assert "is no shape; give the sizes of one sample, e.g. 3x32x32" in capsys.readouterr().err


def test_the_command_line_imports_nothing_heavy() -> None:
    code = "import sys, morph.cli.convert, morph.cli.zoo; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
