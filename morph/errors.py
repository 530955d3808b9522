"""Every exception that `morph` raises on purpose.

The text of each is one clear line: what was got, what was expected, where, and the way out. The command line prints
that line and ends with ``exit_code``.
"""

from __future__ import annotations


class MorphError(Exception):
    """Base of all errors below. ``exit_code`` is what the command line ends with."""

    exit_code = 2


class ModelFileError(MorphError):
    """A model file is missing, unreadable, truncated, or does not describe a model."""


class UnsafeFileError(ModelFileError):
    """A model file would run code if opened; the text names what it wanted and the flag that would accept it."""


class DataError(MorphError):
    """The images or labels are missing, unreadable, or do not fit the model."""


class TraceError(MorphError):
    """The model cannot be traced, or does not accept the example inputs; names the line of the user's code."""


class SymbolicTraceError(TraceError):
    """The model has no symbolic graph; what needs none works all the same."""


class AnalysisError(MorphError):
    """An operator does not fit its rule, or a rule is not one."""


class CountError(MorphError):
    """Parameters or multiply-adds could not be counted."""


class PictureError(MorphError):
    """A picture could not be drawn."""


class ProbeError(MorphError):
    """A Fisher probe received no gradient, or the loss is not one finite value per sample."""


class NothingToGrowError(MorphError):
    """The model has nothing that the chosen move can change."""


class TargetError(MorphError):
    """A size target is below the present size, or out of reach."""


class EditError(MorphError):
    """An edit cannot be applied exactly; the text says to what and why."""


class HeadError(MorphError):
    """A model has no classifier that can be swapped, or no place for the head that was asked for; says why."""


class CacheError(MorphError):
    """A cache of labels or logits is damaged, or is of another teacher or of other data; it stays as it is."""


class GateError(MorphError):
    """Gates cannot be put there, learned with these numbers, or attached to this optimizer."""


class SearchError(MorphError):
    """A search for a student had to stop; the text says where its last good state is."""

    exit_code = 1


class SearchStateError(MorphError):
    """The saved state of a search cannot be read, or is of another search."""


class StorageError(MorphError):
    """The place where a study is kept cannot be reached or read, or a package for it is missing."""


class TrainingError(MorphError):
    """A training run cannot begin with these numbers, or had to stop; the text says where its last good state is."""


class TrainingStateError(MorphError):
    """The saved state of a training run cannot be read, or is of another run."""


class DivergedError(TrainingError, SearchError):
    """A loss, a weight or an output is not a finite number any more; the text says where the last good state is."""

    exit_code = 1


class TeachingError(MorphError):
    """A teacher, a student and what shall be taught do not fit together, or a number of a loss is out of its range."""


class FamilyError(MorphError):
    """The settings of a family of networks are outside their ranges, or give no network."""


class TapError(TeachingError):
    """There is no such module or node to tap, or what flows there cannot be handed out as it was."""


class DeviceError(MorphError):
    """There is no such device, or it cannot compute in this precision."""


class PlanMismatchError(MorphError):
    """A saved plan was made for another model."""


class OutputError(MorphError):
    """A result cannot be written where it was asked for."""


class CheckFailedError(MorphError):
    """A result is not what it must be; nothing is returned or written."""

    exit_code = 1
