"""The modules of a model and their tensors by name, without generators in generators."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

Modules = Sequence[tuple[str, nn.Module]]


def named_modules(model: nn.Module, *, remove_duplicate: bool = True) -> list[tuple[str, nn.Module]]:
    """What ``model.named_modules`` gives, without a generator in every generator."""
    found: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()
    todo: list[tuple[str, nn.Module]] = [("", model)]
    while todo:
        path, module = todo.pop()
        if remove_duplicate:
            if id(module) in seen:
                continue
            seen.add(id(module))
        found.append((path, module))
        children = module._modules
        if children:
            start = f"{path}." if path else ""
            todo += [(start + name, child) for name, child in reversed(children.items()) if child is not None]
    return found


def named_tensors(model: nn.Module, held: Sequence[str] = ("_parameters", "_buffers")) -> list[tuple[str, Tensor]]:
    """Each parameter and buffer once, by its first name; or only those of one kind."""
    return tensors_in(named_modules(model), held)


def tensors_in(modules: Modules, held: Sequence[str] = ("_parameters", "_buffers")) -> list[tuple[str, Tensor]]:
    """What `named_tensors` gives for a model with these `named_modules`."""
    found: list[tuple[str, Tensor]] = []
    seen: set[int] = set()
    for kind in held:
        for path, module in modules:
            table = vars(module)[kind]
            if not table:
                continue
            start = f"{path}." if path else ""
            for name, tensor in table.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    found.append((start + name, tensor))
    return found


def module_at(model: nn.Module, path: str) -> nn.Module | None:
    """The module of that path, None if there is none."""
    found: nn.Module | None = model
    for name in path.split(".") if path else ():
        found = found._modules.get(name) if found is not None else None
    return found
