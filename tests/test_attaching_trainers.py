"""Gates in trainers that others wrote: each ends where the plain loop ends, and resumes from its own checkpoint."""

from __future__ import annotations

import warnings

import pytest
import torch
from gate_nets import GatedNet, alphas, samples
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from morph.apg import APG
from morph.attaching import attach_gates

X, Y = samples(24)
BATCH, EPOCHS = 8, 12
OPTIONS = {"lr": 0.03, "lambda2": 0.25}


class Samples(Dataset):
    """Dictionaries, as the Hugging Face trainer wants them."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"x": X[i], "labels": Y[i]}


def loader() -> DataLoader:
    return DataLoader(Samples(), batch_size=BATCH, shuffle=False)


def prepared(net: GatedNet):
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.02, weight_decay=0.1)
    return optimizer, attach_gates(optimizer, net.gates(), weights=alphas(net), **OPTIONS)


@pytest.fixture(scope="module")
def wanted() -> tuple[GatedNet, APG]:
    """The plain loop, with two optimizers that know nothing of each other."""
    net = GatedNet()
    base = torch.optim.AdamW(net.weights(), lr=0.02, weight_decay=0.1)
    apg = APG(net.gates(), weights=alphas(net), **OPTIONS)
    for _ in range(EPOCHS):
        for batch in loader():
            net.zero_grad()
            F.cross_entropy(net(batch["x"]), batch["labels"]).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            base.step()
            apg.step()
    assert 0 < sum(int(c.sum()) for c in apg.closed().values()) < 16
    return net, apg


def check(net: GatedNet, apg: APG, wanted: tuple[GatedNet, APG]) -> None:
    for (name, a), (_, b) in zip(net.named_parameters(), wanted[0].named_parameters(), strict=True):
        assert torch.allclose(a.cpu(), b, atol=1e-6), name
    for name, closed in wanted[1].closed().items():
        assert torch.equal(apg.closed()[name].cpu(), closed), name


def test_a_plain_loop(wanted):
    net = GatedNet()
    optimizer, apg = prepared(net)
    for _ in range(EPOCHS):
        for batch in loader():
            optimizer.zero_grad()
            F.cross_entropy(net(batch["x"]), batch["labels"]).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
    check(net, apg, wanted)


def test_the_check_notices_gates_that_are_not_attached(wanted):
    net = GatedNet()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.02, weight_decay=0.1)
    apg = APG(net.gates(), weights=alphas(net), **OPTIONS)
    for _ in range(EPOCHS):
        for batch in loader():
            optimizer.zero_grad()
            F.cross_entropy(net(batch["x"]), batch["labels"]).backward()
            optimizer.step()
    with pytest.raises(AssertionError):
        check(net, apg, wanted)


def test_fabric(wanted):
    fabric_module = pytest.importorskip("lightning_fabric")
    fabric = fabric_module.Fabric(accelerator="cpu", devices=1)
    net = GatedNet()
    optimizer, apg = prepared(net)
    wrapped, optimizer = fabric.setup(net, optimizer)
    batches = fabric.setup_dataloaders(loader())
    for _ in range(EPOCHS):
        for batch in batches:
            optimizer.zero_grad()
            fabric.backward(F.cross_entropy(wrapped(batch["x"]), batch["labels"]))
            fabric.clip_gradients(wrapped, optimizer, max_norm=1.0)
            optimizer.step()
    check(net, apg, wanted)


def test_accelerate_with_a_checkpoint_in_the_middle(wanted, tmp_path):
    accelerate = pytest.importorskip("accelerate")

    def train(epochs: int, load: bool):
        accelerator = accelerate.Accelerator(cpu=True)
        net = GatedNet(9 if load else 0)
        optimizer, apg = prepared(net)
        model, optimizer, batches = accelerator.prepare(net, optimizer, loader())
        if load:
            accelerator.load_state(str(tmp_path / "state"))
        for _ in range(epochs):
            for batch in batches:
                with accelerator.accumulate(model):
                    accelerator.backward(F.cross_entropy(model(batch["x"]), batch["labels"]))
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
        if not load:
            accelerator.save_state(str(tmp_path / "state"))
        return net, apg

    train(EPOCHS // 2, load=False)
    check(*train(EPOCHS - EPOCHS // 2, load=True), wanted)


def test_lightning_with_a_checkpoint_in_the_middle(wanted, tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, net: GatedNet) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch, _):
            return F.cross_entropy(self.net(batch["x"]), batch["labels"])

        def configure_optimizers(self):
            optimizer, self.apg = prepared(self.net)
            return optimizer

    def train(epochs: int, seed: int, checkpoint):
        module = Module(GatedNet(seed))
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            devices=1,
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(module, loader(), ckpt_path=checkpoint)
            if checkpoint is None:
                trainer.save_checkpoint(tmp_path / "half.ckpt")
        return module.net, module.apg

    train(EPOCHS // 2, 0, None)
    check(*train(EPOCHS, 9, tmp_path / "half.ckpt"), wanted)


def test_hugging_face_with_a_checkpoint_in_the_middle(wanted, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Wrapped(nn.Module):
        def __init__(self, net: GatedNet) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.net(x)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    class InOrder(transformers.Trainer):
        def get_train_dataloader(self) -> DataLoader:
            return loader()

    def train(net: GatedNet, epochs: int, resume: bool):
        optimizer, apg = prepared(net)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            num_train_epochs=epochs,
            per_device_train_batch_size=BATCH,
            max_grad_norm=1.0,
            save_strategy="epoch",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
        )
        constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        InOrder(Wrapped(net), arguments, train_dataset=Samples(), optimizers=(optimizer, constant)).train(
            resume_from_checkpoint=resume
        )
        return net, apg

    train(GatedNet(), EPOCHS // 2, resume=False)
    check(*train(GatedNet(9), EPOCHS, resume=True), wanted)
