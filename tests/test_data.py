"""Labelled images: every place they may come from, what is refused and in which words, and that no file runs code."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import runpy
import struct
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset
from torchvision import datasets
from torchvision.transforms import v2

import morph.cifar
import morph.data
import morph.sources
from morph.batches import Batches
from morph.cli.data_arguments import add_data, data_from
from morph.data import CIFAR10, IMAGENET, LabelledImages, choose, open_data
from morph.errors import DataError
from morph.sample import cifar10

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
MAKE_SAMPLE = Path(__file__).parent.parent / "benchmarks" / "make_sample.py"


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def folder(root: Path, classes=("ant", "bee", "cat"), per_class: int = 5, size=(7, 11), suffix: str = ".png") -> Path:
    """A small image folder; ``size`` is (height, width)."""
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            Image.fromarray(pixels(*size, 3, seed=100 * c + i)).save(root / name / f"{i}{suffix}")
    return root


def npz(path: Path, **arrays: object) -> Path:
    np.savez(path, **arrays)
    return path


def obvious(images: np.ndarray, statistics) -> torch.Tensor:
    """Normalise ``uint8 [N, H, W, C]`` in float64, pixel by pixel."""
    mean, std = (np.array(values) for values in statistics)
    return torch.from_numpy(((images / 255.0 - mean) / std).transpose(0, 3, 1, 2))


def close(data: LabelledImages, expected: torch.Tensor) -> bool:
    return data.images.shape == expected.shape and torch.allclose(data.images.double(), expected, rtol=0, atol=2e-6)


@pytest.fixture(scope="module")
def sample() -> LabelledImages:
    return cifar10()


# --- LabelledImages -------------------------------------------------------------------------------------------------


def labelled(n: int = 13) -> LabelledImages:
    return LabelledImages(torch.arange(n).float().view(n, 1, 1, 1).expand(n, 3, 2, 5).clone(), torch.arange(n) % 7)


def test_batches_go_through_all_images_in_each_round_and_keep_labels_with_them():
    data = labelled()
    before = (data.images.clone(), data.labels.clone())
    rounds = [list(islice(data.batches(5, seed=3), 9))[i : i + 3] for i in (0, 3, 6)]
    assert [[len(y) for _, y in r] for r in rounds] == [[5, 5, 3]] * 3
    orders = [torch.cat([x[:, 0, 0, 0] for x, _ in r]).tolist() for r in rounds]
    assert all(sorted(order) == list(range(13)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert all(torch.equal(x[:, 2, 1, 4].long() % 7, y) for r in rounds for x, y in r)
    assert torch.equal(data.images, before[0])
    assert torch.equal(data.labels, before[1])


def test_batches_depend_on_the_seed_alone():
    def first(seed: int) -> list[int]:
        torch.rand(3)
        return next(labelled().batches(13, seed))[0][:, 0, 0, 0].tolist()

    assert first(1) == first(1) != first(2)


def test_a_batch_may_be_larger_than_the_data():
    assert [len(y) for _, y in islice(labelled(3).batches(64, 0), 3)] == [3, 3, 3]


def test_a_batch_size_of_zero_is_refused():
    with pytest.raises(DataError, match="a batch of 0 images; give a batch size of at least 1"):
        next(labelled().batches(0, 0))


def test_the_fingerprint_tells_any_change():
    def changed(image: int = 0, label: int = 0, shape=(3, 2, 5)) -> str:
        data = labelled()
        images, labels = data.images.clone(), data.labels.clone()
        images[12, 2, 1, 4] += image
        labels[12] = (labels[12] + label) % 7
        return LabelledImages(images.view(13, *shape), labels).fingerprint()

    assert changed() == changed() == labelled().fingerprint()
    assert len(changed()) == 16
    assert len({changed(), changed(image=1), changed(label=1), changed(shape=(3, 5, 2))}) == 4


def test_the_fingerprint_does_not_depend_on_strides():
    data = labelled()
    strided = data.images.contiguous(memory_format=torch.channels_last)
    assert LabelledImages(strided, data.labels).fingerprint() == data.fingerprint()


@pytest.mark.parametrize(
    ("images", "labels", "text"),
    [
        (torch.zeros(2, 3, 4, 4).double(), torch.zeros(2).long(), r"images of torch.float64 and labels of torch.int64"),
        (
            torch.zeros(2, 3, 4, 4),
            torch.zeros(2).int(),
            r"labels of torch.int32; expected torch.float32 and torch.int6",
        ),
        (
            torch.zeros(2, 3, 4, 4),
            torch.zeros(3).long(),
            r"images of shape \(2, 3, 4, 4\) and labels of shape \(3,\); exp",
        ),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 1).long(), r"expected \(N, C, H, W\) and \(N,\), one label for each"),
        (torch.zeros(0, 3, 4, 4), torch.zeros(0).long(), "tensors: holds no images"),
    ],
)
def test_labelled_images_must_go_together(images, labels, text):
    with pytest.raises(DataError, match=text):
        LabelledImages(images, labels)


def test_expansion_and_records_can_use_it(sample):
    data = sample
    assert isinstance(data, Batches)
    described = json.loads(json.dumps(data.describe()))
    assert described == {
        "source": "CIFAR-10 sample inside the package",
        "images": len(data),
        "shape": [3, 32, 32],
        "classes": 10,
        "normalisation": {"mean": list(CIFAR10[0]), "std": list(CIFAR10[1])},
        "fingerprint": data.fingerprint(),
    }
    assert labelled().describe()["normalisation"] is None


# --- the sample -----------------------------------------------------------------------------------------------------


def test_the_sample_is_small_balanced_and_of_the_statistics_it_says(sample):
    data = sample
    assert (Path(morph.data.__file__).parent / "sample" / "cifar10.npz").stat().st_size < 1_000_000
    assert data.classes == tuple(CLASSES)
    assert len(data) >= 320
    assert set(data.labels.bincount(minlength=10).tolist()) == {len(data) // 10}
    assert data.images.mean((0, 2, 3)).abs().max() < 0.1
    assert (data.images.std((0, 2, 3)) - 1).abs().max() < 0.1
    assert (data.mean, data.std) == CIFAR10


def test_the_sample_is_what_its_file_holds(sample):
    path = Path(morph.data.__file__).parent / "sample" / "cifar10.npz"
    with np.load(path, allow_pickle=False) as held:
        arrays = dict(held)
    data, i = sample, 1234
    blob = arrays["jpeg"][arrays["offsets"][i] : arrays["offsets"][i + 1]].tobytes()
    image = np.asarray(Image.open(io.BytesIO(blob)))
    assert torch.allclose(data.images[i].double(), obvious(image[None], CIFAR10)[0], rtol=0, atol=2e-6)
    files = arrays["files"].tolist()
    assert len(set(files)) == len(data) == len(arrays["offsets"]) - 1
    assert [name.split("/")[0] for name in files] == [data.classes[y] for y in data.labels]
    assert arrays["offsets"][-1] == len(arrays["jpeg"])


def test_a_limit_draws_from_all_classes_by_seed_and_leaves_the_global_generator_alone(sample):
    state = torch.get_rng_state()
    parts = [open_data(None, input_shape=(3, 32, 32), num_classes=10, limit=100, seed=s) for s in (5, 5, 6)]
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(part) for part in parts] == [100] * 3
    assert len(Counter(parts[0].labels.tolist())) == 10
    assert parts[0].fingerprint() == parts[1].fingerprint() != parts[2].fingerprint()
    whole, chosen = sample, choose(len(sample), 100, 5)
    assert torch.equal(parts[0].images, whole.images[chosen])
    assert torch.equal(parts[0].labels, whole.labels[chosen])


@pytest.mark.parametrize(
    ("shape", "classes", "text"),
    [
        ((3, 224, 224), 10, "a model that takes inputs of 3x224x224 and tells 10 classes apart; give --data"),
        (
            (3, 32, 32),
            100,
            "takes inputs of 3x32x32 and tells 100 classes apart; give --data: an image folder, a CIFAR",
        ),
        ((3, 32, 32), None, "tells an unknown number of classes apart; give --data"),
        (None, None, r"inputs of unknown shape \(--input says it\) and tells an unknown number of classes"),
    ],
)
def test_without_data_other_models_are_told_to_give_some(shape, classes, text):
    with pytest.raises(DataError, match=text):
        open_data(None, input_shape=shape, num_classes=classes)


def test_a_damaged_sample_is_named(tmp_path, monkeypatch):
    (tmp_path / "cifar10.npz").write_bytes(b"PK\x03\x04 nothing")
    monkeypatch.setattr("morph.sample.resources.files", lambda name: tmp_path)
    with pytest.raises(
        DataError, match=r"the sample inside the package cannot be read \(BadZipFile\); install the pack"
    ):
        cifar10()


# --- image folders --------------------------------------------------------------------------------------------------


def test_a_folder_reads_as_torchvision_does(tmp_path):
    root = folder(tmp_path)
    data = open_data(root, input_shape=(3, 7, 11), num_classes=3, limit=None)
    transform = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*IMAGENET)])
    reference = list(datasets.ImageFolder(str(root), transform))
    assert close(data, torch.stack([x for x, _ in reference]).double())
    assert data.labels.tolist() == [y for _, y in reference]
    assert (data.classes, data.source, data.mean, data.std) == (("ant", "bee", "cat"), str(root), *IMAGENET)


def test_the_comparison_above_would_tell_other_statistics(tmp_path):
    data = open_data(folder(tmp_path), mean_std=CIFAR10)
    images = np.stack([np.asarray(Image.open(path)) for path in sorted(tmp_path.glob("*/*"))])
    assert close(data, obvious(images, CIFAR10))
    assert not close(data, obvious(images, IMAGENET))
    assert not close(data, obvious(images[::-1], CIFAR10))


def test_cifar_sized_folders_get_the_statistics_of_cifar(tmp_path):
    data = open_data(folder(tmp_path, per_class=1, size=(32, 32)))
    assert (data.mean, data.std) == CIFAR10


def test_a_wide_image_is_scaled_to_cover_and_cropped_at_the_centre(tmp_path):
    striped = np.zeros((12, 24, 3), np.uint8)
    striped[:, 6:18] = 255
    (tmp_path / "a").mkdir()
    Image.fromarray(striped).save(tmp_path / "a" / "0.png")
    plain = ((0.0,) * 3, (1.0,) * 3)
    whole = open_data(tmp_path, input_shape=(3, 24, 24), mean_std=plain).images
    assert whole.shape == (1, 3, 24, 24)
    assert (whole[..., 1:-1] == 1).all()
    wide = open_data(tmp_path, input_shape=(3, 6, 12), mean_std=plain).images
    assert (wide[..., :2] == 0).all()
    assert (wide[..., 4:8] == 1).all()


def test_images_of_different_sizes_are_brought_to_one_shape(tmp_path):
    folder(tmp_path)
    Image.fromarray(pixels(40, 13, 3)).save(tmp_path / "ant" / "0.png")
    assert open_data(tmp_path, input_shape=(3, 17, 19)).images.shape == (15, 3, 17, 19)
    with pytest.raises(
        DataError, match=r"bee.0.png is 3x7x11, the first is 3x40x13; give the shape .* with --input"
    ) as e:
        (tmp_path / "ant" / "1.png").unlink()
        for i in (2, 3, 4):
            (tmp_path / "ant" / f"{i}.png").unlink()
        open_data(tmp_path)
    assert "\n" not in str(e.value)


def test_grey_palette_and_transparent_images_are_read_as_colour_and_colour_as_grey(tmp_path):
    (tmp_path / "a").mkdir()
    for mode in ("L", "P", "RGBA", "CMYK", "1"):
        Image.fromarray(pixels(8, 8, 3)).convert(mode).save(tmp_path / "a" / f"{mode}.tif")
    assert open_data(tmp_path).images.shape == (5, 3, 8, 8)
    grey = open_data(tmp_path, input_shape=(1, 8, 8), mean_std=((0.5,), (0.25,)))
    assert grey.images.shape == (5, 1, 8, 8)
    with pytest.raises(DataError, match="there are no usual statistics for images of 1x8x8; give --mean and --std"):
        open_data(tmp_path, input_shape=(1, 8, 8))


@pytest.mark.parametrize(
    ("there", "split", "used"),
    [
        (("test", "train"), "test", "test"),
        (("test", "train"), "train", "train"),
        (("val", "train"), "test", "val"),
        (("train",), "test", "train"),
        (("val",), "train", "val"),
    ],
)
def test_a_folder_with_parts_says_which_one_was_read(tmp_path, there, split, used):
    for n, part in enumerate(there):
        folder(tmp_path / part, per_class=n + 1)
    data = open_data(tmp_path, split=split)
    assert data.source == str(tmp_path / used)
    assert len(data) == 3 * (there.index(used) + 1)


def test_a_class_may_be_called_train(tmp_path):
    data = open_data(folder(tmp_path, classes=("bus", "test", "train")))
    assert data.classes == ("bus", "test", "train")
    assert data.source == str(tmp_path)


def test_only_the_images_that_are_needed_are_decoded(tmp_path, monkeypatch):
    folder(tmp_path)
    calls = []
    real = morph.sources.decode
    monkeypatch.setattr(morph.sources, "decode", lambda *a: calls.append(a) or real(*a))
    data = open_data(tmp_path, limit=4, seed=1)
    assert len(calls) == len(data) == 4
    assert data.labels.tolist() != [0, 0, 0, 0]


@pytest.mark.parametrize("spoil", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"no image"])
def test_an_image_that_cannot_be_read_is_named(tmp_path, spoil):
    folder(tmp_path, suffix=".jpg")
    bad = tmp_path / "bee" / "2.jpg"
    bad.write_bytes(spoil(bad.read_bytes()))
    with pytest.raises(DataError, match=r"bee.2.jpg: cannot be read as an image: ") as error:
        open_data(tmp_path)
    assert "\n" not in str(error.value)


def test_folders_without_images_are_refused(tmp_path):
    with pytest.raises(
        DataError, match="has no folders of classes with images in them; the data may be an image folder"
    ):
        open_data(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="its 1 folders hold no images"):
        open_data(tmp_path)


def test_a_folder_with_more_classes_than_the_model_is_refused(tmp_path):
    with pytest.raises(DataError, match="has 3 classes, the model has 2; give data of the model's classes"):
        open_data(folder(tmp_path), num_classes=2)
    assert len(open_data(tmp_path, num_classes=5)) == 15


def test_colour_images_do_not_fit_a_model_of_four_channels(tmp_path):
    with pytest.raises(DataError, match=r"ant.0.png is 3x7x11, the model takes 4x7x11; give images of that shape"):
        open_data(folder(tmp_path), input_shape=(4, 7, 11))


def test_a_missing_path_says_what_data_may_be(tmp_path):
    with pytest.raises(
        DataError, match=r"gone: there is no such file or folder; the data may be an image folder, a CI"
    ):
        open_data(tmp_path / "gone")
    with pytest.raises(DataError, match=r"C:.data: there is no such file or folder"):
        open_data("C:/data")


def test_a_split_and_a_limit_must_make_sense(tmp_path):
    with pytest.raises(DataError, match="a limit of 0 images; give at least 1, or none to read all"):
        open_data(tmp_path, limit=0)
    with pytest.raises(DataError, match="split 'dev' is not one of test, train"):
        open_data(tmp_path, split="dev")  # type: ignore[arg-type]


# --- CIFAR's own files ----------------------------------------------------------------------------------------------


def cifar_pickle(path: Path, n: int, key: str, classes: int, seed: int = 0, *, protocol: int = 2) -> dict[str, object]:
    content = {
        "data": pixels(n, 3072, seed=seed),
        key: [(7 * i + seed) % classes for i in range(n)],
        "filenames": ["x"],
    }
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return content


def cifar_folder(root: Path, n: int = 6) -> Path:
    home = root / "cifar-10-batches-py"
    home.mkdir(parents=True)
    (home / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"c{i}" for i in range(10)]}, protocol=2))
    for i in range(1, 6):
        cifar_pickle(home / f"data_batch_{i}", n, "labels", 10, i)
    cifar_pickle(home / "test_batch", n + 1, "labels", 10, 9)
    return home


def cifar100_folder(root: Path) -> Path:
    home = root / "cifar-100-python"
    home.mkdir(parents=True)
    (home / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"f{i}" for i in range(100)]}, protocol=2))
    for seed, name in enumerate(("train", "test")):
        cifar_pickle(home / name, 5, "fine_labels", 100, seed)
    return home


def reference(path: Path, key: str = "labels") -> tuple[torch.Tensor, list[int]]:
    """The same file, read by an unpickler that would run anything."""
    content = pickle.loads(path.read_bytes(), encoding="latin1")
    return obvious(content["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), CIFAR10), content[key]


@pytest.mark.parametrize("inside", [True, False])
def test_cifar10_reads_as_its_pickles_say(tmp_path, inside):
    home = cifar_folder(tmp_path)
    test = open_data(home if inside else tmp_path, input_shape=(3, 32, 32), num_classes=10)
    images, labels = reference(home / "test_batch")
    assert close(test, images)
    assert test.labels.tolist() == labels
    assert test.classes == tuple(f"c{i}" for i in range(10))
    assert test.source == f"{home} (test)"
    train = open_data(home, split="train", limit=None)
    parts = [reference(home / f"data_batch_{i}") for i in range(1, 6)]
    assert close(train, torch.cat([images for images, _ in parts]))
    assert train.labels.tolist() == [label for _, labels in parts for label in labels]


def test_cifar100_is_taken_where_the_model_has_a_hundred_classes(tmp_path):
    cifar_folder(tmp_path)
    home = cifar100_folder(tmp_path)
    fine = open_data(tmp_path, num_classes=100)
    images, labels = reference(home / "test", "fine_labels")
    assert close(fine, images)
    assert fine.labels.tolist() == labels
    assert len(fine.classes or ()) == 100
    assert len(open_data(tmp_path, num_classes=10)) == 7
    with pytest.raises(DataError, match="has 100 classes, the model has 10"):
        open_data(home, num_classes=10)


def test_cifar_is_scaled_to_a_larger_input(tmp_path):
    data = open_data(cifar_folder(tmp_path), input_shape=(3, 48, 40))
    assert data.images.shape == (7, 3, 48, 40)
    assert (data.mean, data.std) == IMAGENET


def python2_batch(images: np.ndarray, labels: list[int]) -> bytes:
    """The opcodes that Python 2 and its numpy wrote into the published files."""

    def text(value: str) -> bytes:
        return b"U" + bytes([len(value)]) + value.encode()

    raw = images.tobytes()
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text("b") + b"\x87R"
    dtype = b"cnumpy\ndtype\n" + text("u1") + b"K\x00K\x01\x87R(K\x03" + text("|")
    dtype += b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    shape = b"".join(b"M" + struct.pack("<H", n) for n in images.shape) + b"\x86"
    state = b"(K\x01" + shape + dtype + b"I00\nT" + struct.pack("<i", len(raw)) + raw + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + text("labels") + numbers + text("data") + array + state + b"u."


def test_the_published_files_of_python_2_are_read(tmp_path):
    home = cifar_folder(tmp_path)
    (home / "test_batch").write_bytes(python2_batch(pixels(5, 3072, seed=77), [3, 1, 4, 1, 5]))
    images, labels = reference(home / "test_batch")
    data = open_data(home)
    assert close(data, images)
    assert data.labels.tolist() == labels == [3, 1, 4, 1, 5]


class Runs:
    """Pickles as a call of ``function``."""

    def __init__(self, function, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("which", ["test_batch", "batches.meta"])
def test_a_hostile_pickle_does_not_run(tmp_path, which, protocol):
    home, marker = cifar_folder(tmp_path), tmp_path / "marker"
    hostile = home / which
    hostile.write_bytes(pickle.dumps({"data": Runs(os.mkdir, str(marker))}, protocol=protocol))
    with pytest.raises(
        DataError, match=rf"{which}: wants (posix|nt).mkdir, which CIFAR's files do not hold; refused, not"
    ):
        open_data(home)
    assert not marker.exists()
    pickle.loads(hostile.read_bytes())  # the file is hostile indeed
    assert marker.exists()


@pytest.mark.parametrize(
    ("opcodes", "wanted"),
    [
        (b"cnumpy\nload\n(S'%s'\ntR.", "numpy.load"),
        (b"\x80\x04\x8c\x05numpy\x8c\x11ndarray.__class__\x93(S'%s'\ntR.", "numpy.ndarray.__class__"),
        (b"c__builtin__\neval\n(S'%s'\ntR.", "__builtin__.eval"),
        (b"(S'%s'\nios\nmkdir\n.", "os.mkdir"),
        (b"(cos\nmkdir\nS'%s'\no.", "os.mkdir"),
    ],
)
def test_other_ways_to_name_a_function_are_refused_too(tmp_path, opcodes, wanted):
    home, marker = cifar_folder(tmp_path), tmp_path / "marker"
    (home / "test_batch").write_bytes(opcodes % str(marker).encode())
    with pytest.raises(DataError, match=f"test_batch: wants {wanted}, which"):
        open_data(home)
    assert not marker.exists()


@pytest.mark.parametrize(
    "opcodes",
    [
        b"c_codecs\nencode\n}S'arguments'\nS'x'\nsb.",  # sets the state of what stands for the function itself
        b"c_codecs\nencode\n(N}S'__init__'\nNstb.",
    ],
)
def test_the_stand_in_cannot_be_changed_by_a_file(tmp_path, opcodes):
    home = cifar_folder(tmp_path)
    (home / "batches.meta").write_bytes(opcodes)
    with pytest.raises(DataError, match=r"batches.meta: cannot be read as one of CIFAR's files: damaged \(TypeError\)"):
        open_data(home)
    assert morph.cifar._StandIn.arguments == ()
    assert morph.cifar._StandIn(1).arguments == (1,)


def spoilt(**changes: object) -> bytes:
    content = {"data": pixels(3, 3072), "labels": [0, 1, 2], **changes}
    return pickle.dumps({key: value for key, value in content.items() if value is not None}, protocol=2)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (spoilt(labels=None), "test_batch: holds no data and labels that can be read, as CIFAR's files do"),
        (spoilt(data=None), "holds no data and labels that can be read"),
        (spoilt(data=[1, 2]), "holds no data and labels that can be read"),
        (spoilt(labels=[0, 1, "a"]), "holds no data and labels that can be read"),
        (spoilt(labels=[0, 1, 2**70]), "holds no data and labels that can be read"),
        (spoilt(labels=[0, 1]), r"data of shape \(3, 3072\) and 2 labels; expected uint8 of \(N, 3072\) and N, as in"),
        (spoilt(data=pixels(3, 1024)), r"data of shape \(3, 1024\) and 3 labels"),
        (spoilt(data=pixels(3, 3072).astype(np.int8)), r"expected uint8"),
        (python2_batch(pixels(0, 3072), []), r"\(test\): holds no images"),
        (spoilt(labels=[0, 10, 2]), "image 1 has label 10, expected 0 to 9, the classes of the model"),
        (spoilt()[:-400], r"test_batch: cannot be read as one of CIFAR's files: damaged \("),
        (b"", r"cannot be read as one of CIFAR's files: damaged \(EOFError\)"),
        (pickle.dumps([1], protocol=2), "test_batch: holds a list, expected a dictionary, as in CIFAR's files"),
        (None, "test_batch: cannot be read as one of CIFAR's files: No such file or directory"),
    ],
)
def test_a_spoilt_cifar_file_is_named(tmp_path, content, text):
    home = cifar_folder(tmp_path)
    (home / "test_batch").unlink()
    if content is not None:
        (home / "test_batch").write_bytes(content)
    with pytest.raises(DataError, match=text) as error:
        open_data(home, num_classes=10)
    assert "\n" not in str(error.value)


def test_arrays_in_column_order_are_read_in_that_order(tmp_path):
    home = cifar_folder(tmp_path)
    (home / "test_batch").write_bytes(spoilt(data=np.asfortranarray(pixels(3, 3072))))
    assert close(open_data(home), reference(home / "test_batch")[0])


def test_names_of_cifar_classes_must_be_there(tmp_path):
    home = cifar_folder(tmp_path)
    (home / "batches.meta").write_bytes(pickle.dumps({"names": []}, protocol=2))
    with pytest.raises(DataError, match=r"batches.meta: holds no list of label_names, as CIFAR's files do"):
        open_data(home)


# --- .npz -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [("images", "labels"), ("x", "y")])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("shape", [(3, 7, 11), None])
def test_an_npz_is_read_in_either_order_of_axes(tmp_path, keys, channels_last, shape):
    images, labels = pixels(5, 7, 11, 3), np.array([4, 0, 2, 2, 1], np.uint16)
    stored = images if channels_last else images.transpose(0, 3, 1, 2)
    path = npz(tmp_path / "a.npz", **{keys[0]: stored, keys[1]: labels})
    data = open_data(path, input_shape=shape, num_classes=5)
    assert close(data, obvious(images, IMAGENET))
    assert data.labels.tolist() == labels.tolist()
    assert (data.source, data.classes) == (str(path), None)


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "f8", "f2"])
def test_floating_point_images_are_taken_as_they_are_unless_statistics_are_given(tmp_path, dtype):
    images = np.random.default_rng(0).normal(size=(5, 3, 7, 11)).astype(dtype)
    path = npz(tmp_path / "a.npz", images=images, labels=np.zeros((5, 1), ">i8"))
    data = open_data(path, input_shape=(3, 7, 11))
    assert np.array_equal(data.images.numpy(), images.astype(np.float32))
    assert (data.mean, data.std) == (None, None)
    given = open_data(path, mean_std=((0.5, 0.25, 0.125), (2.0, 4.0, 8.0)))
    mean, std = (np.array(x).reshape(3, 1, 1) for x in ((0.5, 0.25, 0.125), (2.0, 4.0, 8.0)))
    assert np.allclose(given.images.numpy(), (images.astype(np.float64) - mean) / std, rtol=0, atol=1e-6)
    assert given.mean == (0.5, 0.25, 0.125)


def test_grey_images_need_no_axis_of_channels(tmp_path):
    path = npz(tmp_path / "a.npz", x=pixels(4, 7, 11), y=np.arange(4))
    data = open_data(path, input_shape=(1, 7, 11), mean_std=((0.5,), (0.5,)))
    assert close(data, obvious(pixels(4, 7, 11)[..., None], ((0.5,), (0.5,))))


def test_inputs_that_are_no_images_are_taken_as_they_are(tmp_path):
    path = npz(tmp_path / "a.npz", x=np.ones((4, 17), np.float32), y=np.arange(4))
    assert open_data(path, input_shape=(17,)).images.shape == open_data(path).images.shape == (4, 17)


GOOD = {"images": pixels(5, 3, 7, 11), "labels": np.arange(5)}
NAN = np.zeros((5, 3, 7, 11), np.float32)
NAN[3, 1, 2, 3] = np.nan


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"labels": None}, r"a.npz: holds images; expected images and labels, or x and y"),
        ({"labels": None, "images": None}, r"holds nothing; expected images and labels"),
        ({"labels": np.arange(4)}, r"images of shape \(5, 3, 7, 11\) and labels of shape \(4,\); expected"),
        (
            {"labels": np.zeros((5, 10), np.int64)},
            r"labels of shape \(5, 10\); expected \(N, C, H, W\) and \(N,\), one",
        ),
        ({"labels": np.arange(5.0)}, "labels are of float64, expected whole numbers"),
        ({"labels": np.array(list("abcde"))}, "labels are of <U1, expected whole numbers"),
        ({"labels": np.array([0, 1, 2, 5, 4])}, "image 3 has label 5, expected 0 to 4, the classes of the model"),
        ({"labels": np.array([0, -1, 2, 3, 4])}, "image 1 has label -1, expected 0 to 4"),
        (
            {"images": GOOD["images"].astype(int)},
            "images are of int64; expected uint8 in 0..255, or floats that are norm",
        ),
        ({"images": np.array(["a"] * 5)}, "images are of <U1; expected uint8"),
        ({"images": pixels(5, 3, 8, 11)}, r"images of 3x8x11, the model takes 3x7x11; bring them to that shape \(an"),
        ({"images": np.array(3, np.uint8)}, r"images of shape \(\) and labels of shape \(5,\)"),
        ({"images": pixels(0, 3, 7, 11), "labels": np.arange(0)}, "a.npz: holds no images"),
        ({"images": NAN}, r"a.npz: image 3 holds a value that is not finite \(NaN or infinity\)"),
        ({"images": np.full((5, 3, 7, 11), 1e300)}, "image 0 holds a value that is not finite"),
        ({"labels": np.array([None] * 5)}, r"cannot be read \(ValueError\): no .npz, damaged, or holding Python obj"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_a_wrong_npz_is_refused_in_one_line(tmp_path, changes, text):
    path = npz(tmp_path / "a.npz", **{k: v for k, v in {**GOOD, **changes}.items() if v is not None})
    with pytest.raises(DataError, match=text) as error:
        open_data(path, input_shape=(3, 7, 11), num_classes=5)
    assert "\n" not in str(error.value)


def test_negative_labels_are_refused_without_a_number_of_classes(tmp_path):
    path = npz(tmp_path / "a.npz", **{**GOOD, "labels": np.array([0, 1, 2, 3, -7])})
    with pytest.raises(DataError, match="image 4 has label -7, expected 0 or above"):
        open_data(path)


@pytest.mark.parametrize("keep", [0, 1, 30, 200, -20])
def test_a_truncated_npz_is_refused(tmp_path, keep):
    path = npz(tmp_path / "a.npz", **GOOD)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"a.npz: cannot be read \(\w+\): no .npz, damaged") as error:
        open_data(path)
    assert "\n" not in str(error.value)


def test_a_hostile_npz_does_not_run(tmp_path):
    marker = tmp_path / "marker"
    path = npz(tmp_path / "a.npz", images=np.array([Runs(os.mkdir, str(marker))], object), labels=np.arange(1))
    with pytest.raises(DataError, match="holding Python objects"):
        open_data(path)
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"just text", None])
def test_a_file_that_is_no_npz_says_what_data_may_be(tmp_path, content):
    path = tmp_path / "a.npy"
    path.write_bytes(content) if content else np.save(path, np.zeros(3))
    with pytest.raises(DataError, match=r"a.npy: cannot be read .*the data may be an image folder"):
        open_data(path)


@pytest.mark.parametrize(
    "mean_std",
    [((0.5,), (0.5,)), ((0.5,) * 3, (0.5,) * 2), ((0.5,) * 3, (0.5, 0.0, 0.5)), ((0.5,) * 3, (0.5, -1.0, 0.5))],
)
def test_statistics_must_fit_the_channels(tmp_path, mean_std):
    path = npz(tmp_path / "a.npz", **GOOD)
    with pytest.raises(
        DataError, match=r"do not fit images of 3x7x11; expected one number for each channel, and every"
    ):
        open_data(path, mean_std=mean_std)


# --- the user's loader ----------------------------------------------------------------------------------------------

X, Y = torch.randn(23, 3, 7, 11, generator=torch.Generator().manual_seed(0)), torch.arange(23) % 5

LOADERS = """
import torch
from torch.utils.data import DataLoader, TensorDataset
X, Y = torch.randn(23, 3, 7, 11, generator=torch.Generator().manual_seed(0)), torch.arange(23) % 5
read = []
class Counted(TensorDataset):
    def __getitem__(self, i):
        read.append(i)
        return super().__getitem__(i)
def loader(): return DataLoader(TensorDataset(X, Y), batch_size=4)
def batches(): return [(X[:9].requires_grad_(), Y[:9]), [X[9:], Y[9:].int()]]
def endless():
    while True: yield X, Y
def pair(): return X, Y
def dataset(): return Counted(X, Y)
def plain(): return [(x, int(y)) for x, y in zip(X, Y)]
def nothing(): return None
def empty(): return []
def empty_dataset(): return TensorDataset(X[:0], Y[:0])
def triple(): return [(X, Y, Y)]
def uneven(): return [(X, Y[:5])]
def sizes(): return [(X, Y), (X[..., 1:], Y)]
def floats(): return [(X, Y.float())]
def integers(): return [(X.int(), Y)]
def fails(): raise RuntimeError("no such bucket")
def late():
    yield X, Y
    raise OSError("connection lost")
"""


@pytest.fixture
def loaders(tmp_path, monkeypatch) -> str:
    (tmp_path / "my_loaders.py").write_text(LOADERS)
    monkeypatch.chdir(tmp_path)
    yield "my_loaders"
    sys.modules.pop("my_loaders", None)


@pytest.mark.parametrize("name", ["loader", "batches", "pair", "dataset"])
def test_a_callable_may_give_batches_a_dataset_or_tensors(loaders, name):
    data = open_data(f"{loaders}:{name}", input_shape=(3, 7, 11), num_classes=5, limit=None)
    assert torch.equal(data.images, X)
    assert torch.equal(data.labels, Y)
    assert data.source == f"my_loaders:{name}"
    assert not data.images.requires_grad


@pytest.mark.parametrize("name", ["loader", "endless", "late", "pair", "batches"])
def test_no_more_is_taken_from_a_callable_than_the_limit(loaders, name):
    data = open_data(f"{loaders}:{name}", limit=10)
    assert torch.equal(data.images, X[:10])
    assert torch.equal(data.labels, Y[:10])


def test_a_dataset_is_read_at_random_and_only_as_far_as_needed(loaders):
    data = open_data(f"{loaders}:dataset", limit=6, seed=4)
    read = sys.modules["my_loaders"].read
    assert read == choose(23, 6, 4) != list(range(6))
    assert torch.equal(data.images, X[read])
    assert torch.equal(data.labels, Y[read])


def test_the_search_path_is_as_before(loaders):
    before = list(sys.path)
    open_data(f"{loaders}:loader")
    assert sys.path == before


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "nothing",
            r"my_loaders:nothing: gave a NoneType, expected batches \(images, labels\), a Dataset or a pair of",
        ),
        ("empty", "my_loaders:empty: gave no batches"),
        ("empty_dataset", "gave no batches"),
        ("triple", r"a batch must be a pair of tensors \(images, labels\), got tuple"),
        ("plain", "a batch must be a pair of tensors"),
        ("uneven", r"images of shape \(23, 3, 7, 11\) and labels of shape \(5,\)"),
        ("sizes", "my_loaders:sizes: RuntimeError: Sizes of tensors must match"),
        ("floats", "labels are of torch.float32, expected whole numbers"),
        ("integers", "images are of torch.int32; expected uint8"),
        ("fails", "my_loaders:fails: RuntimeError: no such bucket"),
        ("late", "my_loaders:late: OSError: connection lost"),
        ("missing", "my_loaders:missing: AttributeError: module 'my_loaders' has no attribute 'missing'"),
        ("X", "my_loaders:X: TypeError: 'Tensor' object is not callable"),
    ],
)
def test_a_callable_that_gives_something_else_is_refused(loaders, name, text):
    with pytest.raises(DataError, match=text):
        open_data(f"{loaders}:{name}", limit=None)


def test_a_module_that_is_not_there_is_named():
    with pytest.raises(DataError, match=r"no_such_module:data: ModuleNotFoundError: No module named 'no_such_module'"):
        open_data("no_such_module:data")


def test_the_users_data_is_left_as_it_was():
    images, labels = X.clone(), Y.clone()
    made = next(iter(DataLoader(TensorDataset(images, labels), batch_size=23)))
    data = morph.data.load(
        morph.sources._tensors("given", *made, None), input_shape=None, num_classes=5, limit=7, mean_std=None, seed=0
    )
    data.images.zero_()
    assert torch.equal(made[0], X)
    assert torch.equal(made[1], Y)


# --- the command line -----------------------------------------------------------------------------------------------


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_data(parser)
    return parser.parse_args(argv)


def test_the_command_line_reads_the_sample_by_default():
    data = data_from(parse("--limit", "20"), input_shape=(3, 32, 32), num_classes=10)
    assert len(data) == 20
    assert torch.equal(data.images, open_data(None, input_shape=(3, 32, 32), num_classes=10, limit=20).images)
    assert (parse().limit, parse().batch_size, parse().split, parse().data) == (1024, 64, "test", None)


def test_every_argument_reaches_the_data(tmp_path):
    folder(tmp_path / "test")
    folder(tmp_path / "train", per_class=7)
    argv = ["--data", str(tmp_path), "--split", "train", "--limit", "9", "--mean", "0.1,0.2,0.3", "--std", "1,2,3"]
    args = parse(*argv)
    args.seed = 3
    data = data_from(args, input_shape=(3, 7, 11), num_classes=3)
    assert (data.source, len(data)) == (str(tmp_path / "train"), 9)
    assert (data.mean, data.std) == ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    args.seed = 4
    assert data_from(args, input_shape=(3, 7, 11), num_classes=3).fingerprint() != data.fingerprint()


def test_fewer_classes_than_the_model_has_are_noted(tmp_path, capsys):
    args = parse("--data", str(folder(tmp_path)))
    data_from(args, input_shape=(3, 7, 11), num_classes=1000)
    assert "has 3 classes, the model 1000; class folders are numbered from 0" in capsys.readouterr().err
    data_from(args, input_shape=(3, 7, 11), num_classes=3)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("given", "missing"), [("--mean", "--std"), ("--std", "--mean")])
def test_mean_and_std_come_together(given, missing):
    with pytest.raises(DataError, match=f"{given} is given without {missing}; give both, or neither for the usual"):
        data_from(parse(given, "0.5,0.5,0.5"), input_shape=(3, 32, 32), num_classes=10)


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--limit", "0"], "'0' is not a whole number of at least 1"),
        (["--limit", "many"], "'many' is not a whole number of at least 1"),
        (["--batch-size", "-3"], "'-3' is not a whole number of at least 1"),
        (["--mean", "0.5;0.5"], "'0.5;0.5' is not one number for each channel; write it like 0.49,0.48,0.45"),
        (["--std", "nan,1,1"], "'nan,1,1' is not one number for each channel"),
        (["--split", "dev"], "invalid choice: 'dev'"),
    ],
)
def test_wrong_arguments_are_refused(argv, text, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(*argv)
    assert text in capsys.readouterr().err


def test_the_arguments_import_nothing_heavy():
    code = "import sys, morph.cli.data_arguments; print([m for m in ('torch', 'numpy', 'PIL') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- writing the sample ---------------------------------------------------------------------------------------------


def make_sample(monkeypatch, *argv: object) -> int:
    monkeypatch.setattr(sys, "argv", ["make_sample.py", *map(str, argv)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(MAKE_SAMPLE), run_name="__main__")
    return int(ended.value.code)


def test_the_sample_is_written_byte_for_byte_and_the_same_each_time(tmp_path, monkeypatch, capsys):
    folder(tmp_path / "test", suffix=".jpg")
    one, two = tmp_path / "one.npz", tmp_path / "two.npz"
    for out in (one, two, one):
        assert make_sample(monkeypatch, "--data", tmp_path, "--out", out, "--per-class", 4) == 0
    assert "two.npz: 12 images of 3 classes" in capsys.readouterr().out
    assert one.read_bytes() == two.read_bytes()
    with np.load(one, allow_pickle=False) as held:
        arrays = dict(held)
    assert arrays["classes"].tolist() == ["ant", "bee", "cat"]
    assert arrays["labels"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    for i, name in enumerate(arrays["files"]):
        blob = arrays["jpeg"][arrays["offsets"][i] : arrays["offsets"][i + 1]].tobytes()
        assert blob == (tmp_path / "test" / name).read_bytes()


def test_writing_the_sample_refuses_what_it_cannot_use(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.npz"
    assert make_sample(monkeypatch, "--data", tmp_path, "--out", out) == 2
    assert "test: has no folders of classes" in capsys.readouterr().err
    folder(tmp_path / "test", suffix=".jpg")
    assert make_sample(monkeypatch, "--data", tmp_path, "--out", out, "--per-class", 6) == 2
    assert "ant: holds 5 .jpg files, 6 are needed" in capsys.readouterr().err
    assert make_sample(monkeypatch, "--data", tmp_path, "--out", tmp_path / "no" / "a.npz", "--per-class", 2) == 2
    assert "does not exist" in capsys.readouterr().err
    assert not out.exists()
