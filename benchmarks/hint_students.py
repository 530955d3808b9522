"""Soft labels, hints, an assistant and a dense student: the arms of the report on hint layers, on CIFAR-10.

    python benchmarks/hint_students.py --data DIR                 # everything; goes on where it was stopped
    python benchmarks/hint_students.py --data DIR --summary       # writes results/hint_students_*.json

The report's networks at full size (32x32) on fewer images and rounds, without augmentation as in the report, so that
the teacher's logits are computed once. Temperature 8, half of the labels; hints go where the proposed pairing puts
them. Any number of processes may work at the list of jobs at the same time.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from job_list import Job, main, results_in, spread
from machine import save
from small_cifar import load, subset, top1
from torch import nn

import morph
from morph.labels import extract_logits
from morph.labels.targets import WithTargets
from morph.teaching.hints import Hints
from morph.teaching.losses import SoftLabels
from morph.teaching.objective import Labels
from morph.teaching_picture import grid_picture
from morph.zoo import architecture

TEACHER, STUDENT, SMALL, DENSE = "vgg-teacher-bn", "vgg-student", "vgg-student-small", "mlp-3-512"
IMAGES, TEACHER_EPOCHS, EPOCHS, HINT_EPOCHS, BATCH = 5_000, 5, 6, 2, 64
SEEDS = (0, 1, 2)
TEMPERATURE, ALPHA = 8.0, 0.5
TEMPERATURES, ALPHAS = (1.0, 2.0, 4.0, 8.0, 16.0), (0.25, 0.5, 0.75, 1.0)


def jobs() -> Iterator[Job]:
    """All that is to be done, the most wanted first."""
    for seed in SEEDS:
        for student, arm in (
            (STUDENT, "labels"),
            (STUDENT, "soft labels"),
            (STUDENT, "hints, then soft labels"),
            (SMALL, "labels"),
            (SMALL, "soft labels"),
            (SMALL, "soft labels of an assistant"),
            (DENSE, "labels"),
            (DENSE, "soft labels"),
        ):
            yield {"student": student, "arm": arm, "seed": seed}
    for temperature, alpha in product(TEMPERATURES, ALPHAS):
        yield {"student": SMALL, "arm": "soft labels", "seed": 0, "temperature": temperature, "alpha": alpha}


class Bench:
    """Data, the teacher, and what it says.

    Args:
        data: Folder with the images.
        work: Folder for what is kept between runs.
    """

    def __init__(self, data: Path, work: Path) -> None:
        whole, test = load(data, work, 32)
        self.images, self.test = subset(whole, IMAGES), subset(test, 5_000)
        self.work = work
        self.teacher = self._kept("teacher", TEACHER, 100)
        self.taught = WithTargets(self.images, extract_logits(self.teacher, self.images, work / "teacher.logits"))

    def _kept(self, role: str, name: str, seed: int) -> nn.Module:
        """A model that is trained once."""
        path = self.work / f"{role}.pt"
        model = _built(name, seed)
        if path.exists():
            model.load_state_dict(torch.load(path, weights_only=True))
            return model.eval()
        if role == "assistant":
            self._soft(model, self.teacher, self.taught, seed, (TEMPERATURE, ALPHA))
        else:
            _fit(Labels(model), self.images, seed, TEACHER_EPOCHS)
        part = path.with_suffix(".part")
        torch.save(model.state_dict(), part)
        part.replace(path)
        return model.eval()

    def _soft(
        self, student: nn.Module, teacher: nn.Module, taught: Any, seed: int, numbers: tuple[float, float]
    ) -> None:
        """Soft labels beside the labels, at a temperature and with a weight."""
        terms = [SoftLabels(*numbers, t_squared=True)]
        _fit(morph.Distillation(student, teacher, terms), taught, seed, EPOCHS)

    def run(self, job: Job) -> Job:
        """Train one student and test it."""
        student, arm, seed = _built(job["student"], job["seed"]), job["arm"], job["seed"]
        numbers = (job.get("temperature", TEMPERATURE), job.get("alpha", ALPHA))
        start = time.process_time()
        if arm == "labels":
            _fit(Labels(student), self.images, seed, EPOCHS)
        elif arm == "soft labels of an assistant":
            assistant = self._kept("assistant", STUDENT, 200)
            cache = extract_logits(assistant, self.images, self.work / "assistant.logits")
            self._soft(student, assistant, WithTargets(self.images, cache), seed, numbers)
        else:
            if arm.startswith("hints"):
                hints = Hints(student, self.teacher, example_inputs=self.images.images[:2])
                _fit(hints, self.images, seed, HINT_EPOCHS)
            self._soft(student, self.teacher, self.taught, seed, numbers)
        error = 1 - top1(student, self.test)
        return {"error": error, "seconds": round(time.process_time() - start, 1)}


def _built(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return architecture(name)


def _fit(objective: nn.Module, data: Any, seed: int, epochs: int) -> None:
    options: dict[str, Any] = {"epochs": epochs, "batch_size": BATCH, "lr": 0.02, "nesterov": True, "clip": 5.0}
    morph.fit(objective, data, schedule="cosine", warmup_epochs=0.3, channels_last=True, seed=seed, **options)


def _is_baseline(line: Job) -> bool:
    return (line["student"], line["arm"], line["seed"]) == (SMALL, "labels", 0)


def summary(bench: Bench) -> None:
    """Write means and deviations."""
    lines = results_in(bench.work / "jobs")
    groups: dict[str, list[float]] = defaultdict(list)
    for line in lines:
        if "temperature" in line:
            continue
        groups[f"{line['student']}: {line['arm']}"].append(line["error"])
    table = {name: spread(values) for name, values in sorted(groups.items())}
    facts = {
        "teacher": TEACHER,
        "teacher_error": 1 - top1(bench.teacher, bench.test),
        "data": f"CIFAR-10 at 32x32, {IMAGES:,} images, {EPOCHS} rounds ({HINT_EPOCHS} of hints before them), "
        "tested on 5,000",
    }
    path = save("hint_students", {**facts, "table": table, "runs": lines})
    grid = {(line["temperature"], line["alpha"]): 1 - line["error"] for line in lines if "temperature" in line}
    if grid:
        values = np.array([[grid.get((t, a), np.nan) for a in ALPHAS] for t in TEMPERATURES])
        picture = path.parent.parent / "pictures" / "temperature_and_alpha.png"
        baseline = next((1 - line["error"] for line in lines if _is_baseline(line)), None)
        title = f"{SMALL} taught by {TEACHER}: accuracy"
        grid_picture(values, TEMPERATURES, ALPHAS, picture, title=title, baseline=baseline, force=True)
    print(path)


if __name__ == "__main__":
    main(__doc__, "hint_students", Bench, jobs(), summary, ("error", "seconds"))
