"""A whole pickled module, read without making one instance of its classes.

The unpickler is given an inert stand-in for every class and function that the file names. What comes out is a tree of
stand-ins, which is rewritten as a description and then checked and built like one of our own files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

from torch import Tensor, nn

from morph.errors import UnsafeFileError
from morph.files import names, values
from morph.files.describe import BASE_STATE, RECURRENT
from morph.files.spec import Description, Json, ModuleSpec, TensorSpec
from morph.files.values import NotPlainError


class StandIn:
    """In place of an instance of the class, or of the result of the function, that ``dotted`` names; does nothing."""

    dotted: ClassVar[str]

    arguments: tuple[object, ...] = ()
    called: bool = False
    state: object = None

    def __new__(cls, *arguments: object) -> Self:  # noqa: D102  as object's
        made = super().__new__(cls)
        made.arguments = arguments
        return made

    def __init__(self, *arguments: object) -> None:
        self.called = True  # only a call comes here; instances made without their constructor do not

    def __setstate__(self, state: object) -> None:
        self.state = state


def stand_in(name: str) -> type[StandIn]:
    """Make the stand-in of one name."""
    return type(name, (StandIn,), {"dotted": name})


def is_module(value: object) -> bool:
    """Whether ``value`` stands for a module."""
    return isinstance(value, StandIn) and isinstance(value.state, dict) and "_modules" in value.state


def describe_pickle(root: StandIn) -> tuple[Description, dict[str, Tensor]]:
    """Rewrite a tree of stand-ins as a description with its tensors.

    Raises:
        UnsafeFileError: If something in it cannot be rebuilt without running code of the file's choosing.
    """
    writer = _Writer()
    writer.module(root, "")
    return Description(writer.modules, writer.specs), writer.tensors


def _cannot(where: str, what: str) -> UnsafeFileError:
    return UnsafeFileError(
        f"{where or 'the model'} {what}, which cannot be rebuilt safely; use --allow-code to run "
        "whatever the file holds"
    )


class _Writer:
    """Collects modules and tensors; each of them once, however often it is used."""

    def __init__(self) -> None:
        self.modules: list[ModuleSpec] = []
        self.specs: dict[str, TensorSpec] = {}
        self.tensors: dict[str, Tensor] = {}
        self._index: dict[int, int] = {}
        self._keys: dict[int, str] = {}

    def module(self, module: object, path: str) -> int:
        """Rewrite ``module`` and return its index."""
        if id(module) in self._index:
            if self._index[id(module)] < 0:
                raise _cannot(path, "contains itself")
            return self._index[id(module)]
        if not isinstance(module, StandIn) or not isinstance(module.state, dict) or module.called or module.arguments:
            raise _cannot(path, "is not a plainly pickled module")
        self._index[id(module)] = -1
        state = module.state
        for key, value in state.items():
            if not isinstance(key, str):
                raise _cannot(path, "has an attribute without a name")
            if key in BASE_STATE and "hook" in key and isinstance(value, dict) and value:
                raise _cannot(path, f"has hooks ({key})")
        recurrent = isinstance(state.get("_flat_weights_names"), list)
        skipped = BASE_STATE | {"_compiled_call_impl"} | (RECURRENT if recurrent else frozenset())
        children = _table(state, "_modules", path)
        spec = ModuleSpec(
            cls=module.dotted,
            training=bool(state.get("training", True)),
            attributes={k: self.value(v, _join(path, k)) for k, v in state.items() if k not in skipped},
            children={k: None if v is None else self.module(v, _join(path, k)) for k, v in children.items()},
            parameters={k: self.tensor(v, _join(path, k)) for k, v in _table(state, "_parameters", path).items()},
            buffers={k: self.tensor(v, _join(path, k)) for k, v in _table(state, "_buffers", path).items()},
            non_persistent=_names(state.get("_non_persistent_buffers_set", set()), path),
        )
        self.modules.append(spec)
        self._index[id(module)] = len(self.modules) - 1
        return self._index[id(module)]

    def tensor(self, value: object, where: str) -> str | None:
        """Note a tensor and return its key."""
        if value is None:
            return None
        if not isinstance(value, Tensor):
            raise _cannot(where, f"is of type {type(value).__name__} instead of a tensor")
        if id(value) in self._keys:
            return self._keys[id(value)]
        key, number = where, 1
        while key in self.tensors:
            number += 1
            key = f"{where}~{number}"
        self._keys[id(value)] = key
        self.tensors[key] = value
        self.specs[key] = TensorSpec(isinstance(value, nn.Parameter), value.requires_grad)
        return key

    def value(self, value: object, where: str) -> Json:
        """Rewrite an attribute."""

        def special(item: object) -> Json:
            if isinstance(item, Tensor):
                return {"tensor": self.tensor(item, where)}
            if isinstance(item, type) and issubclass(item, StandIn):
                return {"global": names.function_alias(item.dotted)}
            if isinstance(item, StandIn):
                return self._instance(item, where)
            raise NotPlainError(type(item).__name__)

        try:
            return values.encode(value, special)
        except NotPlainError as error:
            raise _cannot(where, f"is of type {error}") from error
        except RecursionError as error:
            raise _cannot(where, "is nested without end") from error

    def _instance(self, item: StandIn, where: str) -> Json:
        """A partial function, a member of an enumeration, or an instance with a plain ``__dict__``."""
        if item.dotted == "functools.partial":
            if not (isinstance(item.state, tuple) and len(item.state) == 4):
                raise _cannot(where, "is an odd functools.partial")
            function, args, keywords, _ = item.state
            return {"partial": [self.value(function, where), self.value(args, where), self.value(keywords, where)]}
        if is_module(item):
            raise _cannot(where, "holds a module that is not among the children")
        if item.called and len(item.arguments) == 1 and item.state is None:
            return {"enum": [item.dotted, self.value(item.arguments[0], where)]}
        if not item.called and not item.arguments and isinstance(item.state, dict | None):
            return {"object": [item.dotted, self.value(item.state or {}, where)]}
        raise _cannot(where, f"wants to call {item.dotted}")


def _join(path: str, part: str) -> str:
    return f"{path}.{part}" if path else part


def _table(state: Mapping[str, object], key: str, path: str) -> dict[str, object]:
    found = state.get(key, {})
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise _cannot(path, f"has odd {key}")
    return found


def _names(found: object, path: str) -> list[str]:
    if not isinstance(found, set) or not all(isinstance(name, str) for name in found):
        raise _cannot(path, "has odd buffers")
    return sorted(found)
