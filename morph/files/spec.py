"""The description of a model as plain data, and its JSON text. Nothing here imports, builds or trusts anything."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TypeVar

from morph.errors import ModelFileError

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


@dataclass(frozen=True)
class TensorSpec:
    """How a tensor is held: as a parameter or not, and whether it asks for a gradient."""

    parameter: bool
    requires_grad: bool


@dataclass(frozen=True)
class NodeSpec:
    """One node of a graph, as `torch.fx.Node`; ``args`` and ``kwargs`` are tagged values (see `morph.files.values`)."""

    op: str
    name: str
    target: str
    args: list[Json]
    kwargs: dict[str, Json]


@dataclass(frozen=True)
class ModuleSpec:
    """One module.

    Attributes:
        cls: Dotted name of its class.
        training: Its training flag.
        attributes: Plain attributes as tagged values.
        parameters: Local name -> key of the tensor, or None for a parameter that is absent.
        buffers: As ``parameters``.
        non_persistent: Names of the buffers that the state_dict leaves out.
        children: Local name -> index of a module earlier in the list, or None.
        graphs: For a graph network only: ``"always"``, or ``"train"`` and ``"eval"`` -> nodes in order of execution.
    """

    cls: str
    training: bool
    attributes: dict[str, Json]
    parameters: dict[str, str | None]
    buffers: dict[str, str | None]
    non_persistent: list[str]
    children: dict[str, int | None]
    graphs: dict[str, list[NodeSpec]] = field(default_factory=dict)


@dataclass(frozen=True)
class Description:
    """A whole model: its modules, children before parents and the root last, and how each tensor is held."""

    modules: list[ModuleSpec]
    tensors: dict[str, TensorSpec]

    def to_text(self) -> str:
        """JSON text from which `from_text` gives an equal description."""
        return json.dumps(asdict(self), separators=(",", ":"))


def from_text(text: str) -> Description:
    """Read the text of a description and check that every part has the type it must have.

    Raises:
        ModelFileError: If it is not such a text; says where.
    """
    try:
        value: Json = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(f"the description is not JSON ({error})") from error
    top = _record(value, Description, "the description")
    tensors = {key: _tensor(item, key) for key, item in _object(top["tensors"], "tensors").items()}
    modules = [_module(item, f"module {i}") for i, item in enumerate(_list(top["modules"], "modules"))]
    if not modules:
        raise _damaged("the description holds no module")
    return Description(modules, tensors)


def _damaged(what: str) -> ModelFileError:
    return ModelFileError(f"is damaged or was not written by morph: {what}")


_T = TypeVar("_T", str, bool, int)


def _plain(value: Json, kind: type[_T], where: str) -> _T:
    if type(value) is not kind:
        raise _damaged(f"{where} is {type(value).__name__}, expected {kind.__name__}")
    return value


def _list(value: Json, where: str) -> list[Json]:
    if not isinstance(value, list):
        raise _damaged(f"{where} is {type(value).__name__}, expected list")
    return value


def _object(value: Json, where: str) -> dict[str, Json]:
    if not isinstance(value, dict):
        raise _damaged(f"{where} is {type(value).__name__}, expected an object")
    return value


def _record(value: Json, cls: type, where: str) -> dict[str, Json]:
    """An object with exactly the fields of ``cls``."""
    found, expected = _object(value, where), {f.name for f in fields(cls)}
    if set(found) != expected:
        raise _damaged(f"{where} has the fields {sorted(found)}, expected {sorted(expected)}")
    return found


def _table(value: Json, kind: type[_T], where: str) -> dict[str, _T | None]:
    return {k: None if v is None else _plain(v, kind, f"{where}, {k}") for k, v in _object(value, where).items()}


def _tensor(value: Json, key: str) -> TensorSpec:
    found = _record(value, TensorSpec, f"tensor {key}")
    return TensorSpec(_plain(found["parameter"], bool, key), _plain(found["requires_grad"], bool, key))


def _module(value: Json, where: str) -> ModuleSpec:
    found: Mapping[str, Json] = _record(value, ModuleSpec, where)
    return ModuleSpec(
        cls=_plain(found["cls"], str, f"{where}, cls"),
        training=_plain(found["training"], bool, f"{where}, training"),
        attributes=_object(found["attributes"], f"{where}, attributes"),
        parameters=_table(found["parameters"], str, f"{where}, parameters"),
        buffers=_table(found["buffers"], str, f"{where}, buffers"),
        non_persistent=[_plain(v, str, f"{where}, non_persistent") for v in _list(found["non_persistent"], where)],
        children=_table(found["children"], int, f"{where}, children"),
        graphs={
            mode: [_node(item, f"{where}, {mode} node {i}") for i, item in enumerate(_list(nodes, where))]
            for mode, nodes in _object(found["graphs"], f"{where}, graphs").items()
        },
    )


def _node(value: Json, where: str) -> NodeSpec:
    found = _record(value, NodeSpec, where)
    op, name, target = (_plain(found[part], str, f"{where}, {part}") for part in ("op", "name", "target"))
    return NodeSpec(op, name, target, _list(found["args"], where), _object(found["kwargs"], where))
