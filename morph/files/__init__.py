"""Open and save models without running code that a file holds."""

from morph.files.opening import OpenedModel, open_model, read_record
from morph.files.own import save_model

__all__ = ["OpenedModel", "open_model", "read_record", "save_model"]
