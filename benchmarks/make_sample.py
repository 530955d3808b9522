"""Write the sample of CIFAR-10 that ships inside the package, from the test set as an image folder of JPEGs.

    python benchmarks/make_sample.py --data DIR --out morph/sample/cifar10.npz

The first images of each class are kept, byte for byte, in the order of their names. The same input gives the same file.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from morph.atomic import atomic_path
from morph.errors import DataError, MorphError


def collect(folder: Path, per_class: int) -> dict[str, np.ndarray]:
    """Read the first ``per_class`` JPEGs of each class folder.

    Returns:
        ``jpeg`` (the bytes of all files in a row), ``offsets`` (``[N + 1]``, where each begins), ``labels`` (``[N]``),
        ``classes`` and ``files`` (names).

    Raises:
        DataError: If there is no class folder, or one has too few images.
    """
    classes = sorted(child.name for child in folder.iterdir() if child.is_dir()) if folder.is_dir() else []
    if not classes:
        raise DataError(f"{folder}: has no folders of classes")
    paths = []
    for name in classes:
        found = sorted((folder / name).glob("*.jpg"))
        if len(found) < per_class:
            raise DataError(f"{folder / name}: holds {len(found)} .jpg files, {per_class} are needed")
        paths += found[:per_class]
    blobs = [path.read_bytes() for path in paths]
    return {
        "jpeg": np.frombuffer(b"".join(blobs), np.uint8),
        "offsets": np.cumsum([0, *map(len, blobs)], dtype=np.int32),
        "labels": np.repeat(np.arange(len(classes), dtype=np.uint8), per_class),
        "classes": np.array(classes),
        "files": np.array([f"{path.parent.name}/{path.name}" for path in paths]),
    }


def main() -> int:
    """Collect and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with test/CLASS/*.jpg")
    parser.add_argument("--out", type=Path, required=True, help="the .npz; replaced if it exists")
    parser.add_argument("--per-class", type=int, default=288, help="images of each class (default 288)")
    args = parser.parse_args()
    try:
        arrays = collect(args.data / "test", args.per_class)
        with atomic_path(args.out, force=True) as temporary:
            np.savez_compressed(temporary, allow_pickle=False, **arrays)
    except MorphError as error:
        print(f"make_sample: {error}", file=sys.stderr)
        return error.exit_code
    size = f"{len(arrays['labels'])} images of {len(arrays['classes'])} classes, {args.out.stat().st_size:,} bytes"
    print(f"{args.out}: {size}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
