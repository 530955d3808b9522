"""What a teacher says of the images, kept in a file."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from morph.cli.training_runs import augmented

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from torch import nn

    from morph.images import LabelledImages
    from morph.labels import LabelCache, LogitCache, WithTargets


def cached(args: argparse.Namespace, images: LabelledImages, teacher: nn.Module, fabric: Fabric) -> WithTargets:
    """The images with the bits or logits of ``--cache``, which are computed if the file is not there.

    Raises:
        CacheError: If the file is damaged, or of another teacher or other images.
        OutputError: If it cannot be written.
    """
    from morph.labels import WithTargets

    if args.speaks:  # one process writes the file, then all read it
        _extract(args, images, teacher, fabric)
    fabric.barrier()
    return WithTargets(augmented(args, images), _extract(args, images, teacher, fabric))


def _extract(
    args: argparse.Namespace, images: LabelledImages, teacher: nn.Module, fabric: Fabric
) -> LabelCache | LogitCache:
    """Go through the images, or open the file."""
    from morph.cli import console
    from morph.labels import extract_labels, extract_logits

    home = next(p.device for p in teacher.parameters())
    with console.progress("teacher", quiet=args.json or not args.speaks) as advance:

        def tell(done: int, total: int) -> None:
            advance(done, total, str(args.cache))

        try:
            teacher.to(fabric.device)
            if args.multi_channel:
                return extract_labels(teacher, images, args.cache, threshold=args.threshold, on_progress=tell)
            return extract_logits(teacher, images, args.cache, on_progress=tell)
        finally:
            teacher.to(home)
