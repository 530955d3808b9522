"""Sizes on the command line: 1.4M, 90M, 1.2G."""

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
