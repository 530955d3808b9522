"""The log of a training run: a CSV file that is written anew, whole, after each round, so that no kill can tear it."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_fabric.loggers.logger import Logger

from morph.atomic import write_text
from morph.errors import TrainingError


def write_csv(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the rows of a history; a column for every key, empty where a row lacks it.

    Raises:
        OutputError: If the file cannot be written.
    """
    columns = list(dict.fromkeys(key for row in history for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write_text(path, text.getvalue(), force=True)


def tensorboard_logger(folder: str | Path) -> Logger:
    """A logger for `lightning_fabric.Fabric(loggers=...)` that writes events for TensorBoard.

    Raises:
        TrainingError: If TensorBoard is not installed.
    """
    from lightning_fabric.loggers.tensorboard import TensorBoardLogger

    try:
        return TensorBoardLogger(root_dir=folder, name="", version="")
    except ModuleNotFoundError as error:
        raise TrainingError(
            "logs for TensorBoard need it: pip install tensorboard, or leave --tensorboard out"
        ) from error
