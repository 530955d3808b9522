"""The search for a student inside torchvision's networks, beside cuts by weights, at equal multiply-adds.

    python benchmarks/search_models.py --data DIR                 # everything; goes on where it was stopped
    python benchmarks/search_models.py --data DIR --summary       # writes results/search_models_*.json

Teachers are torchvision's resnet18 and mobilenet_v2, of whose strides at the beginning only the first is kept, and its
VisionTransformer with patches of 4, four layers and a width of 96, trained on CIFAR-10 at 16x16. Each way gives a
student of the same share of the teacher's multiply-adds; every student starts from fresh weights (in rows that say so,
from those that it inherits) and is distilled on the same images with the same numbers: temperature 4, a tenth of the
labels' cross-entropy (Gu and Tresp, section 4.2).
"""

from __future__ import annotations

import functools
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peer
import torch
import torch_pruning as tp
from job_list import Job, main, results_in, spread
from machine import save
from small_cifar import augmented_rounds, load, logits_of, subset, top1
from torch import nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer

import morph
from morph.augmentation import Augmented
from morph.fresh_weights import reinitialise
from morph.images import LabelledImages
from morph.search_losses import DistillationLoss
from morph.zoo.small_images import torchvision_32

IMAGES, TEACHER_ROUNDS, SEARCH_ROUNDS, STUDENT_ROUNDS, BATCH = 20_000, 8, 4, 8, 64
SEEDS = (0, 1, 2)
WAYS = ("kd-weighted", "uniform", "torch-pruning taylor", "torch-pruning group norm")


@dataclass(frozen=True)
class Model:
    """A teacher and how it learns.

    Attributes:
        make: Builds it untrained, for 16x16 images and ten classes.
        share: Of its multiply-adds, left to the students.
        optimizer: Of all parameters and a peak learning rate.
        lr: That rate.
        search_lr: The rate of the weights in the search, which runs SGD.
    """

    make: Callable[[], nn.Module]
    share: float
    optimizer: Callable[..., torch.optim.Optimizer]
    lr: float
    search_lr: float


def _sgd(weights: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(weights, lr, momentum=0.9, weight_decay=1e-4, nesterov=True)


def _adamw(weights: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(weights, lr, weight_decay=0.05)


def _strided(name: str) -> nn.Module:
    """A network for small images that halves them at its entrance all the same, as a processor asks for."""
    net = torchvision_32(name)
    next(m for m in net.modules() if isinstance(m, nn.Conv2d)).stride = (2, 2)
    return net


MODELS = {
    "resnet18": Model(lambda: _strided("resnet18"), 0.4, _sgd, 0.1, 0.05),
    "mobilenet_v2": Model(lambda: _strided("mobilenet_v2"), 0.4, _sgd, 0.1, 0.05),
    "vit": Model(lambda: VisionTransformer(16, 4, 4, 4, 96, 384, num_classes=10), 0.4, _adamw, 1e-3, 0.02),
}


def jobs() -> Iterator[Job]:
    """All that is to be done, the most wanted first."""
    for seed in SEEDS:
        for weights in ("inherited", "fresh"):
            for model in MODELS:
                for way in WAYS:
                    yield {"model": model, "way": way, "seed": seed, "weights": weights}


class Bench:
    """Data, teachers and the ways to a student.

    Args:
        data: Folder with the images.
        work: Folder for what is kept between runs.
    """

    def __init__(self, data: Path, work: Path) -> None:
        self.whole, self.test = load(data, work)
        self.work = work
        self.images = subset(self.whole, IMAGES)
        self.sample = self.test.images[:2]
        self.known: dict[str, tuple[nn.Module, torch.Tensor]] = {}

    @functools.cached_property
    def lessons(self) -> LabelledImages:
        """What the students learn from, in the same order for all."""
        return augmented_rounds(self.images, STUDENT_ROUNDS)

    def run(self, job: Job) -> Job:
        """Find one student, teach it and test it."""
        name, seed = job["model"], job["seed"]
        if name not in self.known:
            teacher = self.teacher(name)
            self.known[name] = teacher, logits_of(teacher, self.lessons.images)
        teacher, wanted = self.known[name]
        start = time.process_time()
        torch.manual_seed(seed)
        model, facts = self.student(name, job["way"], seed, teacher, inherit=job["weights"] == "inherited")
        found = time.process_time()
        size = morph.count(model, self.sample[:1])
        loss = train(model, self.lessons, wanted, DistillationLoss(4.0, label_share=0.1), MODELS[name], seed)
        seconds = {"search_s": round(found - start, 1), "training_s": round(time.process_time() - found, 1)}
        error = 1 - top1(model, self.test)
        return {"error": error, "loss": loss, "macs": size.macs, "params": size.params, **seconds, **facts}

    def teacher(self, name: str) -> nn.Module:
        """A trained network."""
        path, numbers = self.work / f"{name}.pt", MODELS[name]
        torch.manual_seed(0)
        teacher = numbers.make()
        if path.exists():
            teacher.load_state_dict(torch.load(path, weights_only=True))
        else:
            lessons = augmented_rounds(self.whole, TEACHER_ROUNDS)
            labels = F.one_hot(lessons.labels, 10).float()
            train(teacher, lessons, labels, _labels, numbers, seed=0, batch=128)
            torch.save(teacher.state_dict(), path)
        return teacher.eval()

    def student(
        self, name: str, way: str, seed: int, teacher: nn.Module, *, inherit: bool
    ) -> tuple[nn.Module, dict[str, Any]]:
        """A student found in one way, and what is known of how."""
        target = MODELS[name].share * morph.count(teacher, self.sample[:1]).macs
        if way == "kd-weighted":
            data, rate = Augmented(self.images, 2), MODELS[name].search_lr
            numbers: dict[str, Any] = {"epochs": SEARCH_ROUNDS, "batch_size": BATCH, "seed": seed, "lr": rate}
            numbers |= {"inherit": inherit}
            record = (found := morph.search_student(teacher, data, target_macs=target, **numbers)).record.to_json()
            told = ("steps", "forced", "gates_open", "gates_total", "max_abs_diff", "ungated")
            gone = {"thin": len(record["thin"]), "branches_gone": len(record["branches_gone"])}
            return found.model, {key: record[key] for key in told} | gone | {"kl": record["history"][-1]["kl"]}
        if way == "uniform":
            cut = morph.prune(teacher, self.sample, target_macs=target, ranking="local", score="random", seed=seed)
            model, facts = cut.model, {"max_abs_diff": cut.record.to_json()["max_abs_diff"]}
        else:
            model, facts = self._peer(name, way.split(" ", 1)[1], target, teacher), {}
        if not inherit:
            reinitialise(model, seed)
        return model, facts

    def _peer(self, name: str, importance: str, target: float, teacher: nn.Module) -> nn.Module:
        model = MODELS[name].make()
        model.load_state_dict(teacher.state_dict())
        model.eval()
        recipe = peer.find_recipe(model, "classification")
        scores = {
            "group norm": tp.importance.GroupMagnitudeImportance,
            "taylor": tp.importance.GroupTaylorImportance,
        }[importance]()
        if importance == "taylor":
            x, y = self.images.images[:1024], self.images.labels[:1024]
            F.cross_entropy(model(x), y).backward()
        pruner = tp.pruner.BasePruner(
            model,
            self.sample[:1],
            importance=scores,
            global_pruning=True,
            pruning_ratio=0.95,
            iterative_steps=200,
            ignored_layers=[m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 10],
            num_heads=recipe.num_heads,
            **recipe.options,
        )
        while morph.count(model, self.sample[:1]).macs > target:
            pruner.step()
            peer.mend(model, recipe)
        return model.requires_grad_(True)


def _labels(student: torch.Tensor, wanted: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with the labels, one value per sample: for the teacher."""
    return F.cross_entropy(student, labels, reduction="none")


def train(
    model: nn.Module,
    lessons: LabelledImages,
    wanted: torch.Tensor,
    loss: Any,
    numbers: Model,
    seed: int,
    batch: int = BATCH,
) -> float:
    """One passage through all lessons, learning rate once up and down; the last mean loss."""
    model.train().to(memory_format=torch.channels_last)
    steps = len(lessons) // batch
    optimizer = numbers.optimizer(model.parameters(), numbers.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, numbers.lr, total_steps=steps + 1, pct_start=0.2)
    order = torch.randperm(len(lessons), generator=torch.Generator().manual_seed(seed))
    last: list[float] = []
    for pick in order[: steps * batch].split(batch):
        value = loss(model(lessons.images[pick]), wanted[pick], lessons.labels[pick]).mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        last.append(float(value.detach()))
    return statistics.mean(last[-100:])


def summary(bench: Bench) -> None:
    """Write means and deviations."""
    lines = results_in(bench.work / "jobs")
    groups = defaultdict(list)
    for line in lines:
        groups[line["model"], f"{line['way']}, {line['weights']} weights"].append(line)
    teachers, table = {}, {}
    for name in dict.fromkeys(line["model"] for line in lines):
        teacher = bench.teacher(name)
        size = morph.count(teacher, bench.sample[:1])
        error = 1 - top1(teacher, bench.test)
        teachers[name] = {"error": error, "macs": size.macs, "params": size.params, "share": MODELS[name].share}
        ways = {way: some for (model, way), some in groups.items() if model == name}
        table[name] = {
            way: spread([r["error"] for r in some]) | {key: [r[key] for r in some] for key in ("macs", "params")}
            for way, some in sorted(ways.items(), key=lambda item: statistics.mean(r["error"] for r in item[1]))
        }
    facts = {
        "teachers": teachers,
        "data": f"CIFAR-10 at 16x16: teachers {TEACHER_ROUNDS} rounds of 50,000 images, search {SEARCH_ROUNDS} of "
        f"{IMAGES:,}, students {STUDENT_ROUNDS} of the same; tested on 10,000",
    }
    path = save("search_models", {**facts, "table": table, "runs": lines})
    print(json.dumps(table, indent=1), path, sep="\n")


if __name__ == "__main__":
    main(__doc__, "search_models", Bench, jobs(), summary, ("error", "macs", "search_s"))
