"""Numbers on the command line: sizes such as 1.4M, 90M, 1.2G, ratios of widths, and noise."""

from __future__ import annotations

import argparse
from collections.abc import Callable

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
    """Read a number above 1; errors as for `size`."""
    return _number(text, lambda value: 1 < value < float("inf"), "a width over the present one, above 1, e.g. 1.25")


def share(text: str) -> float:
    """Read a share from 0 to below 1; errors as for `size`."""
    return _number(text, lambda value: 0 <= value < 1, "a share of the units from 0 to below 1, e.g. 0.5")


def shares(text: str) -> tuple[float, ...]:
    """Read ``0.3,0.6,0.8``: ascending shares between 0 and 1; errors as for `size`."""
    what = "shares of the run between 0 and 1, ascending, e.g. 0.3,0.6,0.8"
    values = tuple(_number(part, lambda value: 0 < value < 1, what) for part in text.split(","))
    if list(values) != sorted(values):
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return values


def noise(text: str) -> float:
    """Read a number from 0; errors as for `size`."""
    what = "a share of the size of weights, 0 or above, e.g. 0.01"
    return _number(text, lambda value: 0 <= value < float("inf"), what)


def _number(text: str, allowed: Callable[[float], bool], what: str) -> float:
    """Read a number that is allowed."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not allowed(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return value
