"""Write a model as a description and a table of tensors. The model is only read."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from morph.errors import ModelFileError
from morph.files import graphs, names, values
from morph.files.network import GraphNetwork, SingleInputGraphNetwork
from morph.files.spec import Description, Json, ModuleSpec, NodeSpec, TensorSpec
from morph.files.values import NotPlainError

# What every module has by itself, and so is not an attribute to keep.
BASE_STATE = frozenset(nn.Module().__dict__)
# Links from recurrent layers to their own parameters; made again when the model is built.
RECURRENT = frozenset({"_flat_weights", "_flat_weight_refs"})


def describe(model: nn.Module) -> tuple[Description, dict[str, Tensor]]:
    """Write ``model``; modules of a user's own class are traced and become graph networks.

    Returns:
        The description and the tensors by key. The tensors share memory with the model.

    Raises:
        ModelFileError: If something would be lost: hooks, parametrizations, lazy or scripted modules, attributes that
            are not plain data; names the module and the way out.
    """
    for path, module in model.named_modules():
        _refuse_what_would_be_lost(module, path or "the model")
    writer = _Writer()
    writer.module(model, "")
    return Description(writer.modules, writer.specs), writer.tensors


def _refuse_what_would_be_lost(module: nn.Module, where: str) -> None:
    kind = type(module).__name__
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise ModelFileError(f"cannot save {where}: it is wrapped in {kind}; save its .module")
    if kind == "OptimizedModule" and hasattr(module, "_orig_mod"):
        raise ModelFileError(f"cannot save {where}: it is a compiled wrapper; save its ._orig_mod")
    if isinstance(module, torch.jit.ScriptModule):
        raise ModelFileError(f"cannot save {where}: it is a TorchScript module; save the module it was made from")
    if isinstance(module, fx.GraphModule) and type(module.graph._codegen) is not fx.graph.CodeGen:
        raise ModelFileError(
            f"cannot save {where}: an exported program's module cannot be kept; save the model that "
            "it was exported from"
        )
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
        raise ModelFileError(f"cannot save {where}: {kind} has no parameters yet; run the model once first")
    if parametrize.is_parametrized(module):
        raise ModelFileError(
            f"cannot save {where}: it is parametrized; use torch.nn.utils.parametrize.remove_parametrizations first"
        )
    hooks = sorted(
        key
        for key, value in module.__dict__.items()
        if key in BASE_STATE and "hook" in key and isinstance(value, dict) and value
    )
    if hooks:
        raise ModelFileError(
            f"cannot save {where}: it has hooks ({', '.join(hooks)}), which would be lost; remove them first"
        )


class _Writer:
    """Collects modules and tensors; each of them once, however often it is used."""

    def __init__(self) -> None:
        self.modules: list[ModuleSpec] = []
        self.specs: dict[str, TensorSpec] = {}
        self.tensors: dict[str, Tensor] = {}
        self._index: dict[int, int] = {}
        self._keys: dict[int, str] = {}
        self._alive: list[Tensor] = []

    def module(self, module: nn.Module, path: str, *, traced: bool = False) -> int:
        """Write ``module`` and return its index; ``traced`` says that it stands inside a graph network."""
        if id(module) in self._index:
            return self._index[id(module)]
        name = names.class_name(type(module))
        attributes: dict[str, Json] = {}
        graph_specs: dict[str, list[NodeSpec]] = {}
        extra: dict[str, Tensor] = {}
        if isinstance(module, GraphNetwork):
            graph_specs = {mode: graphs.write(graph, module, extra) for mode, graph in module.graphs.items()}
            name = _network_name(graph_specs)
        elif name is not None:
            attributes = self._attributes(module, path)
        elif traced:
            name = names.CONTAINER
        else:
            graph_specs, extra = _graphs_of(module)
            name = _network_name(graph_specs)
        inside = traced or bool(graph_specs)
        children = {
            part: None if child is None else self.module(child, _join(path, part), traced=inside)
            for part, child in module._modules.items()
        }
        buffers = {**module._buffers, **extra}
        spec = ModuleSpec(
            cls=name,
            training=module.training,
            attributes=attributes,
            parameters={part: self.tensor(value, _join(path, part)) for part, value in module._parameters.items()},
            buffers={part: self.tensor(value, _join(path, part)) for part, value in buffers.items()},
            non_persistent=sorted({*module._non_persistent_buffers_set, *extra}),
            children=children,
            graphs=graph_specs,
        )
        self.modules.append(spec)
        self._index[id(module)] = len(self.modules) - 1
        return self._index[id(module)]

    def tensor(self, tensor: Tensor | None, where: str) -> str | None:
        """Note ``tensor`` and return its key."""
        if tensor is None:
            return None
        if id(tensor) in self._keys:
            return self._keys[id(tensor)]
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_quantized:
            raise ModelFileError(
                f"cannot save {where}: it is a {type(tensor).__name__} of layout {tensor.layout}; "
                "only plain dense tensors can be kept"
            )
        if tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
            raise ModelFileError(f"cannot save {where}: the tensor has hooks, which would be lost; remove them first")
        key, number = where, 1
        while key in self.tensors:
            number += 1
            key = f"{where}~{number}"
        self._keys[id(tensor)] = key
        self._alive.append(tensor)
        self.tensors[key] = tensor.detach()
        self.specs[key] = TensorSpec(isinstance(tensor, nn.Parameter), tensor.requires_grad)
        return key

    def _attributes(self, module: nn.Module, path: str) -> dict[str, Json]:
        skipped = BASE_STATE | {"_compiled_call_impl"} | (RECURRENT if isinstance(module, nn.RNNBase) else frozenset())
        result: dict[str, Json] = {}
        for name, value in module.__dict__.items():
            if name in skipped:
                continue
            where = _join(path, name)

            def special(item: object, where: str = where) -> Json:
                if isinstance(item, Tensor):
                    return {"tensor": self.tensor(item, where)}
                raise NotPlainError(type(item).__name__)

            try:
                result[name] = values.encode(value, special)
            except NotPlainError as error:
                raise ModelFileError(
                    f"cannot save {where}: a value of type {error} is not plain data; remove it, or "
                    "save the state_dict and open that with --arch"
                ) from error
        return result


def _join(path: str, part: str) -> str:
    return f"{path}.{part}" if path else part


def _network_name(found: dict[str, list[NodeSpec]]) -> str:
    inputs = {sum(node.op == "placeholder" for node in nodes) for nodes in found.values()}
    cls = SingleInputGraphNetwork if inputs == {1} else GraphNetwork
    return f"{cls.__module__}.{cls.__qualname__}"


def _graphs_of(module: nn.Module) -> tuple[dict[str, list[NodeSpec]], dict[str, Tensor]]:
    """The graphs of a `torch.fx.GraphModule` as they stand, or of a user's class by tracing.

    A graph that calls layers of a user's class, as a tracer leaves subclasses of torch's own, is traced through these.
    """
    if not isinstance(module, fx.GraphModule) or not graphs.calls_known(module):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return graphs.trace_both(module)
    constants: dict[str, Tensor] = {}
    pair = {mode: getattr(module, f"{mode}_graph", None) for mode in ("train", "eval")}  # as torchvision's extractor
    stored = {mode: graph for mode, graph in pair.items() if isinstance(graph, fx.Graph)}
    if len(stored) != len(pair):
        stored = {"always": module.graph}
    return {mode: graphs.write(graph, module, constants) for mode, graph in stored.items()}, constants
