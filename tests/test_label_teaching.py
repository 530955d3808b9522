"""Caches and label heads in the training loop: what is learned from a cache is what the live teacher would teach."""

from __future__ import annotations

import pytest
import torch
from models import randomise

import morph
from morph import zoo
from morph.augmentation import Augmented
from morph.batches import describe_data
from morph.images import LabelledImages
from morph.label_heads import score_path
from morph.labels import WithTargets, extract_labels, extract_logits
from morph.teaching.losses import SoftLabels
from morph.teaching.terms import Channels


def images(n: int = 12) -> LabelledImages:
    generator = torch.Generator().manual_seed(3)
    return LabelledImages(
        torch.randn(n, 3, 32, 32, generator=generator), torch.randint(0, 10, (n,), generator=generator)
    )


def test_bits_of_a_cache_teach_what_the_live_teacher_does(tmp_path):
    data = images()
    x, y = data.images[:5], data.labels[:5]
    teacher = morph.put_label_head(randomise(zoo.build("resnet-8")), x).model
    student = morph.put_voting_head(zoo.build("shallow-pool-4-16-64"), x).model
    cache = extract_labels(teacher, data, tmp_path / "l")
    term = Channels(score_path(student), score_path(teacher))
    objective = morph.Distillation(student, teacher, [term], example_inputs=x)
    live, cached = objective(x, y), objective(x, (y, cache[:5]))
    assert torch.equal(live.loss, cached.loss)
    assert live.logits.shape == (5, 10)
    assert not torch.equal(live.loss, objective(x, (y, 1 - cache[:5])).loss)


def test_logits_of_a_cache_teach_what_the_live_teacher_does(tmp_path):
    data = images()
    x, y = data.images[:5], data.labels[:5]
    teacher, student = randomise(zoo.build("resnet-8")), zoo.build("vgg-student")
    cache = extract_logits(teacher, data, tmp_path / "l")
    objective = morph.Distillation(student, teacher, [SoftLabels(4.0, 0.9)], example_inputs=x)
    live, cached = objective(x, y), objective(x, (y, cache[:5]))
    assert torch.allclose(live.loss, cached.loss, rtol=1e-5)
    assert not torch.allclose(live.loss, objective(x, (y, cache[5:10])).loss, rtol=1e-3)


@pytest.mark.parametrize("augment", [False, True])
def test_the_loop_takes_such_data(tmp_path, augment):
    data = images()
    teacher = morph.put_label_head(randomise(zoo.build("resnet-8")), data.images[:2]).model
    student = morph.put_voting_head(zoo.build("shallow-pool-4-16-64"), data.images[:2]).model
    cache = extract_labels(teacher, data, tmp_path / "l")
    with_bits = WithTargets(Augmented(data) if augment else data, cache)
    objective = morph.Distillation(student, teacher, [Channels(score_path(student))])
    fitted = morph.fit(
        objective, with_bits, validation=data, epochs=4, batch_size=6, lr=0.01, optimizer="adam", schedule="constant"
    )
    assert len(fitted.history) == 4
    assert fitted.history[-1]["loss"] < fitted.history[0]["loss"]
    described = describe_data(with_bits)
    assert described["targets"]["channels"] == 16
    assert ("augmentation" in described) is augment
