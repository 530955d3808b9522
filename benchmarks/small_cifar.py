"""CIFAR-10 at half its resolution, for experiments on a processor: a quarter of the work, the same question."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.datasets import ImageFolder

from morph.augmentation import Augmented
from morph.images import CIFAR10, LabelledImages

CLASSES = 10


def load(folder: Path, cache: Path, pixels: int = 16) -> tuple[LabelledImages, LabelledImages]:
    """Training and test images ``[N, 3, pixels, pixels]``, averaged down and normalised.

    Args:
        folder: Holds ``train`` and ``test`` with one folder of images per class.
        cache: Folder that keeps the decoded images for the next time.
        pixels: Side of the images that come out.
    """
    return _part(folder, cache, "train", pixels), _part(folder, cache, "test", pixels)


def _part(folder: Path, cache: Path, part: str, pixels: int) -> LabelledImages:
    path = cache / f"cifar-{part}-{pixels}.npz"
    if not path.exists():
        pairs = [(np.asarray(image), label) for image, label in ImageFolder(str(folder / part))]
        whole = torch.from_numpy(np.stack([image for image, _ in pairs])).permute(0, 3, 1, 2).float() / 255
        small = F.interpolate(whole, size=pixels, mode="area") if pixels != whole.shape[-1] else whole
        cache.mkdir(parents=True, exist_ok=True)
        np.savez(path, images=small.mul(255).round().byte().numpy(), labels=np.array([label for _, label in pairs]))
    arrays = np.load(path)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in CIFAR10)
    images = (torch.from_numpy(arrays["images"]).float() / 255 - mean) / std
    names = tuple(sorted(p.name for p in (folder / part).iterdir() if p.is_dir())) if folder.exists() else None
    return LabelledImages(images, torch.from_numpy(arrays["labels"]), names, f"CIFAR-10 at {pixels}x{pixels}, {part}")


def subset(images: LabelledImages, number: int, seed: int = 0) -> LabelledImages:
    """So many of the images, drawn by seed."""
    pick = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:number]
    return LabelledImages(images.images[pick], images.labels[pick], images.classes, images.source)


def augmented_rounds(images: LabelledImages, rounds: int, pad: int = 2, seed: int = 0) -> LabelledImages:
    """``rounds`` rounds through the images, shifted and mirrored at random, one after another."""
    number = rounds * -(-len(images) // 500)
    batches = list(itertools.islice(Augmented(images, pad).batches(500, seed), number))
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return LabelledImages(x, y, images.classes, images.source)


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """Outputs ``[N, classes]`` in evaluation mode."""
    model.eval()
    return torch.cat([model(x) for x in images.split(500)])


def top1(model: nn.Module, images: LabelledImages) -> float:
    """Share of the images whose class is predicted."""
    return float((logits_of(model, images.images).argmax(1) == images.labels).float().mean())
