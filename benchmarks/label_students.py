"""Labels, logits, soft labels or multi-channel labels for a shallow student: the comparison of the label report.

    python benchmarks/label_students.py --data DIR                 # everything; goes on where it was stopped
    python benchmarks/label_students.py --data DIR --summary       # writes results/label_students_*.json

Six folds of a part of CIFAR-10, as in the report: each is the test set once, and a teacher and four students learn
from the other five. The teacher is a small wide residual network instead of network in network, the student has its
form at a fraction of its width; the label head has the report's geometry of 16 channels. One-way analysis of variance
and Tukey's test by `label_statistics.py`. Any number of processes may work at the list of jobs at the same time.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from job_list import Job, main, results_in
from label_statistics import summarise
from machine import save
from small_cifar import load, subset, top1
from torch import nn

import morph
from morph.images import LabelledImages
from morph.label_heads import score_path
from morph.labels import extract_labels, extract_logits
from morph.labels.targets import WithTargets
from morph.teaching.losses import LogitRegression, SoftLabels
from morph.teaching.objective import Labels
from morph.teaching.terms import Channels
from morph.zoo import architecture

TEACHER, STUDENT = "wrn-16-1", "shallow-small"
FOLDS, FOLD, TEACHER_EPOCHS, HEAD_EPOCHS, EPOCHS, BATCH = 6, 2_000, 12, 4, 8, 64
RATES = {"labels": 0.02, "logits": 0.02, "soft labels": 0.02, "multi-channel": 0.1}  # 0.1 of 0.02, 0.1, 0.5 on one fold


def jobs() -> Iterator[Job]:
    """All that is to be done, fold by fold."""
    for fold in range(FOLDS):
        for arm in RATES:
            yield {"fold": fold, "arm": arm}


class Bench:
    """The folds.

    Args:
        data: Folder with the images.
        work: Folder for what is kept between runs.
    """

    def __init__(self, data: Path, work: Path) -> None:
        self.images = subset(load(data, work, 32)[0], FOLDS * FOLD)
        self.work = work

    def fold(self, number: int) -> tuple[LabelledImages, LabelledImages]:
        """Images to learn from, and to test with."""
        inside = torch.zeros(len(self.images), dtype=torch.bool)
        inside[number * FOLD : (number + 1) * FOLD] = True
        parts = (LabelledImages(self.images.images[m], self.images.labels[m]) for m in (~inside, inside))
        learn, test = parts
        return learn, test

    def teacher(self, fold: int, learn: LabelledImages, *, channels: bool) -> nn.Module:
        """The teacher of a fold, with its own head or that of multi-channel labels, trained once."""
        path = self.work / f"teacher-{fold}{'-channels' if channels else ''}.pt"
        torch.manual_seed(fold)
        model = architecture(TEACHER)
        if channels:
            model.load_state_dict(self.teacher(fold, learn, channels=False).state_dict())
            model = morph.put_label_head(model, learn.images[:2], channels=16, seed=fold).model
        if path.exists():
            model.load_state_dict(torch.load(path, weights_only=True))
            return model.eval()
        _fit(Labels(model), learn, fold, HEAD_EPOCHS if channels else TEACHER_EPOCHS, 0.02 if channels else 0.1)
        part = path.with_suffix(".part")
        torch.save(model.state_dict(), part)
        part.replace(path)
        return model.eval()

    def run(self, job: Job) -> Job:
        """Train one student and test it."""
        fold, arm = job["fold"], job["arm"]
        learn, test = self.fold(fold)
        torch.manual_seed(fold)
        student = architecture(STUDENT)
        start, facts = time.process_time(), {}
        if arm == "labels":
            _fit(Labels(student), learn, fold, EPOCHS, RATES[arm])
        else:
            teacher = self.teacher(fold, learn, channels=arm == "multi-channel")
            facts = {"teacher_accuracy": top1(teacher, test)}
            path = self.work / f"{fold}-{arm.replace(' ', '-')}.cache"
            cache: Any
            if arm == "multi-channel":
                student = morph.put_voting_head(student, learn.images[:2], channels=16, seed=fold).model
                cache = extract_labels(teacher, learn, path)
                terms: list[Any] = [Channels(score_path(student))]
            else:
                cache = extract_logits(teacher, learn, path)
                terms = [
                    LogitRegression() if arm == "logits" else SoftLabels(10.0, 1.0, t_squared=True, label_weight=0)
                ]
            objective = morph.Distillation(student, teacher, terms, example_inputs=learn.images[:2])
            _fit(objective, WithTargets(learn, cache), fold, EPOCHS, RATES[arm])
        return {"accuracy": top1(student, test), "seconds": round(time.process_time() - start, 1), **facts}


def _fit(objective: nn.Module, data: Any, seed: int, epochs: int, lr: float) -> None:
    options: dict[str, Any] = {"epochs": epochs, "batch_size": BATCH, "lr": lr, "nesterov": True, "clip": 5.0}
    morph.fit(objective, data, schedule="cosine", warmup_epochs=0.3, channels_last=True, seed=seed, **options)


def summary(bench: Bench) -> None:
    """Write accuracies and what the tests say."""
    lines = results_in(bench.work / "jobs")
    groups: dict[str, list[float]] = defaultdict(list)
    for line in sorted(lines, key=lambda line: int(line["fold"])):
        groups[line["arm"]].append(line["accuracy"])
    facts = {
        "data": f"CIFAR-10 at 32x32, {FOLDS} folds of {FOLD:,}",
        "teacher": TEACHER,
        "student": STUDENT,
        "statistics": summarise({arm: groups[arm] for arm in RATES if arm in groups}),
    }
    print(save("label_students", {**facts, "accuracies": groups, "runs": lines}))


if __name__ == "__main__":
    main(__doc__, "label_students", Bench, jobs(), summary, ("accuracy", "seconds"))
