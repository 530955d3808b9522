"""Models by name: ``zoo:NAME``, ``torchvision:NAME``, ``timm:NAME`` and ``package.module:callable``."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from morph.errors import ModelFileError, MorphError
from morph.files.names import working_folder_importable

Shape = tuple[int, ...] | None

_NAME = re.compile(r"(\w\w+(?:\.\w+)*):([\w.-]+)", re.ASCII)
_CALLABLE = re.compile(r"[A-Za-z_]\w+(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)


def is_name(source: str) -> bool:
    """Whether ``source`` has the form of a name; a path with a colon, or a drive letter, has not."""
    home, _, name = source.partition(":")
    return bool(_NAME.fullmatch(source)) and (home in _HOMES or bool(_CALLABLE.fullmatch(source))) and bool(name)


def build(source: str) -> tuple[nn.Module, str, Shape]:
    """Build the model that a name stands for, with fresh weights.

    Returns:
        The model, its kind (``zoo``, ``torchvision``, ``timm`` or ``callable``) and the shape of a sample where known.

    Raises:
        ModelFileError: If there is no such model, with near matches, or it cannot be built.
    """
    home, _, name = source.partition(":")
    if home in _HOMES:
        model, shape = _HOMES[home](name)
        return model, home, shape
    return _call(home, name), "callable", None


def _zoo(name: str) -> tuple[nn.Module, Shape]:
    from morph import zoo

    return zoo.build(name), zoo.input_shape(name)


def _torchvision(name: str) -> tuple[nn.Module, Shape]:
    from torchvision import models

    if name not in models.list_models():
        raise _unknown("torchvision", name, models.list_models())
    composed = "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters
    no_backbone = {"weights_backbone": None} if composed else {}  # else it would be downloaded
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # on how it draws weights
        model: nn.Module = _made(f"torchvision:{name}", lambda: models.get_model(name, weights=None, **no_backbone))
    side = getattr(model, "image_size", None)
    if not isinstance(side, int):
        recipes = [w.transforms for w in models.get_model_weights(name)]
        crops = [getattr(recipe, "keywords", {}).get("crop_size") for recipe in recipes]
        side = next((crop for crop in crops if isinstance(crop, int)), None)
    return model, None if side is None else (3, side, side)


def _timm(name: str) -> tuple[nn.Module, Shape]:
    try:
        import timm
    except ImportError as error:
        raise ModelFileError(f"timm:{name}: timm is not installed; pip install timm") from error
    if name not in timm.list_models():
        raise _unknown("timm", name, timm.list_models())
    model: nn.Module = _made(f"timm:{name}", lambda: timm.create_model(name, pretrained=False))
    shape = (getattr(model, "default_cfg", None) or {}).get("input_size")
    return model, tuple(shape) if shape else None


_HOMES: dict[str, Callable[[str], tuple[nn.Module, Shape]]] = {"zoo": _zoo, "torchvision": _torchvision, "timm": _timm}


def _unknown(home: str, name: str, known: Sequence[str]) -> ModelFileError:
    near = difflib.get_close_matches(name, known, 5)
    return ModelFileError(f"{home}:{name}: there is no such model" + (f"; near: {', '.join(near)}" if near else ""))


def _call(home: str, name: str) -> nn.Module:
    """Import the user's module and call what they named, without arguments."""
    source = f"{home}:{name}"
    try:
        with working_folder_importable():
            module = importlib.import_module(home)
    except Exception as error:  # whatever the user's module raises
        raise ModelFileError(f"{source}: {home} cannot be imported: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if not callable(found):
        near = difflib.get_close_matches(name, dir(module), 3)
        raise ModelFileError(
            f"{source}: {home} has no callable {name}" + (f"; near: {', '.join(near)}" if near else "")
        )
    with working_folder_importable():
        made = _made(source, found)
    if not isinstance(made, nn.Module):
        raise ModelFileError(f"{source}: gave a {type(made).__name__}, expected a torch.nn.Module")
    return made


def _made(source: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except MorphError:
        raise
    except Exception as error:  # whatever the maker raises
        raise ModelFileError(f"{source}: cannot be built: {type(error).__name__}: {error}") from error
