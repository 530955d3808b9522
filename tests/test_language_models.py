"""Transformers of Hugging Face teach and learn as they are: named inputs, outputs with logits, features of tokens."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning_fabric import Fabric
from models import Snapshot
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import morph
from morph.batches import one_round
from morph.errors import CacheError, DataError, MorphError, NothingToGrowError, TeachingError, TraceError
from morph.labels import extract_logits
from morph.search_losses import kl_divergence
from morph.teaching.adapters import bridge
from morph.teaching.distillation import Distillation
from morph.teaching.feature_losses import AttentionTransfer, Hint
from morph.teaching.hints import Hints
from morph.teaching.losses import SoftLabels
from morph.teaching.objective import Labels
from morph.teaching.terms import Features
from morph.training.loop import _ROUND
from morph.zoo import build

transformers = pytest.importorskip("transformers")
from language_nets import CLASSES, bert, distilbert, sentences, vit  # noqa: E402  # needs transformers

X, Y = sentences()
LAYER = "bert.encoder.layer"
NUMBERS = {"epochs": 2, "batch_size": 4, "lr": 0.03, "schedule": "constant", "momentum": 0.0, "weight_decay": 0.0}


def cpu() -> Fabric:
    return Fabric(accelerator="cpu", devices=1)


def encoded(x=X) -> transformers.BatchEncoding:
    return transformers.BatchEncoding(dict(x))


def networks() -> tuple[nn.Module, nn.Module]:
    """Student and teacher, in float64 and without dropout."""
    return bert(2, 16, seed=1, dropout=0.0).double(), bert(4, 24, seed=2, dropout=0.0).double()


def lesson(student: nn.Module, teacher: nn.Module) -> Distillation:
    torch.manual_seed(5)  # of the adapters
    terms = [SoftLabels(2.0, 0.7), Features(AttentionTransfer("norm"), weight=0.5), Features(Hint(), weight=2.0)]
    return Distillation(student, teacher, terms, example_inputs=encoded())


def by_hand(student: nn.Module, teacher: nn.Module, adapters: list[nn.Module]) -> None:
    """The obvious loop, with the hidden states that the models give themselves."""
    teacher.eval()
    parameters = [*student.parameters(), *(p for adapter in adapters for p in adapter.parameters())]
    optimizer = torch.optim.SGD(parameters, 0.03)
    for epoch in range(2):
        for pick, y in one_round((torch.arange(len(Y)), Y), 4, _ROUND * (epoch + 1), torch.device("cpu")):
            x = {name: value[pick] for name, value in X.items()}
            ours = student(**x, output_hidden_states=True)
            with torch.no_grad():
                theirs = teacher(**x, output_hidden_states=True)
            loss = 0.7 * kl_divergence(ours.logits, theirs.logits, 2.0).mean()
            loss = loss + 0.3 * F.cross_entropy(ours.logits, y)
            for layer, adapter in enumerate(adapters):  # both of the student's; the second and fourth of the teacher's
                s, t = ours.hidden_states[layer + 1], theirs.hidden_states[2 * layer + 2]
                maps = [F.normalize(h.square().mean(2), dim=1) for h in (s, t)]
                loss = loss + 0.5 * (maps[0] - maps[1]).norm(dim=1).mean()
                loss = loss + (adapter(s) - t).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@pytest.mark.parametrize("form", ["pair", "encoded", "collated"])
def test_bert_teaches_a_smaller_bert(form):
    (student, teacher), (twin, _) = networks(), networks()
    before = Snapshot(teacher)
    objective = lesson(student, teacher)
    assert [(p.teacher, p.student) for p in objective.pairs["hint"]] == [
        (f"{LAYER}.1", f"{LAYER}.0"),
        (f"{LAYER}.3", f"{LAYER}.1"),
    ]
    assert [str(p.bridge()) for p in objective.pairs["attention_transfer"]] == ["nothing to do"] * 2
    adapters = [copy.deepcopy(joined.adapter) for joined in objective.adapters["hint"]]
    flags = [m.training for m in student.modules()]
    data = {"pair": (X, Y), "encoded": (encoded(), Y), "collated": encoded(X | {"labels": Y})}[form]
    fitted = morph.fit(objective, data, validation=[encoded(X | {"labels": Y})], fabric=cpu(), **NUMBERS)
    by_hand(twin, copy.deepcopy(teacher), adapters)
    for (name, ours), theirs in zip(student.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11, msg=name)
    moved = networks()[0].bert.encoder.layer[0].output.dense.weight
    assert not torch.allclose(student.bert.encoder.layer[0].output.dense.weight, moved)
    assert before.same()
    assert flags == [m.training for m in student.modules()]
    assert not any("adapter" in name for name in student.state_dict())
    assert fitted.history[-1]["val_top1"] == morph.evaluate(student, (encoded(), Y), batch_size=3).top1


def test_a_loop_of_ones_own_with_a_collator():
    """Sentences of other lengths in each batch, as a padding collator makes them."""
    torch.manual_seed(0)
    objective = lesson(*networks())
    samples = [
        {"input_ids": X["input_ids"][i, :n], "attention_mask": X["attention_mask"][i, :n], "labels": Y[i]}
        for i, n in enumerate(X["attention_mask"].sum(1).tolist())
    ]

    def collate(rows: list[dict[str, torch.Tensor]]) -> transformers.BatchEncoding:
        padded = {
            name: nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True)
            for name in ("input_ids", "attention_mask")
        }
        return transformers.BatchEncoding({**padded, "labels": torch.stack([row["labels"] for row in rows])})

    optimizer = torch.optim.SGD(objective.parameters(), 0.05)
    loader = DataLoader(samples, batch_size=3, collate_fn=collate)
    assert len({batch["input_ids"].shape[1] for batch in loader}) > 1
    losses = []
    for _ in range(6):
        losses.append(0.0)
        for batch in loader:
            labels = batch.pop("labels")
            step = objective(batch, labels)
            optimizer.zero_grad()
            step.loss.backward()
            optimizer.step()
            losses[-1] += float(step.loss.detach())
    assert losses[-1] < losses[0]
    fitted = morph.fit(objective, loader, validation=loader, fabric=cpu(), **NUMBERS)
    assert fitted.history[-1]["step"] == 2 * len(loader)
    first, second = (morph.evaluate(objective.student, data, batch_size=4) for data in (loader, (X, Y)))
    assert first.top1 == second.top1
    assert first.loss == pytest.approx(second.loss)


def test_the_trainer_of_hugging_face_ends_where_a_plain_loop_ends(tmp_path):
    pytest.importorskip("accelerate")
    ours, theirs = (lesson(*networks()) for _ in range(2))
    batches = [encoded({k: v[i : i + 4] for k, v in (X | {"labels": Y}).items()}) for i in (0, 4, 7)]

    class Taught(transformers.Trainer):
        def get_train_dataloader(self) -> list[transformers.BatchEncoding]:
            return batches

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            return model(inputs, labels).loss

    options = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "max_grad_norm": 0.0}
    quiet = {"save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no"}
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), **options, **quiet)
    optimizers = [torch.optim.SGD(objective.parameters(), 0.03) for objective in (ours, theirs)]
    constant = torch.optim.lr_scheduler.LambdaLR(optimizers[0], lambda _: 1.0)
    Taught(ours, arguments, train_dataset=batches, optimizers=(optimizers[0], constant)).train()
    theirs.train()
    for batch in batches * 2:
        optimizers[1].zero_grad()
        theirs({k: v for k, v in batch.items() if k != "labels"}, batch["labels"]).loss.backward()
        optimizers[1].step()
    for one, other in zip(ours.student.parameters(), theirs.student.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    assert not torch.equal(ours.student.classifier.weight, networks()[0].classifier.weight)


def test_a_stage_of_hints():
    student, teacher = networks()
    hints = Hints(student, teacher, example_inputs=X)
    assert [(p.teacher, p.student) for p in hints.pairs["hint"]] == [(f"{LAYER}.3", f"{LAYER}.1")]
    assert not any(name.startswith("classifier") for name in hints.guided)
    assert torch.equal(hints(encoded()).loss, hints(X).loss)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [((4, 2), [(1, 0), (3, 1)]), ((6, 3), [(1, 0), (3, 1), (5, 2)]), ((2, 4), [(0, 1), (1, 3)])],
)
def test_bert_and_distilbert_are_paired_in_equal_steps(layers, expected):
    """Half of the one with half of the other, and the last with the last, whatever the modules are called."""
    teacher, student = bert(layers[0]), distilbert(layers[1])
    for length in (9, 64):  # 64 words are no map of 8x8
        pairs = morph.propose_pairs(teacher, student, encoded(sentences(2, length)[0]))
        assert [(p.teacher, p.student) for p in pairs] == [
            (f"{LAYER}.{t}", f"distilbert.transformer.layer.{s}") for t, s in expected
        ]
        assert {str(p.bridge()) for p in pairs} == {"linear 16 -> 24"}
    (last,) = morph.propose_pairs(teacher, distilbert(1), X)  # one block is no row: what the network around it gives
    assert (last.teacher, last.student) == (f"{LAYER}.{layers[0] - 1}", "distilbert")
    objective = Distillation(student, teacher, [SoftLabels(), Features(Hint())], example_inputs=X)
    objective(X, Y).loss.backward()
    assert student.distilbert.embeddings.word_embeddings.weight.grad.abs().sum() > 0


def test_attention_over_words_against_numpy():
    """Lengths that change from batch to batch; teacher and student must see the same words."""
    joined = bridge((1, 64, 6), (1, 64, 9), project=False, aspect=None)
    assert str(joined) == "nothing to do"
    for length in (64, 13, 25):
        ours, theirs = torch.randn(3, length, 6), torch.randn(3, length, 9)
        found = float(AttentionTransfer("norm")(*joined(ours, theirs)))
        maps = [(h.numpy().astype("float64") ** 2).mean(2) for h in (ours, theirs)]
        units = [m / (m**2).sum(1, keepdims=True) ** 0.5 for m in maps]
        assert found == pytest.approx(float((((units[0] - units[1]) ** 2).sum(1) ** 0.5).mean()), rel=1e-5)
    with pytest.raises(TeachingError, match=r"attention over 12 tokens \(student\) and 13 \(teacher\)"):
        joined(torch.randn(3, 12, 6), torch.randn(3, 13, 9))
    with pytest.raises(TeachingError, match="63 tokens make no square"):
        bridge((1, 64, 6), (1, 8, 8, 9), project=False)(torch.randn(3, 63, 6), torch.randn(3, 9, 8, 8))
    with pytest.raises(TeachingError, match="no bridge from 64 tokens of 6"):
        bridge((1, 64, 6), (1, 32, 6), project=False, aspect=None)


@pytest.mark.parametrize("loss", [AttentionTransfer(), Hint()], ids=["attention", "hint"])
def test_a_vision_transformer_teaches_a_convolutional_network(loss):
    torch.manual_seed(0)
    teacher, student = vit(), morph.swap_head(build("resnet-8"), CLASSES, torch.randn(2, 3, 32, 32)).model
    images = torch.randn(6, 3, 32, 32)
    before = Snapshot(teacher)
    objective = Distillation(student, teacher, [SoftLabels(), Features(loss)], example_inputs=images)
    (pairs,) = objective.pairs.values()
    assert [p.teacher for p in pairs] == ["vit.layers.0", "vit.layers.1", "vit.layers.2"]
    assert all("teacher's tokens to map" in str(p.bridge()) for p in pairs)
    fitted = morph.fit(objective, (images, torch.arange(6) % CLASSES), fabric=cpu(), epochs=1, batch_size=3)
    assert len(fitted.history) == 1
    assert before.same()
    with pytest.raises(TraceError, match="unexpected keyword argument 'pixel_values'; give inputs of the shapes, typ"):
        Distillation(student, teacher, [SoftLabels()], example_inputs={"pixel_values": images})


def test_one_vision_transformer_teaches_another_by_name():
    images = {"pixel_values": torch.randn(4, 3, 32, 32)}
    objective = Distillation(vit(1), vit(2), [Features(AttentionTransfer()), Features(Hint())], example_inputs=images)
    assert str(objective.pairs["attention_transfer"][0].bridge()) == "tokens to map, teacher's tokens to map"
    objective(images, Y[:4]).loss.backward()


def test_taps_and_heads_by_name():
    model = bert()
    before = Snapshot(model)
    taps = morph.tap(model, [LAYER + ".1", "bert.encoder", "bert"], encoded())
    assert set(taps.shapes.values()) == {(11, 9, 24)}
    output, features = taps(**encoded())
    assert output.logits.shape == (11, CLASSES)
    assert torch.equal(features["bert"], features[LAYER + ".1"])
    assert morph.swap_head(model, 7, encoded()).model(**X).logits.shape == (11, 7)
    assert before.same()


def test_units_are_scored_with_batches_of_the_collator():
    model = bert(dropout=0.0)
    found = [
        morph.prune(model, encoded(), ratio=0.3, score="fisher", data=data).model
        for data in ([(X, Y)], (encoded(), Y), [encoded(X | {"labels": Y})], X | {"labels": Y})
    ]
    logits = [net(**X).logits for net in found]
    assert all(torch.equal(logits[0], other) for other in logits[1:])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: morph.propose_pairs(bert(), distilbert(), X["input_ids"].float()), TraceError, "types and names"),
        (lambda: morph.propose_pairs(bert(), build("resnet-8"), X), TraceError, "unexpected keyword"),
        (lambda: morph.evaluate(bert(), [X]), DataError, "input_ids, attention_mask without 'labels'"),
        (lambda: morph.fit(Labels(bert()), [{**X, "labels": Y.float()}]), DataError, "labels of torch.float32"),
        (lambda: morph.fit(Labels(bert()), [{**X, "labels": Y + 9}]), DataError, "3 classes apart, the data has label"),
        (lambda: morph.gate(bert(), X, where="connection"), TraceError, "wrapped by a decorator, as those of Hugging"),
        (
            lambda: morph.search_student(bert().bert, (X, Y), target_params=5000),
            DataError,
            "gives BaseModelOutputWithPoolingAndCrossAttentions; expected logits .* under that name",
        ),
        (lambda: morph.expand(bert(), (X, Y), target_params=1e6), NothingToGrowError, "no grouped .* --move widen"),
        (lambda: extract_logits(bert(), (X, Y), "never"), DataError, "a cache needs images that have an index"),
    ],
)
def test_what_is_refused_says_so(call, error, message):
    with pytest.raises(error, match=message) as found:
        call()
    assert isinstance(found.value, MorphError)
    assert not isinstance(found.value, CacheError)
    assert "images of the shape" not in str(found.value)
