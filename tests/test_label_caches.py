"""Caches of labels and logits: what is in them, going on after a kill, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from models import Snapshot, randomise
from torch import nn

import morph
from morph import zoo
from morph.augmentation import Augmented
from morph.errors import CacheError, DataError, HeadError, OutputError
from morph.images import LabelledImages
from morph.label_heads import MultiChannelHead, channel_logits, head_of, score_path
from morph.labels import LabelCache, LogitCache, WithTargets, extract_labels, extract_logits
from morph.labels.digests import teacher_digest


class Teacher(nn.Module):
    """A small one with five classes of nine channels: 45 bits, which is no whole number of bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.head = MultiChannelHead(4, 5, (8, 8), 9, kernel=3, stride=2)

    def forward(self, x):
        return self.head(self.drop(self.norm(self.conv(x))))


def teacher(seed: int = 0) -> Teacher:
    return randomise(Teacher(), seed).train()


def data(n: int = 23, seed: int = 1) -> LabelledImages:
    generator = torch.Generator().manual_seed(seed)
    return LabelledImages(
        torch.randn(n, 3, 8, 8, generator=generator), torch.randint(0, 5, (n,), generator=generator), source="some"
    )


def expected_bits(model: nn.Module, images: LabelledImages, threshold: float) -> np.ndarray:
    logits = channel_logits(model.eval(), images.images)[1].detach().double().numpy()
    return (1 / (1 + np.exp(-logits)) >= threshold).astype(np.uint8)


@pytest.mark.parametrize("threshold", [0.5, 0.2])
def test_bits_are_the_votes_above_the_threshold(tmp_path, threshold):
    model, images = teacher(), data()
    snapshot, told = Snapshot(model), []
    cache = extract_labels(
        model, images, tmp_path / "l.bits", threshold=threshold, batch_size=5, on_progress=lambda *x: told.append(x)
    )
    assert snapshot.same()
    assert told == [(0, 23), (5, 23), (10, 23), (15, 23), (20, 23), (23, 23)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["l.bits"]
    bits = expected_bits(teacher(), images, threshold)
    assert 0.1 < bits.mean() < 0.9
    assert np.array_equal(cache[:].numpy(), bits)
    assert not np.array_equal(expected_bits(teacher(), images, 0.7), bits)
    index = torch.tensor([22, 0, 7, 7])
    assert np.array_equal(cache[index].numpy(), bits[index.numpy()])
    assert np.array_equal(cache[[3, 1]].numpy(), bits[[3, 1]])
    assert np.array_equal(cache[4].numpy(), bits[4])
    assert np.array_equal(cache.votes(index).numpy(), bits[index.numpy()].reshape(4, 5, 9).sum(2))
    assert len(cache) == 23
    size = (tmp_path / "l.bits").stat().st_size
    assert size - 23 * 6 < 700  # 45 bits are six bytes


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_logits(tmp_path, dtype):
    model, images = randomise(zoo.build("resnet-8", 7)), data(9)
    snapshot = Snapshot(model)
    cache = extract_logits(model, images, tmp_path / "l", dtype=dtype, batch_size=4)
    assert snapshot.same()
    model.eval()
    expected = torch.cat([model(x) for x in images.images.split(4)]).detach()
    if dtype == "float16":
        expected = expected.half().float()
    assert torch.equal(cache[:], expected)
    assert torch.equal(cache[torch.tensor([8, 1])], expected[[8, 1]])
    assert torch.equal(cache[3], expected[3])
    assert cache[0].dtype == torch.float32
    assert LogitCache.open(tmp_path / "l", teacher=model, data=images).header == cache.header


def test_the_first_output_of_a_darts_network_is_taken(tmp_path):
    model, images = (
        randomise(zoo.build("darts-4x4", 3)).train(),
        LabelledImages(torch.randn(2, 3, 32, 32), torch.zeros(2).long()),
    )
    cache = extract_logits(model, (images.images, images.labels), tmp_path / "l")
    assert torch.allclose(cache[:], model.eval()(images.images), rtol=1e-6)


def test_the_same_call_again_computes_nothing(tmp_path):
    model, images = teacher(), data()
    path = tmp_path / "l"
    first = extract_labels(model, images, path, batch_size=5)
    before = path.read_bytes(), path.stat().st_mtime_ns
    head_of(model).register_forward_hook(lambda *_: pytest.fail("the teacher was run"))
    again = extract_labels(model, images, path, batch_size=7)
    assert torch.equal(again[:], first[:])
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_a_run_that_fails_half_way_goes_on(tmp_path):
    model, images = teacher(), data()
    whole = extract_labels(model, images, tmp_path / "whole", batch_size=4)
    path = tmp_path / "l"

    def stop(done: int, total: int) -> None:
        if done == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract_labels(model, images, path, batch_size=4, on_progress=stop)
    assert not path.exists()
    part = tmp_path / "l.part"
    with part.open("ab") as file:
        file.write(b"torn")  # a row that was not written to its end
    told = []
    cache = extract_labels(model, images, path, batch_size=4, on_progress=lambda done, total: told.append(done))
    assert told[0] == 12
    assert path.read_bytes() == (tmp_path / "whole").read_bytes()
    assert torch.equal(cache[:], whole[:])
    assert not part.exists()


def test_killed_at_any_moment_it_ends_with_the_same_file(tmp_path):
    script = textwrap.dedent(
        """
        import os, signal, sys
        sys.path.insert(0, sys.argv[1])
        from test_label_caches import data, teacher
        from morph.labels import extract_labels
        def progress(done, total):
            if done == int(sys.argv[3]):
                os.kill(os.getpid(), signal.SIGKILL)
        extract_labels(teacher(), data(), sys.argv[2], batch_size=3, on_progress=progress)
        """
    )
    path, here = tmp_path / "l", os.path.dirname(__file__)
    for moment in (0, 9, 23):
        run = subprocess.run([sys.executable, "-c", script, here, str(path), str(moment)], check=False)
        assert run.returncode == -signal.SIGKILL
        assert not path.exists()
        assert (tmp_path / "l.part").exists()
    extract_labels(teacher(), data(), path, batch_size=3)
    extract_labels(teacher(), data(), tmp_path / "whole", batch_size=3)
    assert path.read_bytes() == (tmp_path / "whole").read_bytes()


def test_what_another_run_began_is_not_taken_up(tmp_path):
    def stop(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    path = tmp_path / "l"
    with pytest.raises(KeyboardInterrupt):
        extract_labels(teacher(), data(), path, batch_size=4, on_progress=stop)
    before = (tmp_path / "l.part").read_bytes()
    for model, images, options, text in [
        (teacher(1), data(), {"batch_size": 4}, r"l\.part: is of another teacher: .*; remove it to begin anew"),
        (teacher(), data(seed=2), {"batch_size": 4}, r"l\.part: is of other data"),
        (teacher(), data(), {"batch_size": 4, "threshold": 0.4}, "another setting: threshold is 0.5, expected 0.4"),
        (teacher(), data(), {"batch_size": 5}, "another setting: batch_size is 4, expected 5"),
    ]:
        with pytest.raises(CacheError, match=text):
            extract_labels(model, images, path, **options)
        assert (tmp_path / "l.part").read_bytes() == before


def test_two_processes_do_not_write_one_file(tmp_path):
    images, path = data(), tmp_path / "l"

    def second(done: int, total: int) -> None:
        if done:
            with pytest.raises(CacheError, match="another process is writing it"):
                extract_labels(teacher(), images, path, batch_size=4)

    assert len(extract_labels(teacher(), images, path, batch_size=4, on_progress=second)) == 23


def test_a_cache_of_something_else_is_refused_and_stays(tmp_path):
    path, model, images = tmp_path / "l", teacher(), data()
    extract_labels(model, images, path)
    before = path.read_bytes()
    with pytest.raises(CacheError, match=r"l: is of another teacher: its digest is .* make a cache of this one under"):
        LabelCache.open(path, teacher=teacher(1))
    with pytest.raises(CacheError, match="l: is of other data: their fingerprint is"):
        LabelCache.open(path, data=data(seed=3))
    with pytest.raises(CacheError, match="l: holds labels, expected logits"):
        LogitCache.open(path)
    with pytest.raises(CacheError, match=r"l: is of another teacher: .* give another name, or force to replace it"):
        extract_labels(teacher(1), images, path)
    with pytest.raises(CacheError, match="has 23 images: index 23 is out of bounds"):
        LabelCache.open(path)[23]
    assert path.read_bytes() == before
    assert extract_labels(teacher(1), images, path, force=True).header.teacher == teacher_digest(teacher(1))


def test_every_damage_is_seen_and_the_file_stays(tmp_path):
    path = tmp_path / "l"
    extract_labels(teacher(), data(), path)
    whole = path.read_bytes()
    length = int.from_bytes(whole[8:16], "little")
    start = 48 + length
    header = json.loads(whole[48:start])

    def with_header(**changes: object) -> bytes:
        import hashlib

        text = json.dumps(header | changes).encode()
        return whole[:8] + len(text).to_bytes(8, "little") + hashlib.sha256(text).digest() + text + whole[start:]

    cases = {
        "not a cache of labels or logits": [b"", whole[:5], b"x" + whole[1:]],
        "its header is damaged": [whole[:30], whole[:60], whole[:50] + b"?" + whole[51:], whole[:8] + b"\xff" * 60],
        "truncated: it has 137 bytes of rows": [whole[:-1]],
        "damaged: it has 139 bytes of rows": [whole + b"x"],
        "its rows are damaged": [whole[:-1] + bytes([whole[-1] ^ 8])],
        "its header is not one that this version knows": [
            with_header(new=1),
            with_header(samples=-1),
            with_header(samples="23"),
            with_header(row_bytes=5),
            with_header(dtype="float64"),
            with_header(kind="logits"),
            with_header(threshold=7),
        ],
    }
    for text, contents in cases.items():
        for content in contents:
            path.write_bytes(content)
            with pytest.raises(CacheError, match=text) as caught:
                LabelCache.open(path)
            assert "\n" not in str(caught.value)
            assert path.read_bytes() == content
    with pytest.raises(CacheError, match="not a cache of labels or logits"):
        path.write_bytes(b"precious")
        extract_labels(teacher(), data(), path)
    assert path.read_bytes() == b"precious"
    with pytest.raises(CacheError, match="nowhere: No such file"):
        LabelCache.open(tmp_path / "nowhere")


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    path, images = tmp_path / "l", data()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OutputError, match=r"l\.part: not written: No space left on device; what is in it stays"):
            extract_labels(teacher(), images, path, batch_size=4)
    assert not path.exists()
    told = []
    extract_labels(teacher(), images, path, batch_size=4, on_progress=lambda done, total: told.append(done))
    assert told == [23]


def test_bad_input(tmp_path):
    images = data()
    for call, error, text in [
        (
            lambda p: extract_labels(teacher(), images, p, threshold=0.0),
            DataError,
            "a threshold of 0.0; give a vote above",
        ),
        (lambda p: extract_labels(teacher(), images, p, batch_size=0), DataError, "a batch of 0 images"),
        (
            lambda p: extract_labels(nn.Flatten(), images, p),
            HeadError,
            "0 heads for multi-channel labels, expected one",
        ),
        (lambda p: extract_labels(teacher(), Augmented(images), p), DataError, "stay what they are, got Augmented"),
        (lambda p: extract_labels(teacher(), [images], p), DataError, "got list"),
        (lambda p: extract_logits(teacher(), images, p, dtype="int8"), DataError, "logits in 'int8'; give float16 or"),
        (lambda p: extract_logits(nn.Identity(), images, p), DataError, r"puts out \[1, 3, 8, 8\] for one sample"),
        (lambda p: extract_labels(teacher(), images, p / "no" / "x"), OutputError, "does not exist"),
    ]:
        with pytest.raises(error, match=text):
            call(tmp_path / "l")
    assert list(tmp_path.iterdir()) == []
    big = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    nn.init.constant_(big[1].bias, 1e6)
    with pytest.raises(DataError, match=r"gives a logit of 1e\+06; give float32"):
        extract_logits(big, images, tmp_path / "l", dtype="float16")


def test_values_that_are_not_finite_name_their_image(tmp_path):
    images = data()
    images.images[17, 1, 2, 3] = float("nan")
    with pytest.raises(DataError, match=r"not finite .* for image 17; what was done before it is in .*l\.part"):
        extract_labels(teacher(), images, tmp_path / "l", batch_size=4)


@pytest.mark.parametrize("augment", [False, True])
def test_batches_come_with_their_targets(tmp_path, augment):
    images = data()
    cache = extract_labels(teacher(), images, tmp_path / "l")
    plain = Augmented(images, pad=1) if augment else images
    wrapped = WithTargets(plain, cache)
    assert len(wrapped) == 23
    bits = cache[:]
    for (x, y), (a, (b, targets)), _ in zip(plain.batches(6, 9), wrapped.batches(6, 9), range(9), strict=False):
        assert torch.equal(x, a)
        assert torch.equal(y, b)
        for image, row in zip(x, targets, strict=True):
            if not augment:
                i = int((images.images == image).flatten(1).all(1).nonzero())
                assert torch.equal(row, bits[i])
        assert targets.shape == (len(x), 45)
    description = wrapped.describe()
    assert description["targets"]["teacher"] == teacher_digest(teacher())
    assert json.dumps(description)
    with pytest.raises(CacheError, match="is of other data"):
        WithTargets(data(seed=5), cache)
    other = dataclasses.replace(images, labels=images.labels.flip(0))
    with pytest.raises(CacheError, match="is of other data"):
        WithTargets(other, cache)


def test_the_whole_way_of_the_report(tmp_path):
    """A teacher with a label head, its labels, and a student that learns the bits."""
    images = LabelledImages(torch.randn(12, 3, 32, 32), torch.randint(0, 10, (12,)))
    model = morph.put_label_head(randomise(zoo.build("resnet-8")), images.images[:2]).model
    cache = extract_labels(model, images, tmp_path / "l", batch_size=12)
    student = morph.put_voting_head(zoo.build("shallow-pool-4-16-64"), images.images[:2], channels=16).model
    assert score_path(student) == "classifier.score"
    optimizer = torch.optim.Adam(student.parameters(), 1e-2)
    losses = []
    for _, (x, (_, bits)) in zip(range(40), WithTargets(images, cache).batches(12, 0), strict=False):
        votes, logits = channel_logits(student, x)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, bits.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.25 * losses[0]
    wanted = cache.votes(slice(None)).float()
    assert (student.eval()(images.images) - wanted).abs().mean() < 1.5
    assert votes.shape == (12, 10)
