from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from morph.errors import ModelFileError
from morph.files import open_model, read_record, save_model
from morph.files.describe import describe


def _scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.ReLU())


def _bad_files(folder):
    save_model(nn.Linear(50, 50), folder / "whole.morph")
    whole = (folder / "whole.morph").read_bytes()
    files = {
        "is empty": b"",
        "it looks like text": b"just some words\n",
        "is truncated or damaged": whole[: len(whole) // 2],
        "is neither a torch archive": b"\x00\x01\x02" * 9,
        "old, non-zip format, and damaged": b"\x80\x02\x00\x00",
    }
    return {text: _written(folder / f"{i}.pt", content) for i, (text, content) in enumerate(files.items())}


def _written(path, content):
    path.write_bytes(content)
    return path


def test_files_that_are_no_models_say_why(tmp_path):
    found = _bad_files(tmp_path)
    found["is a folder"] = tmp_path
    found["there is no such file"] = tmp_path / "none.pt"
    found["TorchScript archive"] = tmp_path / "script.pt"
    _scripted().save(found["TorchScript archive"])
    found["old, non-zip format that wants torch.nn.modules.activation.ReLU"] = tmp_path / "legacy.pt"
    torch.save(nn.ReLU(), tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    found["not a whole safetensors file"] = _written(tmp_path / "a.safetensors", b"\x08" + b"\x00" * 7 + b"{" * 8)
    found["holds a list, not a model"] = tmp_path / "list.pt"
    torch.save([1, 2], tmp_path / "list.pt")
    found["holds a dictionary with the keys a, not a model"] = tmp_path / "dict.pt"
    torch.save({"a": 1}, tmp_path / "dict.pt")
    import zipfile

    with zipfile.ZipFile(tmp_path / "other.zip", "w") as file:
        file.writestr("a/b.txt", "words")
    found["is a zip archive, but not one of torch.save"] = tmp_path / "other.zip"
    for text, path in found.items():
        with pytest.raises(ModelFileError, match=text) as caught:
            open_model(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)


@pytest.mark.skipif("__import__('os').geteuid() == 0", reason="root reads everything")
def test_a_file_that_may_not_be_read(tmp_path):
    path = _written(tmp_path / "a.pt", b"PK")
    path.chmod(0)
    with pytest.raises(ModelFileError, match="cannot be read"):
        open_model(path)


def _own_content(**changes):
    description, tensors = describe(nn.Linear(2, 3))
    content = {
        "format": "morph",
        "version": 1,
        "description": description.to_text(),
        "tensors": tensors,
        "meta": "{}",
        "record": None,
    }
    return {**content, **changes}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"version": 2}, "is of version 2 of this format; version 1 is the newest"),
        ({"description": 3}, "the field 'description' is missing or of the wrong type"),
        ({"description": "{"}, "the description is not JSON"),
        ({"description": "[" * 100_000}, "the description is not JSON"),
        ({"description": "{}"}, "has the fields .*, expected"),
        ({"tensors": {}}, "2 tensors are missing or too many, first 'bias'"),
        (
            {"tensors": {"weight": torch.eye(3).to_sparse(), "bias": torch.zeros(3)}},
            "'weight' is not a plain dense tensor",
        ),
        (
            {"tensors": {"weight": torch.zeros(3, 2).int(), "bias": torch.zeros(3)}},
            "torch.int32 cannot have a gradient",
        ),
        ({"meta": "3"}, "its meta is not a JSON object"),
        ({"meta": '{"input_shape": [3, -1]}'}, "is not the shape of a sample"),
        ({"meta": '{"arch": 3}'}, "the name of the architecture is not text"),
    ],
)
def test_damaged_files_of_our_own_say_what_is_wrong(changes, text, tmp_path):
    path = tmp_path / "a.morph"
    torch.save(_own_content(), path)
    assert torch.equal(open_model(path).model.weight, torch.load(path, weights_only=True)["tensors"]["weight"])
    torch.save(_own_content(**changes), path)
    with pytest.raises(ModelFileError, match=text):
        open_model(path)


def test_an_unreadable_record(tmp_path):
    torch.save(_own_content(record="[1]"), tmp_path / "a.morph")
    with pytest.raises(ModelFileError, match="its record is not a JSON object"):
        read_record(tmp_path / "a.morph")
