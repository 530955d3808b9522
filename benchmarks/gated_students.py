"""Which student inside a teacher learns best from it: searches by gates beside cuts by weights, at equal multiply-adds.

    python benchmarks/gated_students.py --data DIR                 # everything; goes on where it was stopped
    python benchmarks/gated_students.py --data DIR --summary       # writes results/gated_students_*.json

A small DenseNet-BC teacher is trained on CIFAR-10 at 16x16. Each way gives a student of 30 % of its multiply-adds;
every student starts from fresh weights (and, in rows that say so, from those that it inherits) and is distilled on the
same images with the same numbers: temperature 4, a tenth of the labels' cross-entropy (Gu and Tresp, section 4.2).
Any number of processes may work at the list of jobs at the same time.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from gated_students_picture import draw
from job_list import Job, main, results_in, spread
from machine import save
from small_cifar import augmented_rounds, load, logits_of, subset, top1
from torch import nn
from torch.nn import functional as F

import morph
from morph.augmentation import Augmented
from morph.fresh_weights import reinitialise
from morph.images import LabelledImages
from morph.search_losses import DistillationLoss
from morph.search_options import SearchOptions
from morph.zoo import build

TEACHER, SHARE = "densenet-bc-22-12", 0.3
IMAGES, SEARCH_ROUNDS, STUDENT_ROUNDS, TEACHER_ROUNDS, BATCH = 20_000, 4, 8, 8, 64
SEARCHES = ("kd-weighted", "kd", "np-weighted", "np")
OTHERS = ("uniform", "random", "torch-pruning group norm", "torch-pruning taylor")
SEEDS = (0, 1, 2)


def jobs() -> Iterator[dict[str, Any]]:
    """All that is to be done, the most wanted first."""
    for ways in (("kd-weighted", "np-weighted"), OTHERS, ("kd", "np")):
        for seed in SEEDS:
            for weights in ("inherited", "fresh"):
                for way in ways:
                    yield {"way": way, "seed": seed, "weights": weights, "options": {}}
    for lambda2 in (3e-4, 1e-2, 3e-2, 1e-1):
        yield {"way": "kd-weighted", "seed": 0, "weights": "fresh", "options": {"lambda2": lambda2}}
    for kl0 in (0.05, 0.1, 0.2, 0.4):
        yield {"way": "kd-weighted", "seed": 0, "weights": "fresh", "options": {"kl0": kl0}}
    for seed in SEEDS:  # as many rounds as weights have seen that a search has trained
        rounds = {"rounds": SEARCH_ROUNDS + STUDENT_ROUNDS}
        yield {"way": "torch-pruning taylor", "seed": seed, "weights": "inherited", "options": rounds}


class Bench:
    """Data, teacher and the ways to a student.

    Args:
        data: Folder with the images.
        work: Folder for what is kept between runs.
    """

    def __init__(self, data: Path, work: Path) -> None:
        whole, self.test = load(data, work)
        self.work = work
        self.images = subset(whole, IMAGES)
        self.teacher = self._teacher(whole, work / "teacher.pt")
        self.sample = self.test.images[:2]
        self.macs = morph.count(self.teacher, self.sample[:1]).macs
        self.lessons = augmented_rounds(self.images, STUDENT_ROUNDS)
        self.wanted = self._logits(work / "teacher-logits.pt")

    def _teacher(self, whole: LabelledImages, path: Path) -> nn.Module:
        torch.manual_seed(0)
        teacher = build(TEACHER)
        if path.exists():
            teacher.load_state_dict(torch.load(path, weights_only=True))
        else:
            lessons = augmented_rounds(whole, TEACHER_ROUNDS)
            train(teacher, lessons, F.one_hot(lessons.labels, 10).float(), DistillationLabels(), seed=0, batch=128)
            torch.save(teacher.state_dict(), path)
        return teacher.eval()

    def _logits(self, path: Path) -> torch.Tensor:
        if not path.exists():
            part = path.with_suffix(f".{os.getpid()}")
            torch.save(logits_of(self.teacher, self.lessons.images), part)
            part.replace(path)
        found: torch.Tensor = torch.load(path, weights_only=True)
        return found

    def _lessons(self, rounds: int) -> tuple[LabelledImages, torch.Tensor]:
        if rounds == STUDENT_ROUNDS:
            return self.lessons, self.wanted
        lessons = augmented_rounds(self.images, rounds)
        return lessons, logits_of(self.teacher, lessons.images)

    def run(self, job: Job) -> Job:
        """Find one student, teach it and test it."""
        start = time.process_time()
        torch.manual_seed(job["seed"])
        inherited = job["weights"] == "inherited"
        options = dict(job["options"])
        lessons, wanted = self._lessons(options.pop("rounds", STUDENT_ROUNDS))
        model, facts = self.student(job["way"], job["seed"], options, inherited)
        found = time.process_time()
        size = morph.count(model, self.sample[:1])
        loss = train(model, lessons, wanted, DistillationLoss(4.0, label_share=0.1), seed=job["seed"], batch=BATCH)
        error = 1 - top1(model, self.test)
        seconds = {"search_s": round(found - start, 1), "training_s": round(time.process_time() - found, 1)}
        return {"error": error, "loss": loss, "macs": size.macs, "params": size.params, **seconds, **facts}

    def student(
        self, way: str, seed: int, options: dict[str, float], inherit: bool
    ) -> tuple[nn.Module, dict[str, Any]]:
        """A student found in one way, and what is known of how."""
        target = SHARE * self.macs
        if way in SEARCHES:
            data = Augmented(subset(self.images, IMAGES), 2)
            numbers: dict[str, Any] = {"epochs": SEARCH_ROUNDS, "batch_size": BATCH, "seed": seed}
            numbers |= options
            found = morph.search_student(self.teacher, data, target_macs=target, mode=way, inherit=inherit, **numbers)
            details = found.record.details
            return found.model, {k: details[k] for k in ("steps", "forced", "lambda2", "gates_open")} | {
                "check": found.record.to_json()["max_abs_diff"],
                "layers": widths(found.model),
                "kl": details["history"][-1].get("kl"),
            }
        if way.startswith("torch-pruning"):
            model = self._peer(way.split(" ", 1)[1], target)
        else:
            ranking: Any = "local" if way == "uniform" else "global"
            model = morph.prune(
                self.teacher, self.sample, target_macs=target, ranking=ranking, score="random", seed=seed
            ).model
        if not inherit:
            reinitialise(model, seed)
        return model, {"layers": widths(model)}

    def _peer(self, importance: str, target: float) -> nn.Module:
        model = build(TEACHER)
        model.load_state_dict(self.teacher.state_dict())
        scores = {
            "group norm": tp.importance.GroupMagnitudeImportance,
            "taylor": tp.importance.GroupTaylorImportance,
        }[importance]()
        if importance == "taylor":
            model.eval()
            x, y = self.images.images[:1024], self.images.labels[:1024]
            F.cross_entropy(model(x), y).backward()
        pruner = tp.pruner.MetaPruner(
            model.eval(),
            self.sample[:1],
            importance=scores,
            global_pruning=True,
            pruning_ratio=0.95,
            iterative_steps=200,
            ignored_layers=[m for m in model.modules() if isinstance(m, nn.Linear)],
        )
        while morph.count(model, self.sample[:1]).macs > target:
            pruner.step()
        return model.requires_grad_(True)


def widths(model: nn.Module) -> list[int]:
    """Output channels of every convolution, in order."""
    return [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]


class DistillationLabels:
    """Cross-entropy with probabilities: for the teacher, who learns from labels."""

    def __call__(self, student: torch.Tensor, wanted: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """One value per sample."""
        return F.cross_entropy(student, labels, reduction="none")


def train(
    model: nn.Module, lessons: LabelledImages, wanted: torch.Tensor, loss: Any, *, seed: int, batch: int
) -> float:
    """One passage through all lessons, learning rate once up and down; the last mean loss."""
    model.train().to(memory_format=torch.channels_last)
    steps = len(lessons) // batch
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps + 1, pct_start=0.2)
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


def sweeps(lines: list[Job]) -> Job:
    """Errors over one number of the search, the rest as it is (Gu and Tresp, figures 4 and 6); one seed.

    With the number that the searches of the table have, and the correlation of number and error.
    """
    usual = {"lambda2": SearchOptions().lambda2, "kl0": SearchOptions().kl0}
    plain = [
        line for line in lines if line["way"] == "kd-weighted" and line["seed"] == 0 and line["weights"] == "fresh"
    ]
    found: Job = {}
    for name, default in usual.items():
        rows = sorted(
            (line["options"].get(name, default), line["error"], line["forced"], line["kl"])
            for line in plain
            if line["options"].keys() <= {name}
        )
        fields = (name, "error", "forced", "kl")
        found[name] = {"rows": [dict(zip(fields, row, strict=True)) for row in rows]}
        if len(rows) > 2:
            found[name]["correlation"] = statistics.correlation(*zip(*((row[0], row[1]) for row in rows), strict=True))
    return found


def summary(bench: Bench) -> None:
    """Write means and deviations, and draw them."""
    lines = [
        {**line, "lambda2": [line["lambda2"][0], line["lambda2"][-1]]} if line.get("lambda2") else line
        for line in results_in(bench.work / "jobs")
    ]
    groups = defaultdict(list)
    for line in lines:
        if line["options"].keys() <= {"rounds"}:
            more = "".join(f", {value} {key}" for key, value in line["options"].items())
            groups[f"{line['way']}, {line['weights']} weights{more}"].append(line)
    table = {
        name: {**spread([line["error"] for line in group]), "runs": group}
        for name, group in sorted(groups.items(), key=lambda item: statistics.mean(r["error"] for r in item[1]))
    }
    facts = {
        "teacher": TEACHER,
        "teacher_error": 1 - top1(bench.teacher, bench.test),
        "teacher_macs": bench.macs,
        "data": f"CIFAR-10 at 16x16: teacher {TEACHER_ROUNDS} rounds of 50,000; search {SEARCH_ROUNDS} and students "
        f"{STUDENT_ROUNDS} rounds of {IMAGES:,}; tested on 10,000",
    }
    varied = sweeps(lines)
    means = {
        name: {k: v for k, v in row.items() if k != "runs"}
        | {k: [r[k] for r in row["runs"]] for k in ("macs", "params")}
        for name, row in table.items()
    }
    path = save("gated_students", {**facts, "table": means, "sweeps": varied, "runs": lines})
    drawn = {name: sweep for name, sweep in varied.items() if len(sweep["rows"]) > 1}
    draw(table, drawn, path.parent.parent / "pictures" / "gated_students.png")
    print(json.dumps(means, indent=1), path, sep="\n")


if __name__ == "__main__":
    main(__doc__, "gated_students", Bench, jobs(), summary, ("error", "macs", "search_s"))
