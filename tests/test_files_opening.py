from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from files_support import assert_same_model, randomised
from safetensors.torch import save_file
from torch import nn

from morph.errors import ModelFileError, UnsafeFileError
from morph.files import open_model, save_model


@pytest.fixture
def user_folder(tmp_path, monkeypatch):
    """A working folder with a module of the user's own."""
    (tmp_path / "their_nets.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Own(nn.Module):\n"
        "    def __init__(self, width=3):\n        super().__init__()\n        self.layer = nn.Linear(width, 2)\n"
        "        self.settings = Settings()\n"
        "    def forward(self, x):\n        return self.layer(x) * self.settings.gain\n"
        "class Settings:\n    gain = 1\n    def __init__(self):\n        self.gain = 3\n"
        "def make():\n    return Own()\n"
        "def text():\n    return 'text'\n"
        "def fails():\n    raise ValueError('no luck')\n"
    )
    (tmp_path / "their_broken.py").write_text("import no_such_package_anywhere\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("their_nets", "their_broken"):
        sys.modules.pop(name, None)


def test_names_give_models():
    opened = open_model("torchvision:squeezenet1_0")
    assert isinstance(opened.model, torchvision.models.SqueezeNet)
    assert (opened.kind, opened.input_shape) == ("torchvision", (3, 224, 224))
    assert open_model("torchvision:inception_v3").input_shape == (3, 299, 299)


def test_segmentation_models_download_no_backbone(monkeypatch):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **k: pytest.fail("a download"))
    opened = open_model("torchvision:lraspp_mobilenet_v3_large")
    assert isinstance(opened.model, nn.Module)
    assert opened.input_shape is None


def test_timm_names(monkeypatch):
    pytest.importorskip("timm")
    opened = open_model("timm:resnet10t")
    assert (opened.kind, opened.input_shape) == ("timm", (3, 176, 176))
    with pytest.raises(ModelFileError, match=r"timm:resnet1: there is no such model; near: .*resnet1"):
        open_model("timm:resnet1")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModelFileError, match="timm is not installed; pip install timm"):
        open_model("timm:resnet10t")


def test_a_users_callable(user_folder):
    opened = open_model("their_nets:make")
    assert type(opened.model).__name__ == "Own"
    assert (opened.kind, opened.arch, opened.input_shape) == ("callable", "their_nets:make", None)
    assert open_model("their_nets:Own").model(torch.zeros(1, 3)).shape == (1, 2)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("torchvision:resnet19", "torchvision:resnet19: there is no such model; near: .*resnet18"),
        ("zoo:darts-0x", "darts"),
        ("their_nets:mke", "their_nets has no callable mke; near: make"),
        ("their_nets:text", "gave a str, expected a torch.nn.Module"),
        ("their_nets:fails", "cannot be built: ValueError: no luck"),
        ("their_broken:make", "their_broken cannot be imported: ModuleNotFoundError"),
        ("their_missing:make", "their_missing cannot be imported"),
        ("C:\\models\\net.pt", "there is no such file"),
        ("D:net", "there is no such file"),
        ("folder/net.pt", "there is no such file; to name a model instead, write zoo:NAME"),
        ("zoo:", "there is no such file"),
    ],
)
def test_wrong_names_say_what_is_near(source, text, user_folder):
    with pytest.raises(ModelFileError, match=text) as caught:
        open_model(source)
    assert "\n" not in str(caught.value)


def test_a_file_whose_name_looks_like_a_name_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(nn.Linear(2, 3), "zoo:darts-10")
    assert open_model("zoo:darts-10").kind == "pickled module"
    with pytest.raises(ModelFileError, match="is a name already; --arch is for files"):
        open_model("torchvision:alexnet", arch="torchvision:alexnet")


# ---- state_dicts


def _forms(model, folder):
    state = model.state_dict()
    prefixed = {f"module.{key}": t for key, t in state.items()}
    torch.save(state, folder / "plain.pth")
    torch.save({"epoch": 3, "state_dict": prefixed, "best": 0.5}, folder / "nested.pt")
    torch.save({"model": {f"_orig_mod.{k}": t for k, t in prefixed.items()}}, folder / "model.pt")
    torch.save({"model_state_dict": state}, folder / "other.pt")
    torch.save(
        {k: t for k, t in state.items() if "num_batches" not in k},
        folder / "old.pth",
        _use_new_zipfile_serialization=False,
    )
    save_file({k: t.contiguous() for k, t in state.items()}, folder / "tensors.safetensors")
    return sorted(folder.iterdir())


def test_state_dicts_in_all_their_forms(tmp_path):
    arch = "zoo:wrn-10-1"
    model = randomised(open_model(arch).model)
    paths = _forms(model, tmp_path)
    assert len(paths) == 6
    for path in paths:
        opened = open_model(path, arch=arch)
        assert (opened.kind, opened.arch, opened.input_shape) == ("state_dict", arch, (3, 32, 32))
        assert_same_model(model, opened.model)
    torch.save(copy.deepcopy(model).double().state_dict(), tmp_path / "double.pt")
    assert_same_model(model.double(), open_model(tmp_path / "double.pt", arch=arch).model)


def test_a_state_dict_that_does_not_fit(tmp_path, user_folder):
    path = tmp_path / "a.pt"
    torch.save({"layer.weight": torch.zeros(2, 4), "other": torch.zeros(1)}, path)
    with pytest.raises(
        ModelFileError,
        match=r"a.pt: does not fit their_nets:make, which has 2 tensors: "
        r"1 missing \(layer.bias\); 1 unknown \(other\); "
        r"1 of another shape \(layer.weight is \[2, 4\], expected \[2, 3\]\)",
    ):
        open_model(path, arch="their_nets:make")
    with pytest.raises(ModelFileError, match="holds a state_dict of 2 tensors; say what it belongs to with --arch"):
        open_model(path)
    with pytest.raises(ModelFileError, match="--arch resnet18 is not a name"):
        open_model(path, arch="resnet18")
    save_model(nn.ReLU(), tmp_path / "b.morph")
    with pytest.raises(ModelFileError, match="does not hold a state_dict"):
        open_model(tmp_path / "b.morph", arch="their_nets:make")


def test_exported_programs_open_on_the_users_word_only(tmp_path):
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU()).eval()
    torch.export.save(torch.export.export(model, (torch.randn(2, 3),)), tmp_path / "a.pt2")
    with pytest.raises(UnsafeFileError, match=r"a.pt2: is an exported program.*--allow-code"):
        open_model(tmp_path / "a.pt2")
    opened = open_model(tmp_path / "a.pt2", allow_code=True)
    assert (opened.kind, opened.input_shape) == ("exported program", (3,))
    x = torch.randn(2, 3)
    assert torch.allclose(opened.model(x), model(x))
    whole = (tmp_path / "a.pt2").read_bytes()
    (tmp_path / "a.pt2").write_bytes(whole.replace(b"archive_version", b"archive_versiom"))
    with pytest.raises(ModelFileError, match="cannot be opened as an exported program"):
        open_model(tmp_path / "a.pt2", allow_code=True)


def test_pickles_without_values_are_refused(tmp_path):
    torch.save(nn.Linear(2, 3, device="meta"), tmp_path / "a.pt")
    with pytest.raises(ModelFileError, match="holds a model on the meta device, without values"):
        open_model(tmp_path / "a.pt")


def test_a_pickled_user_class_opens_if_it_is_trusted_by_name(user_folder):
    model = randomised(open_model("their_nets:make").model)
    torch.save(model, "own.pt")
    with pytest.raises(UnsafeFileError, match=r"own.pt: wants their_nets\.\w+,.*--trust their_nets\.\w+ .*--allow"):
        open_model("own.pt")
    with pytest.raises(UnsafeFileError, match=r"wants their_nets.Settings"):
        open_model("own.pt", trust=["their_nets.Own"])
    with pytest.raises(UnsafeFileError, match=r"wants their_nets.Own"):
        open_model("own.pt", trust=["their_nets.Settings", "their_net", "their_nets.Ow"])
    x = torch.randn(4, 3)
    both = ["their_nets.Own", "their_nets.Settings"]
    for options in ({"trust": both}, {"trust": ["their_nets"]}, {"allow_code": True}):
        opened = open_model("own.pt", **options)
        assert opened.kind == "pickled module"
        assert_same_model(model, opened.model)
        assert torch.equal(opened.model(x), model(x))
    with pytest.raises(ModelFileError, match=r"needs their_gone.Own, which cannot be imported here"):
        _renamed(Path("own.pt"), b"their_nets", b"their_gone")
        open_model("own.pt", trust=["their_gone"])
    with pytest.raises(ModelFileError, match="cannot be unpickled: ModuleNotFoundError"):
        open_model("own.pt", allow_code=True)


def _renamed(path, old, new):
    """Replace bytes of equal length inside the pickle of an archive."""
    import zipfile

    with zipfile.ZipFile(path) as file:
        content = {info: file.read(info) for info in file.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for info, data in content.items():
            file.writestr(info.filename, data.replace(old, new) if info.filename.endswith("data.pkl") else data)
