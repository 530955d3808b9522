"""Ask a teacher once for what it says of each image: `extract_labels` and `extract_logits`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from morph.atomic import check_writable
from morph.errors import CacheError, DataError
from morph.inputs import Inputs, arguments_of, logits_in, moved, picked, run_on, samples_in
from morph.label_heads import channel_logits, head_of
from morph.labels.cache_file import Header, Rows, appending, finish, part_of, read, require_same
from morph.labels.caches import LabelCache, LogitCache
from morph.labels.digests import teacher_digest
from morph.labels.samples import Indexed, Known, inputs_of, labelled
from morph.tracing import evaluation
from morph.zeroing import outputs_of

Progress = Callable[[int, int], None]


def extract_labels(
    teacher: nn.Module,
    data: Known,
    path: str | Path,
    *,
    threshold: float = 0.5,
    batch_size: int = 256,
    on_progress: Progress = lambda done, total: None,
    force: bool = False,
) -> LabelCache:
    """Write the multi-channel labels of a data set: a bit for each channel whose vote reaches the threshold.

    The file is written whole or not at all. A run that is killed leaves ``PATH.part`` behind, and the same call goes on
    from there; the rows are then the same, since batches begin at the same images. Where ``path`` is already a cache
    of this teacher, these images and this threshold, it is opened and nothing is computed.

    Source: "CMPUT 466 Mini Project" (2017), section 3 and Figure 4.

    Args:
        teacher: Has a `morph.label_heads.MultiChannelHead` (or a `VotingHead`); run in evaluation mode on the device
            that it is on, and left as it is.
        data: Images and labels without augmentation; or inputs of any form with labels, as a pair or as a mapping.
        path: Where to write.
        threshold: Where a vote, the sigmoid of a channel, counts; above 0 and below 1.
        batch_size: Images that the teacher sees at once.
        on_progress: Told how many images are done, and of how many, for progress displays.
        force: Whether an existing file of something else may be replaced.

    Raises:
        HeadError: The teacher does not have exactly one head for multi-channel labels.
        CacheError: ``path`` is a damaged cache or one of something else, or so is ``PATH.part``; both stay.
        DataError: The data is of another form, a number is out of its range, or the teacher gives a value that is not
            finite; names the image.
        OutputError: The file cannot be written.
    """
    if not 0 < threshold < 1:
        raise DataError(f"a threshold of {threshold}; give a vote above 0 and below 1, such as 0.5")
    head = head_of(teacher)
    bits = head.num_classes * head.channels
    limit = float(np.log(threshold / (1 - threshold)))  # of the logit

    def rows_of(x: Inputs) -> Rows:
        args, named = arguments_of(x)
        logits = _checked(channel_logits(teacher, *args, **named)[1], bits)
        return np.packbits(logits >= limit, axis=1)

    images, header = _prepare(
        teacher,
        data,
        batch_size,
        kind="labels",
        row_bytes=-(-bits // 8),
        classes=head.num_classes,
        channels=head.channels,
        dtype="bits",
        threshold=float(threshold),
    )
    _extract(teacher, images, Path(path), header, rows_of, on_progress, force=force)
    return LabelCache.open(path)


def extract_logits(
    teacher: nn.Module,
    data: Known,
    path: str | Path,
    *,
    dtype: Literal["float16", "float32"] = "float32",
    batch_size: int = 256,
    on_progress: Progress = lambda done, total: None,
    force: bool = False,
) -> LogitCache:
    """Write the logits of a teacher for a data set; like `extract_labels`, resumable and whole or not at all.

    Args:
        teacher: Any classifier whose first output is logits ``[N, classes]``; run in evaluation mode, left as it is.
        data: As for `extract_labels`.
        path: Where to write.
        dtype: Of the numbers in the file; what is read is float32.
        batch_size: As for `extract_labels`, and so on.
        on_progress: Likewise.
        force: Likewise.

    Raises:
        CacheError, DataError, OutputError: As `extract_labels`; DataError also where float16 cannot hold a logit.
    """
    if dtype not in ("float16", "float32"):
        raise DataError(f"logits in {dtype!r}; give float16 or float32")
    first = moved(picked(inputs_of(labelled(data)), slice(0, 1)), _device(teacher))
    with evaluation(teacher), torch.no_grad():
        logits = _logits(teacher, first)
    if logits is None or logits.dim() != 2:
        got = "no logits" if logits is None else list(logits.shape)
        raise DataError(f"{type(teacher).__name__} puts out {got} for one sample, expected logits [1, classes]")
    classes = logits.shape[1]

    def rows_of(x: Inputs) -> Rows:
        numbers = _checked(cast(Tensor, _logits(teacher, x)), classes)
        with np.errstate(over="ignore"):
            stored = numbers.astype(np.dtype(dtype).newbyteorder("<"))
        if not np.isfinite(stored).all():
            raise DataError(f"{type(teacher).__name__} gives a logit of {np.abs(numbers).max():.3g}; give float32")
        return np.ascontiguousarray(stored).view(np.uint8)

    width = np.dtype(dtype).itemsize * classes
    images, header = _prepare(
        teacher,
        data,
        batch_size,
        kind="logits",
        row_bytes=width,
        classes=classes,
        channels=1,
        dtype=dtype,
        threshold=0.0,
    )
    _extract(teacher, images, Path(path), header, rows_of, on_progress, force=force)
    return LogitCache.open(path)


def _logits(teacher: nn.Module, x: Inputs) -> Tensor | None:
    """What a teacher gives as logits: by that name or first, else its first output of real numbers."""
    output = run_on(teacher, x)
    found = logits_in(output)
    return next(iter(outputs_of(output)), None) if found is None else found


def _prepare(
    teacher: nn.Module,
    data: Known,
    batch_size: int,
    *,
    kind: str,
    row_bytes: int,
    classes: int,
    channels: int,
    dtype: str,
    threshold: float,
) -> tuple[Indexed, Header]:
    """The images, and what the file will be."""
    images = labelled(data)
    if batch_size < 1:
        raise DataError(f"a batch of {batch_size} images; give a batch size of at least 1")
    header = Header(
        kind=kind,
        samples=len(images),
        row_bytes=row_bytes,
        classes=classes,
        channels=channels,
        dtype=dtype,
        threshold=threshold,
        batch_size=batch_size,
        teacher=teacher_digest(teacher),
        data=images.fingerprint(),
    )
    return images, header


def _extract(
    teacher: nn.Module,
    images: Indexed,
    path: Path,
    header: Header,
    rows_of: Callable[[Inputs], Rows],
    on_progress: Progress,
    *,
    force: bool,
) -> None:
    """Append the rows of one batch after another, and then write the file."""
    if path.exists() and not force:
        present, _ = read(path)
        require_same(present, header, path, "give another name, or force to replace it")
        on_progress(len(images), len(images))
        return
    check_writable(path, force=force)
    device = _device(teacher)
    with appending(path, header) as (file, done):
        on_progress(done, len(images))
        with evaluation(teacher), torch.no_grad():
            for start in range(done, len(images), header.batch_size):
                x = moved(picked(inputs_of(images), slice(start, start + header.batch_size)), device)
                try:
                    rows = rows_of(x)
                except _NotFiniteError as error:
                    raise DataError(
                        f"{type(teacher).__name__} gives a value that is not finite (NaN or infinity) for image "
                        f"{start + error.row}; what was done before it is in {part_of(path)}"
                    ) from error
                asked = samples_in(x)
                if rows.shape != (asked, header.row_bytes):
                    raise CacheError(f"{path}: {asked} images gave rows of shape {rows.shape}")
                file.write(rows.tobytes())
                file.flush()
                on_progress(start + asked, len(images))
        os.fsync(file.fileno())
    finish(path, header, force=force)


class _NotFiniteError(Exception):
    """The teacher's output for one image of a batch is not finite."""

    def __init__(self, row: int) -> None:
        super().__init__(row)
        self.row = row


def _checked(output: Tensor, columns: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Outputs ``[n, columns]`` as NumPy numbers, if all are finite."""
    numbers = output.detach().double().cpu().numpy()
    if numbers.ndim != 2 or numbers.shape[1] != columns:
        raise CacheError(f"the teacher gave outputs of shape {list(numbers.shape)}, expected [N, {columns}]")
    finite = np.isfinite(numbers).all(1)
    if not finite.all():
        raise _NotFiniteError(int(finite.argmin()))
    return numbers


def _device(teacher: nn.Module) -> torch.device:
    return next((p.device for p in teacher.parameters()), torch.device("cpu"))
