"""Small networks, images and files for the commands that train."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

import morph
from morph.cli.main import main


def network(width: int, classes: int = 3, seed: int = 0) -> nn.Module:
    """Two convolutions with a pooling behind each, for images of 8x8."""
    torch.manual_seed(seed)
    first = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
    second = nn.Sequential(nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, classes))
    return nn.Sequential(first, nn.MaxPool2d(2), second, head)


def make_files(folder: Path) -> None:
    """``teacher.pt``, ``assistant.pt``, ``student.pt`` and ``data.npz`` with 40 images of three classes."""
    for name, width in (("teacher", 9), ("assistant", 6), ("student", 4)):
        morph.save_model(network(width, seed=width), folder / f"{name}.pt", input_shape=(3, 8, 8))
    draw = np.random.default_rng(0)
    labels = np.arange(40) % 3
    images = draw.integers(0, 120, (40, 8, 8, 3)) + 60 * labels[:, None, None, None]
    np.savez(folder / "data.npz", images=images.astype(np.uint8), labels=labels)


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    code = main([*arguments])
    out, err = capsys.readouterr()
    return code, out, err


def contents() -> dict[Path, bytes]:
    """All files below the working folder."""
    return {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()}


def bad(capsys, *arguments: str) -> str:
    """The one line of a command that must be refused, and must leave every file as it was."""
    before = contents()
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, ""), err
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert contents() == before
    return err


def weights(name: str) -> dict[str, torch.Tensor]:
    """The tensors of a model file."""
    return morph.open_model(name).model.state_dict()


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    """Whether both hold the same bits."""
    return list(one) == list(two) and all(torch.equal(one[key], two[key]) for key in one)
