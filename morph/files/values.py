"""Attribute values and call arguments as tagged JSON.

None, bool, int, float, str and lists stand for themselves; everything else is an object with one key, the tag:
``{"tuple": [...]}``, ``{"dict": [[key, value], ...]}``, ``{"dtype": "float32"}``, ``{"global": dotted name}``,
``{"tensor": key}``, ``{"node": name}`` and so on; the tables below are the whole list.
"""

from __future__ import annotations

import enum
import functools
import re
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from morph.errors import ModelFileError
from morph.files import names
from morph.files.spec import Json

_DEPTH = 20
_DEVICE = re.compile(r"(cpu|cuda|mps|xpu|meta)(:\d{1,3})?", re.ASCII)
_DTYPES = {str(v)[6:]: v for v in vars(torch).values() if isinstance(v, torch.dtype)}
_LAYOUTS = {str(v)[6:]: v for v in vars(torch).values() if isinstance(v, torch.memory_format)}
_SEQUENCES: dict[str, Any] = {"tuple": tuple, "set": set, "frozenset": frozenset, "size": torch.Size}
_MAPPINGS: dict[str, Any] = {"dict": dict, "ordered_dict": OrderedDict}

Special = Callable[[object], Json]


class NotPlainError(Exception):
    """A value cannot be written; the text is its type."""


def encode(value: object, special: Special) -> Json:
    """Write ``value``.

    Args:
        value: The value.
        special: Asked for values that are not in the list; raises `NotPlainError` for those it does not know either.

    Raises:
        NotPlainError: If some part of it cannot be written.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value  # type: ignore[return-value]  # exact types, not narrowed by mypy
    again = functools.partial(encode, special=special)
    items: Any = value
    if isinstance(value, list) and type(value) in (list, fx.immutable_collections.immutable_list):
        return [again(item) for item in value]
    for tag, sequence in _SEQUENCES.items():
        if type(value) is sequence:
            return {tag: [again(item) for item in items]}
    for tag, mapping in _MAPPINGS.items():
        if type(value) is mapping or (tag == "dict" and type(value) is fx.immutable_collections.immutable_dict):
            return {tag: [[again(k), again(v)] for k, v in items.items()]}
    return _encode_leaf(value, special)


def _encode_leaf(value: object, special: Special) -> Json:
    again = functools.partial(encode, special=special)
    if isinstance(value, torch.dtype):
        return {"dtype": str(value)[6:]}
    if isinstance(value, torch.memory_format):
        return {"memory_format": str(value)[6:]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, slice):
        return {"slice": [again(value.start), again(value.stop), again(value.step)]}
    if value is Ellipsis:
        return {"ellipsis": None}
    if isinstance(value, enum.Enum):
        cls = type(value)
        return {"enum": [f"{cls.__module__}.{cls.__qualname__}", again(value.value)]}
    if type(value) is functools.partial:
        return {"partial": [again(value.func), again(value.args), again(value.keywords)]}
    name = names.value_name(value)
    return {"global": name} if name is not None else special(value)


@dataclass
class Scope:
    """What a value may refer to, and the names that it was seen to need.

    Attributes:
        trust: Names that the user accepts.
        tensors: Keys of the tensors in the file.
        nodes: Names of the nodes already computed; None outside graphs. In graphs no class or function is a value.
        needed: Filled while checking: name of each global -> what it is needed as.
    """

    trust: Collection[str] = ()
    tensors: Collection[str] = ()
    nodes: Collection[str] | None = None
    needed: dict[str, set[str]] = field(default_factory=dict)


def bad(what: str, where: str) -> ModelFileError:
    """The error for a value that is not of the list."""
    return ModelFileError(f"is damaged or was not written by morph: {where}: {what}")


def check(value: Json, scope: Scope, where: str, depth: int = 0) -> None:
    """Refuse a value that `decode` could not build, or that names something it must not. Imports and builds nothing.

    Raises:
        ModelFileError: If it is not a tagged value.
        UnsafeFileError: If it names a class or function that is neither known nor trusted.
    """
    if depth > _DEPTH:
        raise bad("values are nested too deeply", where)
    if isinstance(value, list):
        for item in value:
            check(item, scope, where, depth + 1)
    elif isinstance(value, dict):
        if len(value) != 1:
            raise bad(f"expected one tag, got {sorted(value)}", where)
        [(tag, content)] = value.items()
        _check_tag(tag, content, scope, where, depth + 1)


def _check_tag(tag: str, content: Json, scope: Scope, where: str, depth: int) -> None:
    known: dict[str, Collection[str]] = {
        "dtype": _DTYPES,
        "memory_format": _LAYOUTS,
        "tensor": scope.tensors,
        "node": scope.nodes or (),
    }
    if tag in _SEQUENCES and isinstance(content, list):
        check(content, scope, where, depth)
        if tag in ("set", "frozenset"):
            for item in content:
                _check_key(item, where)
        if tag == "size" and not all(type(item) is int for item in content):
            raise bad("a size holds something else than integers", where)
    elif tag in _MAPPINGS and isinstance(content, list):
        for pair in content:
            if not isinstance(pair, list) or len(pair) != 2:
                raise bad("a dictionary item is not a pair", where)
            _check_key(pair[0], where)
            check(pair, scope, where, depth)
    elif tag == "slice" and isinstance(content, list) and len(content) == 3:
        check(content, scope, where, depth)
    elif isinstance(content, str) and tag in known:
        if content not in known[tag]:
            raise bad(f"there is no {tag} {content!r}", where)
    elif tag == "device":
        if not isinstance(content, str) or not _DEVICE.fullmatch(content):
            raise bad(f"{content!r} is not a device", where)
    elif not (tag == "ellipsis" and content is None):
        _check_code(tag, content, scope, where, depth)


def _check_code(tag: str, content: Json, scope: Scope, where: str, depth: int) -> None:
    """Check the tags that stand for a class, a function or an instance."""
    if scope.nodes is not None:
        raise bad(f"{tag!r} is not an argument that a graph may have", where)
    match tag, content:
        case "global", str(name):
            names.check_name(name, scope.trust, value=True)
        case "enum", [str(name), plain]:
            names.check_name(name, scope.trust, value=False)
            _check_key(plain, where)
        case "partial", [{"global": str(name)}, {"tuple": list(args)}, {"dict": list(keywords)}]:
            check({"global": name}, scope, where, depth)
            check({"tuple": args}, scope, where, depth)
            check({"dict": keywords}, scope, where, depth)
            for pair in keywords:
                if not isinstance(pair, list) or not isinstance(pair[0], str) or not names.is_identifier(pair[0]):
                    raise bad("a keyword is not an identifier", where)
            return
        case "object", [str(name), {"dict": list(state)}]:
            if not names.is_trusted(name, scope.trust):
                raise names.refusal(name)
            check({"dict": state}, scope, where, depth)
        case _:
            raise bad(f"{tag!r} is not a value that a model may hold", where)
    scope.needed.setdefault(name, set()).add(tag)


def _check_key(value: Json, where: str) -> None:
    """Keys and elements of sets are plain, or tuples of plain values."""
    if isinstance(value, dict) and set(value) == {"tuple"} and isinstance(value["tuple"], list):
        for item in value["tuple"]:
            _check_key(item, where)
    elif isinstance(value, list | dict):
        raise bad("a key is neither plain nor a tuple of plain values", where)


@dataclass(frozen=True)
class Found:
    """What names in a checked value stand for: imported globals by name, tensors by key, nodes by name."""

    globals: Mapping[str, object]
    tensors: Mapping[str, Tensor]
    nodes: Mapping[str, fx.Node] = field(default_factory=dict)


def decode(value: Json, found: Found) -> object:
    """Give the value that a checked tagged value stands for.

    Raises:
        ModelFileError: If an enumeration has no such member.
    """
    if isinstance(value, list):
        return [decode(item, found) for item in value]
    if not isinstance(value, dict):
        return value
    [(tag, content)] = value.items()
    if isinstance(content, list):
        return _decode_list(tag, content, found)
    tables: dict[str, Mapping[str, object]] = {
        "dtype": _DTYPES,
        "memory_format": _LAYOUTS,
        "tensor": found.tensors,
        "node": found.nodes,
        "global": found.globals,
    }
    if tag in tables:
        return tables[tag][str(content)]
    return torch.device(str(content)) if tag == "device" else Ellipsis


def _decode_list(tag: str, content: list[Json], found: Found) -> object:
    items: list[Any] = [decode(item, found) for item in content[tag in ("enum", "object") :]]
    if tag in _SEQUENCES:
        return _SEQUENCES[tag](items)
    if tag in _MAPPINGS:
        return _MAPPINGS[tag](items)
    if tag == "slice":
        return slice(*items)
    if tag == "partial":
        function, args, keywords = items
        return functools.partial(function, *args, **keywords)
    name = str(content[0])
    if tag == "enum":
        for member in names.as_enum(found.globals[name], name):
            if type(member.value) is type(items[0]) and member.value == items[0]:
                return member
        raise ModelFileError(f"wants {name}({items[0]!r}), which this version of the library does not have")
    cls = names.as_plain_class(found.globals[name], name)
    instance: object = object.__new__(cls)
    instance.__dict__.update(items[0])
    return instance
