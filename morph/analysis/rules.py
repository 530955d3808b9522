"""Every built-in rule."""

from morph.analysis import contractions, movement, statistics, windows
from morph.analysis.table import RULES

__all__ = ["RULES", "contractions", "movement", "statistics", "windows"]
