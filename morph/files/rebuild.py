"""Check a description completely, and only then build the model from it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from morph.errors import ModelFileError, UnsafeFileError
from morph.files import graphs, names, values
from morph.files.describe import BASE_STATE, RECURRENT
from morph.files.network import GraphNetwork
from morph.files.spec import Description, ModuleSpec
from morph.files.values import Found, Scope

_MODULE_NAMES = frozenset(dir(nn.Module)) | BASE_STATE


def rebuild(description: Description, tensors: Mapping[str, Tensor], trust: Collection[str] = ()) -> nn.Module:
    """Check ``description`` and build its model. No constructor is called and no code of the file's choosing runs.

    Args:
        description: What `morph.files.describe` wrote, or a file claims so.
        tensors: The tensors by key; the model takes them over.
        trust: Dotted names or package prefixes that the user accepts beside the known classes.

    Raises:
        ModelFileError: If the description is damaged or does not fit the tensors or this installation.
        UnsafeFileError: If it wants something that is not among the known names.
    """
    needed = _check(description, trust).needed
    _check_tensors(description, tensors)
    return _build(description, _hold(description, tensors), _find(description, needed, trust))


def check(description: Description, trust: Collection[str] = ()) -> None:
    """Check all but the tensors; imports the classes that are named, builds nothing; errors as `rebuild`."""
    _find(description, _check(description, trust).needed, trust)


def _check(description: Description, trust: Collection[str]) -> Scope:
    """Check every name and reference without importing or building anything; the scope lists what the model needs."""
    scope = Scope(trust, description.tensors)
    for index, spec in enumerate(description.modules):
        where = f"module {index} ({spec.cls})"
        names.check_name(spec.cls, trust, value=False)
        scope.needed.setdefault(spec.cls, set()).add("module")
        _check_members(spec, index, where, description.tensors)
        for name, value in spec.attributes.items():
            if not names.is_identifier(name) or name in _MODULE_NAMES:
                raise UnsafeFileError(f"sets the attribute {name!r} of {where}, which it must not; refused")
            values.check(value, scope, f"{where}, attribute {name}")
        if bool(spec.graphs) is not (spec.cls in names.NETWORKS) or "+".join(sorted(spec.graphs)) not in _MODES:
            raise values.bad(f"graphs {sorted(spec.graphs)} do not belong there", where)
        for nodes in spec.graphs.values():
            graphs.check(nodes, _surroundings(description.modules, index))
    return scope


_MODES = ("", "always", "eval+train")


def _check_members(spec: ModuleSpec, index: int, where: str, tensors: Collection[str]) -> None:
    """Names of children, parameters and buffers are harmless and distinct, and what they refer to is there."""
    for name in [*spec.children, *spec.parameters, *spec.buffers]:
        if not names.is_part(name) or name in _MODULE_NAMES:
            raise UnsafeFileError(f"has a part called {name!r} in {where}, which no part may be called; refused")
    if len({*spec.children, *spec.parameters, *spec.buffers, *spec.attributes}) != (
        len(spec.children) + len(spec.parameters) + len(spec.buffers) + len(spec.attributes)
    ):
        raise values.bad("two parts share a name", where)
    for key in [*spec.parameters.values(), *spec.buffers.values()]:
        if key is not None and key not in tensors:
            raise values.bad(f"there is no tensor {key!r}", where)
    for child in spec.children.values():
        if child is not None and not 0 <= child < index:
            raise values.bad(f"a child is module {child}, which does not come before it", where)
    if not set(spec.non_persistent) <= set(spec.buffers):
        raise values.bad("a non-persistent buffer is not a buffer", where)


def _surroundings(modules: Sequence[ModuleSpec], index: int) -> graphs.Surroundings:
    """What stands at and below module ``index``."""

    def owner(path: str) -> tuple[ModuleSpec | None, str]:
        spec: ModuleSpec | None = modules[index]
        *way, last = path.split(".")
        for part in way:
            child = None if spec is None else spec.children.get(part)
            spec = None if child is None else modules[child]
        return spec, last

    def has_tensor(path: str) -> bool:
        spec, last = owner(path)
        return spec is not None and (spec.parameters.get(last) or spec.buffers.get(last)) is not None

    def has_module(path: str) -> bool:
        spec, last = owner(path)
        return spec is not None and spec.children.get(last) is not None

    return graphs.Surroundings(has_tensor, has_module)


def _check_tensors(description: Description, tensors: Mapping[str, Tensor]) -> None:
    if set(tensors) != set(description.tensors):
        different = sorted(set(tensors) ^ set(description.tensors))
        raise ModelFileError(f"is damaged: {len(different)} tensors are missing or too many, first {different[0]!r}")
    for key, spec in description.tensors.items():
        tensor = tensors[key]
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_quantized:
            raise ModelFileError(f"is damaged: {key!r} is not a plain dense tensor")
        if spec.requires_grad and not (tensor.is_floating_point() or tensor.is_complex()):
            raise ModelFileError(f"is damaged: {key!r} of type {tensor.dtype} cannot have a gradient")
    for index, module in enumerate(description.modules):
        for name, held in module.parameters.items():
            if held is not None and not description.tensors[held].parameter:
                raise values.bad(f"the parameter {name} is a plain tensor", f"module {index}")


def _find(description: Description, needed: Mapping[str, set[str]], trust: Collection[str]) -> dict[str, object]:
    """Import what checked names stand for, and check it against its uses."""
    found = {name: _resolve(name, uses, trust) for name, uses in needed.items()}
    for spec in description.modules:
        _check_against_class(spec, found[spec.cls])
    return found


def _resolve(name: str, uses: Collection[str], trust: Collection[str]) -> object:
    """Import a checked name and check that it is what it is used as."""
    found = names.resolve(name)
    if "module" in uses:
        names.as_module_class(found, name)
    if "global" in uses:
        names.as_value(found, name, trust)
    if "enum" in uses:
        names.as_enum(found, name)
    if "object" in uses:
        names.as_plain_class(found, name)
    return found


def _check_against_class(spec: ModuleSpec, cls: object) -> None:
    """No part hides what is called on the class, and a recurrent layer lists no parameters but its own."""
    for name in [*spec.attributes, *spec.children, *spec.parameters, *spec.buffers]:
        if callable(getattr(cls, name, None)):
            raise UnsafeFileError(f"replaces the method {name!r} of {spec.cls}; refused")
    if isinstance(cls, type) and issubclass(cls, nn.RNNBase):
        wanted = spec.attributes.get("_flat_weights_names")
        listed = set(map(str, wanted)) if isinstance(wanted, list) else {""}
        if RECURRENT & set(spec.attributes) or not listed <= set(spec.parameters):
            raise ModelFileError(f"is damaged: the parameters of {spec.cls} are not those it lists")


def _hold(description: Description, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as parameters and plain tensors, free of whatever a file attached to them."""
    held: dict[str, Tensor] = {}
    for key, spec in description.tensors.items():
        plain = tensors[key].detach()
        grad = spec.requires_grad
        held[key] = nn.Parameter(plain, grad) if spec.parameter else plain.requires_grad_(grad)
    return held


def _build(description: Description, held: Mapping[str, Tensor], found: Mapping[str, object]) -> nn.Module:
    built: list[nn.Module] = []
    for spec in description.modules:
        cls = names.as_module_class(found[spec.cls], spec.cls)
        module: nn.Module = cls.__new__(cls)
        nn.Module.__init__(module)
        attributes = {name: values.decode(value, Found(found, held)) for name, value in spec.attributes.items()}
        module.__dict__.update(attributes, training=spec.training)
        for name, key in spec.parameters.items():
            module._parameters[name] = None if key is None else held[key]  # type: ignore[assignment]  # checked
        module._buffers.update({name: None if key is None else held[key] for name, key in spec.buffers.items()})
        module.__dict__["_non_persistent_buffers_set"] = set(spec.non_persistent)
        module._modules.update({name: None if i is None else built[i] for name, i in spec.children.items()})
        if isinstance(module, GraphNetwork):
            module.graphs = {mode: graphs.build(nodes) for mode, nodes in spec.graphs.items()}
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()
        built.append(module)
    return built[-1]
