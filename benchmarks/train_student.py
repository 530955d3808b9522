"""Train the DARTS student that ships inside the package, on CIFAR-10 as an image folder.

    python benchmarks/train_student.py --data DIR --out student.pt --log results/train_student.json

Images grow from 16 to 32 pixels while the learning rate goes once up and down, so that the whole takes about an hour on
two CPU cores. The script resumes from ``--checkpoint`` if it exists.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.datasets import ImageFolder

from morph.zoo.darts import DARTS_V2, DartsNet

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def load(folder: Path, cache: Path | None) -> tuple[Tensor, Tensor]:
    """Read an image folder into ``uint8 [N, 3, 32, 32]`` and labels ``[N]``; kept in ``cache`` for the next run."""
    if cache and cache.exists():
        arrays = np.load(cache)
        return torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])
    pairs = [(np.asarray(image), label) for image, label in ImageFolder(str(folder))]
    images = np.stack([image for image, _ in pairs]).transpose(0, 3, 1, 2).copy()
    labels = np.array([label for _, label in pairs])
    if cache:
        np.savez(cache, images=images, labels=labels)
    return torch.from_numpy(images), torch.from_numpy(labels)


def normalise(images: Tensor) -> Tensor:
    """Map bytes to zero mean and unit variance by channel."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Pad by four pixels by reflection, crop at random and flip at random, image by image."""
    n, _, height, width = images.shape
    padded = F.pad(images, (4, 4, 4, 4), mode="reflect")
    top, left = torch.randint(0, 9, (2, n, 1, 1), generator=generator)
    columns = torch.arange(width).view(1, 1, width)
    columns = torch.where(torch.rand(n, 1, 1, generator=generator) < 0.5, columns, width - 1 - columns)
    rows = torch.arange(height).view(1, height, 1) + top
    index = torch.arange(n).view(n, 1, 1)
    return padded[index, :, rows, columns + left].permute(0, 3, 1, 2)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Fraction of ``images`` whose class is predicted."""
    model.eval()
    hits = sum(
        int((model(normalise(x)).argmax(1) == y).sum())
        for x, y in zip(images.split(500), labels.split(500), strict=True)
    )
    return hits / len(labels)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train/CLASS/*.jpg and test/CLASS/*.jpg")
    parser.add_argument("--out", type=Path, required=True, help="state_dict of the trained student")
    parser.add_argument("--log", type=Path, required=True, help="JSON with the curve and the conditions")
    parser.add_argument("--checkpoint", type=Path, required=True, help="written every epoch; training goes on from it")
    parser.add_argument("--cache", type=Path, help="folder for the decoded images")
    parser.add_argument("--sizes", default="16x5,24x4,32x3", help="pixels x epochs, in order")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="stop after this many steps (to try the script)")
    return parser.parse_args()


def main() -> None:
    """Train, log and save."""
    args = parse()
    torch.manual_seed(args.seed)
    sizes = [int(size) for part in args.sizes.split(",") for size, n in [part.split("x")] for _ in range(int(n))]
    cache = args.cache
    images, labels = load(args.data / "train", cache and cache / "train.npz")
    test_images, test_labels = load(args.data / "test", cache and cache / "test.npz")
    model = DartsNet(DARTS_V2, layers=10, channels=16).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = len(images) // args.batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=steps * len(sizes) + 1, pct_start=0.25
    )
    curve: list[dict[str, float]] = []
    if args.checkpoint.exists():
        saved = torch.load(args.checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        curve = saved["curve"]
    auxiliary_after = model.auxiliary_after
    for epoch in range(len(curve), len(sizes)):
        model.train()
        model.auxiliary_after = (
            auxiliary_after if sizes[epoch] == 32 else -1
        )  # the head needs the 8x8 map of full-size images
        generator = torch.Generator().manual_seed(1000 * args.seed + epoch)
        order = torch.randperm(len(images), generator=generator)
        start, total = time.time(), 0.0
        for step in range(steps):
            pick = order[step * args.batch : (step + 1) * args.batch]
            x = normalise(augment(images[pick], generator))
            if sizes[epoch] != 32:
                x = F.interpolate(x, size=sizes[epoch], mode="bilinear", antialias=True)
            outputs = model(x.contiguous(memory_format=torch.channels_last))
            heads = zip((1.0, 0.4), outputs if isinstance(outputs, tuple) else (outputs,), strict=False)
            loss = sum(weight * F.cross_entropy(logits, labels[pick], label_smoothing=0.05) for weight, logits in heads)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
            if step % 20 == 0:
                print(
                    f"epoch {epoch} {sizes[epoch]}px step {step}/{steps} loss {total / (step + 1):.3f} "
                    f"{(step + 1) * args.batch / (time.time() - start):.0f} images/s",
                    flush=True,
                )
            if args.limit and step >= args.limit:
                return
        seconds = time.time() - start
        curve.append({"epoch": epoch, "pixels": sizes[epoch], "loss": total / steps, "seconds": seconds})
        print(curve[-1], flush=True)
        temporary = args.checkpoint.with_suffix(".tmp")
        torch.save(
            {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "curve": curve,
            },
            temporary,
        )
        os.replace(temporary, args.checkpoint)
    torch.save({k: v.contiguous() for k, v in model.state_dict().items()}, args.out)
    args.log.write_text(
        json.dumps(
            {
                "data": "CIFAR-10 (JPEG copy), 50,000 training and 10,000 test images",
                "top1": accuracy(model, test_images, test_labels),
                "epochs": len(sizes),
                "sizes": args.sizes,
                "lr": args.lr,
                "batch": args.batch,
                "seed": args.seed,
                "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, no accelerator",
                "torch": torch.__version__,
                "curve": curve,
            },
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
