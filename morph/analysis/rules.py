"""Every built-in rule."""

from morph.analysis import borders, contractions, movement, scattering, statistics, transforms, windows
from morph.analysis.table import RULES

__all__ = ["RULES", "borders", "contractions", "movement", "scattering", "statistics", "transforms", "windows"]
