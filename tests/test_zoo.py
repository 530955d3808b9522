"""The models that are known by name."""

import argparse
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from morph import zoo
from morph.cli import zoo as command
from morph.errors import ModelFileError
from morph.zoo.darts import DartsNet
from morph.zoo.densenet import DenseNet
from morph.zoo.wide_resnet import WideResNet

PARAMS = {
    "darts-10": 774_260,
    "darts-25": 1_354_980,
    "darts-v1-10": 755_812,
    "darts-v1-25": 1_303_492,
    "darts-10-trained": 774_260,
    "densenet-bc-40-36": 1_542_682,
    "densenet-bc-100-12": 769_162,
    "wrn-16-2": 691_674,
    "wrn-28-2": 1_467_610,
    "wrn-40-2": 2_243_546,
    "resnet-20": 272_474,
    "resnet-32": 466_906,
    "resnet-44": 661_338,
    "resnet-56": 855_770,
    "resnet-110": 1_730_714,
    "vgg-teacher": 12_058_058,
    "vgg-teacher-bn": 12_060_874,
    "vgg-student": 249_514,
    "vgg-student-small": 129_410,
    "mlp-3-512": 2_103_818,
    "nin": 966_986,
    "shallow": 167_210_506,
    "shallow-pool": 49_245_706,
    "shallow-small": 601_994,
    "torchvision-vgg16-bn-32": 14_728_266,
    "torchvision-googlenet-32": 5_602_474,
    "torchvision-resnet18-32": 11_173_962,
    "torchvision-resnet34-32": 21_282_122,
    "torchvision-resnet50-32": 23_520_842,
    "torchvision-densenet121-32": 6_956_426,
    "torchvision-shufflenet-v2-x2-0-32": 5_365_486,
    "torchvision-mobilenet-v2-32": 2_236_682,
}
SMALL = ["darts-4x4", "darts-v1-5x6", "densenet-bc-16-5", "wrn-10-1", "wrn-16-2", "darts-10"]


def params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and statistic a value that no default hides."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias.data):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
            for tensor in (module.running_var, module.weight.data):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model


def test_parameter_counts_to_the_digit() -> None:
    with torch.device("meta"):
        found = {name: params(zoo.architecture(name)) for name in zoo.names()}
        assert params(zoo.architecture("densenet-bc-100-12", num_classes=100)) == 800_032
    assert found == PARAMS


def test_densenet_multiply_adds() -> None:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        zoo.build("densenet-bc-100-12").eval()(torch.zeros(1, 3, 32, 32))
    assert counter.get_total_flops() / 2 == 287_929_692


@pytest.mark.parametrize("name", ["darts-10", "wrn-16-2", "densenet-bc-40-36"])
def test_shape_is_that_of_a_sample(name: str) -> None:
    assert zoo.input_shape(name) == (3, 32, 32)
    with torch.device("meta"):
        output = zoo.build(name, num_classes=7).eval()(torch.zeros(3, *zoo.input_shape(name)))
    assert output.shape == (3, 7)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("training", [True, False])
def test_symbolic_trace_gives_the_same_outputs(name: str, training: bool) -> None:
    model = randomise(zoo.build(name)).double().train(training)
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    traced = fx.symbolic_trace(model)
    expected, got = model(x), traced(x)
    if name.startswith("darts") and training:
        assert isinstance(expected, tuple)
        assert len(expected) == len(got) == 2
    else:
        expected, got = (expected,), (got,)
    for a, b in zip(expected, got, strict=True):
        assert torch.equal(a, b)
        assert a.std() > 0


def test_auxiliary_head_runs_in_training_only() -> None:
    model = randomise(zoo.build("darts-10", num_classes=7))
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    logits, auxiliary = model.train()(x)
    assert logits.shape == auxiliary.shape == (2, 7)
    graphs = {}
    for mode in (True, False):
        graph = fx.symbolic_trace(model.train(mode)).graph
        graphs[mode] = [n for n in graph.nodes if "auxiliary" in str(n.target) or "auxiliary" in n.name]
    assert graphs[True]
    assert graphs[False] == []
    assert isinstance(model.eval()(x), torch.Tensor)
    assert params(model.eval()) == params(model.train())
    assert any(name.startswith("auxiliary") for name, _ in model.named_parameters())


def slow_wide_resnet(model: WideResNet, x: torch.Tensor) -> torch.Tensor:
    """WRN in functional form, written down a second time."""
    f = nn.functional
    state = model.state_dict()

    def norm(y: torch.Tensor, name: str) -> torch.Tensor:
        keys = ("weight", "bias", "running_mean", "running_var")
        weight, bias, mean, var = (state[f"{name}.{key}"].view(1, -1, 1, 1) for key in keys)
        return torch.clamp((y - mean) / (var + 1e-5).sqrt() * weight + bias, min=0)

    x = f.conv2d(x, state["stem.weight"], padding=1)
    for g, blocks in enumerate(model.groups):
        for b in range(len(blocks)):
            name, stride = f"groups.{g}.{b}", 2 if g > 0 and b == 0 else 1
            active = norm(x, f"{name}.bn1")
            y = norm(f.conv2d(active, state[f"{name}.conv1.weight"], stride=stride, padding=1), f"{name}.bn2")
            short = state.get(f"{name}.shortcut.weight")
            x = x if short is None else f.conv2d(active, short, stride=stride)
            x = x + f.conv2d(y, state[f"{name}.conv2.weight"], padding=1)
    return norm(x, "bn").mean((2, 3)) @ state["classifier.weight"].T + state["classifier.bias"]


def test_wide_resnet_equals_its_second_implementation() -> None:
    model = randomise(WideResNet(16, 1, 7)).double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(model(x), slow_wide_resnet(model, x), rtol=1e-10, atol=1e-10)
    model.groups[1][0].shortcut.weight.data[0, 0] += 0.1
    before = model(x)
    model.groups[1][0].shortcut.weight.data[0, 0] -= 0.1
    assert not torch.allclose(before, slow_wide_resnet(model, x), rtol=1e-10, atol=1e-10)


def test_dense_layers_keep_their_inputs() -> None:
    model = randomise(DenseNet(16, 5, 7)).double().eval()
    x = torch.randn(2, 10, 8, 8, dtype=torch.float64)
    layer = model.stages[0][0]
    assert torch.equal(layer(x)[:, :10], x)
    assert [len(stage) for stage in model.stages[::2]] == [2, 2, 2]
    assert model.stages[0](x).shape == (2, 20, 8, 8)
    assert model.stages[1](model.stages[0](x)).shape == (2, 10, 4, 4)


def test_convolutions_start_with_he_fan_out() -> None:
    torch.manual_seed(0)
    for model in (zoo.build("wrn-16-2"), zoo.build("densenet-bc-40-36")):
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d) and module.weight.numel() > 20_000:
                fan_out = module.out_channels * module.kernel_size[0] ** 2
                assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05), name


def test_families_take_other_numbers() -> None:
    with torch.device("meta"):
        assert params(zoo.build("wrn-22-3")) == params(WideResNet(22, 3))
        assert params(zoo.build("densenet-bc-50-12")) == params(DenseNet(50, 12))
        assert params(zoo.build("darts-7x8")) == params(DartsNet(layers=7, channels=8))
        assert params(zoo.build("darts-7")) == params(DartsNet(layers=7))
        assert params(zoo.build("darts-v1-7")) != params(zoo.build("darts-7"))
    assert zoo.input_shape("wrn-22-3") == (3, 32, 32)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("wrn-17-2", r"zoo:wrn-17-2: WRN needs a depth of 6n \+ 4 \(10, 16, .*\), got 17"),
        ("wrn-4-2", r"zoo:wrn-4-2: WRN needs a depth of 6n \+ 4"),
        ("wrn-16-0", "zoo:wrn-16-0: WRN needs a width of 1 or more, got 0"),
        ("densenet-bc-9-12", "zoo:densenet-bc-9-12: DenseNet-BC needs a depth of 10 or more .*, got 9"),
        ("densenet-bc-40-0", "zoo:densenet-bc-40-0: DenseNet-BC needs a growth of 1 or more .*, got 0"),
        ("darts-2", "zoo:darts-2: DARTS needs 3 cells or more .*, got 2"),
        ("darts-10x1", "zoo:darts-10x1: DARTS needs 2 channels or more, got 1"),
        ("dart-10", "zoo:dart-10: no model has this name; did you mean darts-10 .*`morph zoo` lists them"),
        ("wrn-28-2-100", "zoo:wrn-28-2-100: no model has this name; did you mean wrn-28-2"),
        ("", "zoo:: no model has this name; `morph zoo` lists them"),
        ("wrn-\uff11\uff16-2", "no model has this name"),
        ("wrn-99999999999-2", "no model has this name"),
    ],
)
def test_bad_names_get_one_clear_line(name: str, text: str) -> None:
    with pytest.raises(ModelFileError, match=text) as caught:
        zoo.build(name)
    assert "\n" not in str(caught.value)


def test_bad_numbers_of_the_classes() -> None:
    with pytest.raises(ModelFileError, match="zoo:wrn-16-2: needs 1 class or more, got num_classes=0"):
        zoo.build("wrn-16-2", num_classes=0)
    with pytest.raises(ValueError, match=r"compression above 0 and at most 1, got 1\.5"):
        DenseNet(40, 12, compression=1.5)
    with pytest.raises(ModelFileError, match=r"trained for 10 classes, got num_classes=7; take zoo:darts-10$"):
        zoo.build("darts-10-trained", num_classes=7)


def test_trained_weights_are_loaded(tmp_path, monkeypatch) -> None:
    source = randomise(zoo.build("darts-10"))
    save_file(source.state_dict(), tmp_path / "darts-10-trained.safetensors")
    monkeypatch.setattr(zoo, "_sample", lambda name: tmp_path / name)
    before = torch.get_rng_state()
    model = zoo.build("darts-10-trained")
    assert torch.equal(before, torch.get_rng_state())
    assert model.training
    state = model.state_dict()
    assert state.keys() == source.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in source.state_dict().items())
    assert all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())


def test_trained_weights_missing_or_damaged(tmp_path, monkeypatch) -> None:
    file = tmp_path / "darts-10-trained.safetensors"
    monkeypatch.setattr(zoo, "_sample", lambda name: tmp_path / name)
    with pytest.raises(ModelFileError, match=r"the weights darts-10-trained\.safetensors are not installed; reinstall"):
        zoo.build("darts-10-trained")
    save_file(zoo.build("wrn-10-1").state_dict(), file)
    with pytest.raises(ModelFileError, match=r"damaged weights in darts-10-trained\.safetensors; .*Missing key"):
        zoo.build("darts-10-trained")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelFileError, match=r"damaged weights in darts-10-trained\.safetensors") as caught:
        zoo.build("darts-10-trained")
    assert "\n" not in str(caught.value)


def test_the_weights_belong_inside_the_package() -> None:
    weights = zoo.MODELS["darts-10-trained"].weights
    assert weights is not None
    assert zoo._sample("__init__.py").is_file()
    assert zoo._sample(weights).name == weights


def test_import_is_light() -> None:
    code = "import sys; from morph import zoo; zoo.build('wrn-10-1'); sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_command_lists_counts(capsys) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.run(parser.parse_args(["--json"])) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == 1
    assert {model["name"]: model["params"] for model in document["models"]} == PARAMS
    assert all(model["input"] == [3, 32, 32] and model["note"] for model in document["models"])
    assert any(family["name"].startswith("wrn-") for family in document["families"])
    assert command.run(parser.parse_args([])) == 0
    text = capsys.readouterr()
    assert text.err == ""
    for name, count in PARAMS.items():
        assert any(f"zoo:{name} " in line and f"{count:,}" in line for line in text.out.splitlines())
