"""Students are searched inside transformers of Hugging Face, with the batches that their collators make."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning_fabric import Fabric
from models import Snapshot, randomise
from torch import nn
from torch.utils.data import DataLoader

import morph
from morph.gating import gate
from morph.inputs import picked
from morph.passes.gated_weights import GatedModule
from morph.passes.gates import gates_of
from morph.surgery import Result, replay

transformers = pytest.importorskip("transformers")
from language_nets import CLASSES, bert, distilbert, sentences, vit  # noqa: E402  # needs transformers

X, Y = sentences(12)
OPTIONS = {"epochs": 4, "batch_size": 4, "lr": 0.01, "seed": 3, "count_every": 1}


def cpu() -> Fabric:
    return Fabric(accelerator="cpu", devices=1)


def teacher() -> nn.Module:
    return randomise(bert(dropout=0.0), 4)


def search(model: nn.Module, data, share: float = 0.5, **options) -> Result:
    target = int(share * morph.count(model, X).macs)
    return morph.search_student(model, data, target_macs=target, fabric=cpu(), **{**OPTIONS, **options})


def collated() -> list[transformers.BatchEncoding]:
    return [transformers.BatchEncoding({**picked(X, slice(i, i + 4)), "labels": Y[i : i + 4]}) for i in (0, 4, 8)]


@pytest.mark.parametrize(
    ("form", "mode"), [("pair", "np"), *((f, "kd-weighted") for f in ("encoded", "collated", "loader"))]
)
def test_a_student_is_found_inside_bert(form, mode):
    encoded = transformers.BatchEncoding(dict(X))
    rows = [{**{k: v[i] for k, v in X.items()}, "labels": Y[i]} for i in range(len(Y))]
    data = {
        "pair": (X, Y),
        "encoded": (encoded, Y),
        "collated": collated(),
        "loader": DataLoader(rows, batch_size=4, collate_fn=transformers.default_data_collator),
    }[form]
    model = teacher()
    shot = Snapshot(model)
    result = search(model, data, mode=mode, inherit=True)
    record, student = result.record, result.model
    count = morph.count(student, X)
    assert record.after["macs"] == count.macs <= record.options["target_macs"]
    assert record.before["macs"] == morph.count(model, X).macs
    assert record.checks[0].passed
    assert 0 < record.details["gates_open"] < record.details["gates_total"]
    assert type(student) is type(model)
    assert not gates_of(student)
    assert not any(isinstance(m, GatedModule) or m._forward_pre_hooks for m in student.modules())
    assert student.state_dict().keys() == model.state_dict().keys()
    assert all(p.requires_grad for p in student.parameters())
    output = student(**X, labels=Y)
    output.loss.backward()
    assert output.logits.shape == (12, CLASSES)
    assert shot.same()


def test_the_trained_weights_are_those_of_the_search():
    """With no step the student is the teacher without the gates that were closed by force."""
    model = teacher()
    result = search(model, (X, Y), epochs=1, batch_size=12, lr=1e-12, gate_lr=1e-12, lambda2=0.0, inherit=True)
    sites = {row["name"]: row["closed"] for row in result.record.details["sites"]}
    gated = gate(model, picked(X, slice(0, 2)))
    assert result.record.details["forced"] == sum(sites.values()) > 0
    replayed = replay(model, result.record.plan, X).model
    torch.testing.assert_close(replayed(**X).logits, result.model(**X).logits, rtol=1e-4, atol=1e-5)
    assert gated.total == result.record.details["gates_total"]


def test_a_killed_search_ends_with_the_same_student(tmp_path):
    whole = search(teacher(), (X, Y), inherit=True)
    file, steps = tmp_path / "state.search", iter(range(100))
    with pytest.raises(KeyboardInterrupt):
        search(teacher(), (X, Y), inherit=True, checkpoint=file, should_stop=lambda: next(steps) == 3)
    assert file.exists()
    again = search(teacher(), (X, Y), inherit=True, checkpoint=file)
    assert again.record.plan == whole.record.plan
    for key, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[key]), key


def test_fresh_weights():
    model = distilbert()
    result = search(model, (X, Y))
    assert result.record.after["macs"] <= result.record.options["target_macs"]
    assert not torch.equal(result.model.classifier.bias, model.classifier.bias)


def test_images_by_name():
    images = {"pixel_values": torch.randn(8, 3, 32, 32)}
    model = randomise(vit(), 2)
    target = int(0.6 * morph.count(model, images).params)
    result = morph.search_student(model, (images, Y[:8]), target_params=target, fabric=cpu(), **OPTIONS, inherit=True)
    assert result.record.after["params"] <= target
    assert result.model(**images).logits.shape == (8, CLASSES)


def test_a_gated_bert_learns_with_the_trainer_of_hugging_face(tmp_path):
    """The same steps as in a plain loop, the weights of the gates among them."""
    pytest.importorskip("accelerate")
    model = bert(dropout=0.0)
    gated, twin = gate(model, X), gate(model, X)
    batches = collated()

    class Plain(transformers.Trainer):
        def get_train_dataloader(self):
            return batches

    options = {"num_train_epochs": 2, "max_grad_norm": 0.0, "save_strategy": "no", "report_to": [], "use_cpu": True}
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), disable_tqdm=True, logging_strategy="no", **options
    )
    made = []
    for one in (gated, twin):
        optimizer = torch.optim.SGD(one.model.parameters(), 0.05)
        made.append((optimizer, morph.attach_gates(optimizer, gates_of(one.model), lambda2=3e-2, lr=0.05)))
    constant = torch.optim.lr_scheduler.LambdaLR(made[0][0], lambda _: 1.0)
    Plain(gated.model, arguments, train_dataset=batches, optimizers=(made[0][0], constant)).train()
    twin.model.train()
    for batch in copy.deepcopy(batches) * 2:
        made[1][0].zero_grad()
        twin.model(**batch).loss.backward()
        made[1][0].step()
    for one, other in zip(gated.model.parameters(), twin.model.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    assert all((gate_.weight != 1).any() for gate_ in gates_of(gated.model).values())
    assert gated.remove().record.checks[0].passed
