"""Which teacher is best for a DARTS student: one grown from it, or a deeper one (Whettam 2020, tables 4.2 and 4.4).

    python benchmarks/grown_teachers.py --data DIR                 # everything; goes on where it was stopped
    python benchmarks/grown_teachers.py --data DIR --summary       # writes results/grown_teachers_*.json

The thesis at a scale that a processor can do: CIFAR-10 at 16x16, DARTS (second order) with 8 channels and without its
auxiliary head, attention transfer at the three proposed taps in the form of its authors (beta 1000) beside the labels.
Teachers grown from the trained student go on from its function and are trained as long as the deeper one, longer than
students; the untrained one has fresh weights. Any number of processes may work at the list of jobs at the same time.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from grown_teachers_picture import draw
from job_list import Job, main, results_in, spread
from machine import save
from small_cifar import load, subset, top1
from torch import nn

import morph
from morph.augmentation import Augmented
from morph.teaching.feature_losses import AttentionTransfer
from morph.teaching.losses import LabelCrossEntropy
from morph.teaching.objective import Labels
from morph.teaching.terms import Features
from morph.zoo import architecture

STUDENT, DEEPER = "darts-10x8", "darts-25x8"
GROWN = ("fisher", "uniform", "random", "untrained")
TEACHERS = ("none", "depth", *GROWN)
OTHERS = {"wrn": ("wrn-16-2", "wrn-10-1"), "densenet": ("densenet-bc-22-12", "densenet-bc-16-8")}
IMAGES, EPOCHS, TEACHER_EPOCHS, BATCH = 8_000, 3, 8, 64
GROWTH = 2.85  # of the body, as 1.4M parameters are of the thesis's student, auxiliary heads apart
SEEDS = (0, 1, 2)


def jobs() -> Iterator[Job]:
    """All that is to be done, the most wanted first."""
    for seed in SEEDS:
        for teacher in TEACHERS:
            yield {"table": "4.4", "teacher": teacher, "student": STUDENT, "seed": seed}
    for _, student in OTHERS.values():
        yield {"table": "4.2", "teacher": "none", "student": student, "seed": 0}
    for teacher in ("wrn-16-2", "densenet-bc-22-12", "depth"):
        for student in (*(pair[1] for pair in OTHERS.values()), STUDENT):
            if (teacher, student) != ("depth", STUDENT):
                yield {"table": "4.2", "teacher": teacher, "student": student, "seed": 0}


class Bench:
    """Data, and teachers that are trained when they are first asked for.

    Args:
        data: Folder with the images.
        work: Folder for what is kept between runs.
    """

    def __init__(self, data: Path, work: Path) -> None:
        whole, self.test = load(data, work)
        self.images = subset(whole, IMAGES)
        self.lessons = Augmented(self.images, 2)
        self.sample = self.test.images[:2]
        self.work = work

    def run(self, job: Job) -> Job:
        """Train one student, with or without a teacher, and test it."""
        teacher = None if job["teacher"] == "none" else self.teacher(job["teacher"])
        student = _built(job["student"], job["seed"])
        start = time.process_time()
        loss = self._train(student, teacher, job["seed"], EPOCHS)
        facts: Job = {"teacher_error": None, "teacher_params": None}
        if teacher is not None:
            facts = {"teacher_error": 1 - top1(teacher, self.test), "teacher_params": _size(teacher)}
        error = 1 - top1(student, self.test)
        return {"error": error, "loss": loss, "seconds": round(time.process_time() - start, 1), **facts}

    def _train(self, student: nn.Module, teacher: nn.Module | None, seed: int, epochs: int) -> float:
        objective: nn.Module = Labels(student)
        if teacher is not None:
            terms = [LabelCrossEntropy(), Features(AttentionTransfer())]
            objective = morph.Distillation(student, teacher, terms, example_inputs=self.sample)
        options: dict[str, Any] = {"epochs": epochs, "batch_size": BATCH, "lr": 0.1, "nesterov": True}
        done = morph.fit(
            objective,
            self.lessons,
            schedule="cosine",
            warmup_epochs=0.3,
            channels_last=True,
            clip=5.0,
            seed=seed,
            **options,
        )
        return float(done.history[-1]["loss"])

    def teacher(self, name: str) -> nn.Module:
        """A teacher, trained if it is one that is; kept for the other jobs."""
        path = self.work / f"teacher-{name}.pt"
        model = self._fresh(name)
        if name == "untrained":
            return model
        if path.exists():
            model.load_state_dict(torch.load(path, weights_only=True))
        else:
            self._train(model, None, 100, TEACHER_EPOCHS)
            part = path.with_suffix(".part")
            torch.save(model.state_dict(), part)
            part.replace(path)
        return model

    def _fresh(self, name: str) -> nn.Module:
        """A teacher before its own training."""
        if name not in GROWN:
            return _built({"depth": DEEPER}.get(name, name), 100)
        student = self._student()
        body = sum(p.numel() for n, p in student.named_parameters() if not n.startswith("auxiliary"))
        policy: Any = "fisher" if name == "untrained" else name
        grow = partial(morph.expand, student, (self.images.images[:512], self.images.labels[:512]), policy=policy)
        return grow(target_params=_size(student) + (GROWTH - 1) * body, reinit=name == "untrained").model

    def _student(self) -> nn.Module:
        """The student trained alone, from which teachers grow."""
        path = self.work / "student.pt"
        student = _built(STUDENT, 0)
        if path.exists():
            student.load_state_dict(torch.load(path, weights_only=True))
        else:
            self._train(student, None, 0, EPOCHS)
            torch.save(student.state_dict(), path)
        return student


def _built(name: str, seed: int) -> nn.Module:
    """A model of the zoo with weights by seed, without auxiliary head: small images leave it no map to look at."""
    torch.manual_seed(seed)
    model = architecture(name)
    if hasattr(model, "auxiliary_after"):
        model.auxiliary_after = -1
    return model


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def summary(bench: Bench) -> None:
    """Write means and deviations, and draw them."""
    lines = results_in(bench.work / "jobs")
    groups: dict[str, dict[str, list[Job]]] = {"4.2": defaultdict(list), "4.4": defaultdict(list)}
    for line in lines:
        groups[line["table"]][f"{line['teacher']} -> {line['student']}"].append(line)
    tables = {
        table: {
            name: {
                **spread([r["error"] for r in rows]),
                "teacher_error": rows[0]["teacher_error"],
                "teacher_params": rows[0]["teacher_params"],
            }
            for name, rows in sorted(found.items(), key=lambda item: statistics.mean(r["error"] for r in item[1]))
        }
        for table, found in groups.items()
    }
    facts = {
        "data": f"CIFAR-10 at 16x16, {IMAGES:,} images, {EPOCHS} rounds (teachers {TEACHER_EPOCHS}), tested on 10,000",
        "student": STUDENT,
    }
    path = save("grown_teachers", {**facts, "tables": tables, "runs": lines})
    draw(tables["4.4"], path.parent.parent / "pictures" / "grown_teachers.png")
    print(path)


if __name__ == "__main__":
    main(__doc__, "grown_teachers", Bench, jobs(), summary, ("error", "teacher_error", "seconds"))
