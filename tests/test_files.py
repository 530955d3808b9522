from __future__ import annotations

import functools
import math
from collections import OrderedDict

import pytest
import torch
import torchvision
from files_support import assert_same_model, outputs, randomised, round_trip, same
from torch import nn
from torch.nn import functional as F

from morph import zoo
from morph.errors import ModelFileError, OutputError
from morph.files import open_model, read_record, save_model
from morph.files.describe import describe
from morph.files.rebuild import rebuild
from morph.files.spec import from_text
from morph.zoo.darts import DARTS_V2, DartsNet

SMALL = ["squeezenet1_1", "shufflenet_v2_x0_5", "mobilenet_v3_small", "mnasnet0_5", "resnet18", "regnet_x_400mf"]


@pytest.mark.slow
def test_every_torchvision_classifier_survives_its_description():
    for name in torchvision.models.list_models(torchvision.models):
        if name.startswith("regnet"):  # cannot be made without weights; one of them is among the small ones
            continue
        options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        with torch.device("meta"):
            model = torchvision.models.get_model(name, weights=None, **options)
        description, tensors = describe(model)
        again = from_text(description.to_text())
        assert again == description
        other = rebuild(again, tensors)
        assert repr(other) == repr(model)
        for a, b in zip(model.modules(), other.modules(), strict=True):
            assert type(a) is type(b)
            assert repr(_plain_state(a)) == repr(_plain_state(b))


def _plain_state(module):
    links = {*nn.Module().__dict__, "_flat_weights", "_flat_weight_refs"}
    return {name: (type(value), value) for name, value in module.__dict__.items() if name not in links}


@pytest.mark.parametrize("name", SMALL)
def test_torchvision_models_come_back_bit_for_bit(name, tmp_path):
    model = randomised(torchvision.models.get_model(name, weights=None))
    x = torch.randn(2, 3, 32, 32)
    torch.save(model, tmp_path / "pickled.pt")
    pickled = open_model(tmp_path / "pickled.pt")
    assert pickled.kind == "pickled module"
    for other in (round_trip(model, tmp_path), pickled.model):
        assert_same_model(model, other)
        assert same(outputs(model, x, False), outputs(other, x, False))
        assert same(outputs(model, x, True), outputs(other, x, True))


@pytest.mark.parametrize("name", ["googlenet", pytest.param("inception_v3", marks=pytest.mark.slow)])
def test_auxiliary_outputs_in_training_survive(name, tmp_path):
    model = randomised(torchvision.models.get_model(name, weights=None, init_weights=False, num_classes=7))
    other = round_trip(model, tmp_path)
    x = torch.randn(2, 3, 75 if name == "googlenet" else 299, 75 if name == "googlenet" else 299)
    got, want = outputs(other, x, True), outputs(model, x, True)
    assert type(got).__name__.endswith("Outputs")
    assert same(got, want)


@pytest.mark.parametrize("name", zoo.names())
def test_zoo_models_survive_their_description(name):
    with torch.device("meta"):
        model = zoo.architecture(name)
    description, tensors = describe(model)
    other = rebuild(from_text(description.to_text()), tensors)
    assert repr(other) == repr(model)
    for a, b in zip(model.modules(), other.modules(), strict=True):
        assert repr(_plain_state(a)) == repr(_plain_state(b))


@pytest.mark.parametrize("model", [DartsNet(DARTS_V2, 4, 4), zoo.build("wrn-10-1"), zoo.build("densenet-bc-10-5")])
def test_zoo_models_come_back_bit_for_bit(model, tmp_path):
    other = round_trip(randomised(model), tmp_path)
    assert_same_model(model, other)
    x = torch.randn(2, 3, 32, 32)
    for training in (False, True):
        assert same(outputs(model, x, training), outputs(other, x, training))
    assert isinstance(outputs(other, x, True), tuple) == isinstance(model, DartsNet)


def test_timm_models_come_back_with_their_enumerations(tmp_path):
    timm = pytest.importorskip("timm")
    model = randomised(timm.create_model("mobilenetv3_small_050", num_classes=11)).eval()
    vit = timm.create_model("vit_tiny_patch16_224", depth=1)
    for made, size in ((model, 64), (vit, 224)):
        torch.save(made, tmp_path / "pickled.pt")
        x = torch.randn(2, 3, size, size)
        for other in (round_trip(made, tmp_path), open_model(tmp_path / "pickled.pt").model):
            assert_same_model(made, other)
            assert same(outputs(made, x, False), outputs(other, x, False))
        (tmp_path / "model.morph").unlink()
    assert other.patch_embed.output_fmt is vit.patch_embed.output_fmt


LAYERS = {
    "lstm": (lambda: nn.LSTM(5, 7, 2, bidirectional=True, batch_first=True), (3, 4, 5)),
    "gru": (lambda: nn.GRU(5, 7), (3, 4, 5)),
    "attention": (lambda: nn.TransformerEncoderLayer(6, 2, 13, activation=F.gelu, batch_first=True), (3, 4, 6)),
    "decoder": (lambda: nn.Sequential(nn.TransformerEncoderLayer(6, 3, 5), nn.Softmax(-1)), (3, 4, 6)),
    "odd names": (lambda: nn.Sequential(OrderedDict({"conv-1": nn.Conv1d(3, 5, 1), "class": nn.ReLU()})), (2, 3, 7)),
    "no affine": (lambda: nn.Sequential(nn.BatchNorm1d(5, affine=False), nn.Linear(5, 3, bias=False)), (4, 5)),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_come_back_bit_for_bit(layer, tmp_path):
    make, shape = LAYERS[layer]
    model = randomised(make().double())
    x = torch.randn(shape, dtype=torch.float64)
    torch.save(model, tmp_path / "pickled.pt")
    for other in (round_trip(model, tmp_path), open_model(tmp_path / "pickled.pt").model):
        assert_same_model(model, other)
        for training in (False, True):
            assert str(outputs(model, x, training)) == str(outputs(other, x, training))


def peculiar():
    """Ties, absent parts, frozen and half-precision tensors, non-persistent buffers, odd attributes."""
    shared = nn.Conv2d(3, 3, 1)
    model = nn.Sequential(
        shared,
        nn.BatchNorm2d(3),
        shared,
        nn.Conv2d(3, 3, 1),
        nn.ModuleList([nn.ReLU()]),
        nn.ParameterDict({"a": nn.Parameter(torch.randn(2).bfloat16())}),
        nn.ParameterList([torch.zeros(3)]),
    )
    model[3].weight = shared.weight
    model[0].bias.requires_grad_(False)
    model[1].eval()
    model.register_buffer("counts", torch.arange(5), persistent=False)
    model.register_buffer("absent", None)
    model.register_parameter("nothing", None)
    model.register_module("none", None)
    model.plain = torch.randn(2, 3).t()
    model.alias = shared.weight
    model.values = [
        None,
        True,
        3,
        0.1,
        math.inf,
        "text",
        (1, (2,)),
        {"a": 1, 2: [3]},
        {1, 2},
        frozenset({"x"}),
        OrderedDict(b=1, a=2),
        torch.Size([2, 3]),
        torch.float16,
        torch.channels_last,
        torch.device("cpu"),
        slice(1, None),
        ...,
        nn.BatchNorm2d,
        F.relu,
    ]
    model.not_a_number = math.nan
    model.factory = functools.partial(nn.LayerNorm, 7, eps=1e-6)
    return model


def test_everything_a_module_holds_survives(tmp_path):
    model = peculiar()
    other = round_trip(model, tmp_path)
    assert_same_model(model, other)
    assert repr(model.values) == repr(other.values)
    assert [type(v) for v in model.values] == [type(v) for v in other.values]
    assert math.isnan(other.not_a_number)
    assert (other.factory.func, other.factory.args, other.factory.keywords) == (nn.LayerNorm, (7,), {"eps": 1e-6})
    assert torch.equal(other.plain, model.plain)
    assert other.alias is other[0].weight is other[3].weight
    assert other[0] is other[2]
    assert other._non_persistent_buffers_set == {"counts"}
    assert other.absent is None
    assert other.nothing is None
    assert other.none is None


def test_the_comparison_sees_a_difference(tmp_path):
    model = peculiar()
    other = round_trip(model, tmp_path)
    with torch.no_grad():
        other[3].bias[1] += 1e-6
    with pytest.raises(AssertionError):
        assert_same_model(model, other)
    assert not same(model[3].bias, other[3].bias)


def test_small_views_of_large_storages_are_written_small(tmp_path):
    layer = nn.Linear(3, 2)
    layer.weight = nn.Parameter(torch.randn(1000, 1000)[:2, :3])
    other = round_trip(layer, tmp_path)
    assert torch.equal(other.weight, layer.weight)
    assert (tmp_path / "model.morph").stat().st_size < 20_000


def test_the_record_and_what_is_known_are_kept(tmp_path):
    path = tmp_path / "a.morph"
    save_model(nn.Linear(3, 2), path, input_shape=(3,), arch="zoo:darts-10", record={"steps": [1, {"a": None}]})
    opened = open_model(str(path))
    assert (opened.arch, opened.input_shape, opened.source) == ("zoo:darts-10", (3,), str(path))
    assert read_record(path) == {"steps": [1, {"a": None}]}
    save_model(nn.Linear(3, 2), path, force=True)
    assert read_record(path) is None
    with pytest.raises(OutputError, match="exists already"):
        save_model(nn.Linear(3, 2), path)
    with pytest.raises(ModelFileError, match="the record is not plain data"):
        save_model(nn.Linear(3, 2), tmp_path / "b.morph", record={"a": object()})
    assert not (tmp_path / "b.morph").exists()
    torch.save(nn.Linear(3, 2), tmp_path / "c.pt")
    with pytest.raises(ModelFileError, match=r"c.pt: is not a file written by morph"):
        read_record(tmp_path / "c.pt")
