"""Where in the user's own code something happens."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from types import CodeType

import torch

_LIBRARIES = (f"{Path(torch.__file__).parent}{os.sep}", f"{Path(__file__).parent.parent}{os.sep}", "<")


def user_frame(end: CodeType) -> tuple[str, int, str]:
    """File, line and function of the innermost frame outside torch and morph, below the one that runs ``end``."""
    frame = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if code is end:  # what lies above is whoever asked for the analysis
            break
        if not _is_library(code.co_filename):
            return code.co_filename, frame.f_lineno, code.co_name
        frame = frame.f_back  # type: ignore[assignment]
    return "", 0, ""


@functools.cache
def _is_library(file: str) -> bool:
    return file.startswith(_LIBRARIES)
