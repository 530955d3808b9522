"""Numbers on the command line: sizes such as 1.4M, 90M, 1.2G, ratios of widths, and noise."""

from __future__ import annotations

import argparse

_FACTORS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}


def size(text: str) -> int:
    """Read ``1.4M`` as 1,400,000; plain numbers, underscores and commas are accepted.

    Raises:
        argparse.ArgumentTypeError: If it is not a positive number with one of those letters.
    """
    cleaned = text.strip().replace(",", "").replace("_", "")
    letter = cleaned[-1:].upper() if cleaned[-1:].isalpha() else ""
    try:
        value = round(float(cleaned[: len(cleaned) - len(letter)]) * _FACTORS[letter])
    except (ValueError, KeyError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write it like 1400000, 1.4M, 90M or 1.2G") from None
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not above zero")
    return value


def ratio(text: str) -> float:
    """Read a number above 1.

    Raises:
        argparse.ArgumentTypeError: If it is not.
    """
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a width over the present one, above 1, e.g. 1.25")
    return value


def noise(text: str) -> float:
    """Read a number from 0.

    Raises:
        argparse.ArgumentTypeError: If it is not.
    """
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a share of the size of weights, 0 or above, e.g. 0.01")
    return value
