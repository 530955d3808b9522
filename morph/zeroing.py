"""The reference that every cut is compared with: the model before, whose readers see zero in place of what was cut."""

from __future__ import annotations

import collections
import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from morph.analysis.atoms import Labels
from morph.analysis.caches import forget_tensors, without_kept
from morph.analysis.propagation import Propagation
from morph.analysis.recording import (
    Call,
    Inputs,
    Recording,
    Value,
    arguments_of,
    named_tensors,
    plain_attention,
    tensors_of,
)
from morph.analysis.tags import Statistic, Sum, values_in

_VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)
_HIGH = {
    **dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), torch.float64),
    **dict.fromkeys((torch.complex32, torch.complex64), torch.complex128),
}


class _Lifted(TorchDispatchMode):
    """Runs operators that ask for a smaller floating-point type, or find one, in float64 instead."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = _lifted((args, kwargs or {}))
        return _kernel(func)(*(args if _writes(func) else doubled(args)), **kwargs)


def _kernel(func: Any) -> Any:
    """An operator, or what stands in for one that has no float64."""
    return _grouped_product if func is torch.ops.aten._grouped_mm.default else func


def _grouped_product(x: Tensor, w: Tensor, offsets: Tensor, *_: Any, **__: Any) -> Tensor:
    """Rows ``[T, K]`` times the matrix ``[E, K, N]`` of their expert, which has the rows up to its offset."""
    rows = x.tensor_split(offsets[:-1].cpu().long())
    return torch.cat([part @ w[expert].to(part) for expert, part in enumerate(rows)])


def _lifted(tree: Any) -> Any:
    """The same arguments with float64, or its complex type, in place of smaller types."""
    return pytree.tree_map_only(torch.dtype, lambda d: _HIGH.get(d, d), tree)


def _writes(func: Any) -> bool:
    """Whether an operator writes into its first argument, which must then stay itself."""
    name = str(func.overloadpacket.__name__)
    return name.endswith("_") and not name.startswith("_")


def doubled(tree: Any) -> Any:
    """The same with every tensor of a smaller type in float64, or its complex type."""
    return pytree.tree_map_only(Tensor, lambda t: t.to(_HIGH.get(t.dtype, t.dtype)), tree)


@contextmanager
def in_float64() -> Iterator[None]:
    """Let a model compute in float64 whatever its code asks for, from a fixed seed, with attention step by step."""
    with plain_attention(), _float64(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with _Lifted():  # type: ignore[no-untyped-call]
            yield


@contextmanager
def _float64() -> Iterator[None]:
    """Make float64 the type of new tensors."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def double_copy(model: nn.Module) -> nn.Module:
    """A copy in float64 that computes what ``model`` does: an RMSNorm without an epsilon keeps that of its own type."""
    twin = copy.deepcopy(model)
    own = next((p.dtype for p in twin.parameters() if p.is_floating_point()), torch.get_default_dtype())
    for module in twin.modules():
        if isinstance(module, nn.RMSNorm) and module.eps is None:
            module.eps = torch.finfo(own if module.weight is None else module.weight.dtype).eps
    return without_kept(twin.double())


def copied_inputs(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments in float64, in memory of their own: a model may write into what it is given."""
    args, kwargs = arguments_of(inputs)
    return doubled(pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), (args, kwargs)))  # type: ignore[no-any-return]


def run_doubled(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """The floating-point outputs of ``model`` in float64 and evaluation mode; it is not touched.

    Raises:
        Exception: Whatever the model raises.
    """
    args, kwargs = copied_inputs(inputs)
    twin = double_copy(model).eval()
    forget_tensors(map(type, model.modules()))  # of the same functions in another type
    try:
        with torch.no_grad(), in_float64():
            return outputs_of(twin(*args, **kwargs))
    finally:
        forget_tensors(map(type, model.modules()))


def outputs_of(output: Any) -> list[Tensor]:
    """Every floating-point tensor of an output; complex ones as pairs of numbers."""
    found = tensors_of(output)
    if not found and hasattr(output, "__dict__"):
        found = tensors_of(list(vars(output).values()))
    return _real(found)


def _real(tensors: Sequence[Tensor]) -> list[Tensor]:
    pairs = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors]
    return [t.double() for t in pairs if t.is_floating_point()]


def run_zeroed(state: Propagation, model: nn.Module, inputs: Inputs, times: Labels) -> list[Tensor]:
    """Run the recorded model in float64 with zeros where readers would see what was cut.

    Sums (matrix products, convolutions, plain sums) read zero at the positions that are gone; statistics (norms, means,
    softmax) run over the positions that stay.

    Args:
        state: What the analysis found.
        model: The model that was analysed; not touched.
        inputs: Inputs of the shapes that it was analysed with.
        times: For each label 0 if it is gone, as `morph.analysis.Analysis.times` gives it.

    Returns:
        The floating-point outputs.
    """
    return _Run(state, times, model).outputs(dict(named_tensors(model)), inputs)


class _Run:
    """Executes a recording."""

    def __init__(self, state: Propagation, times: Labels, model: nn.Module) -> None:
        self.state, self.times, self.model = state, times, model
        self.sums: dict[int, list[Sum]] = collections.defaultdict(list)
        self.statistics: dict[int, list[Statistic]] = collections.defaultdict(list)
        for entry in state.sums:
            self.sums[entry.call].append(entry)
        for statistic in state.statistics:
            self.statistics[statistic.call].append(statistic)
        self.device = torch.device("cpu")

    def outputs(self, tensors: Mapping[str, Tensor], inputs: Inputs) -> list[Tensor]:
        recording = self.state.recording
        env: dict[int, Tensor] = {}
        written = _written(recording)
        for name, value in recording.sources.items():
            tensor = tensors[name].detach()
            env[value.number] = doubled(tensor.clone()) if value.number in written else tensor
            self.device = tensors[name].device
        for value, tensor in zip(recording.inputs, tensors_of(arguments_of(inputs)), strict=True):
            env[value.number] = doubled(tensor.detach().clone())
        last = _last_uses(recording)
        with torch.no_grad(), _float64(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for number, call in enumerate(recording.calls[: recording.evaluated]):
                self._step(number, call, env)
                for done in last[number]:
                    env.pop(done, None)
        return _real([env[v.number] for v in recording.outputs])

    def _step(self, number: int, call: Call, env: dict[int, Tensor]) -> None:
        writes = isinstance(call.target, torch._ops.OpOverload) and _writes(call.target)

        def real(leaf: Any) -> Any:
            if isinstance(leaf, Value):
                tensor = env.get(leaf.number)
                if tensor is None:
                    assert leaf.data is not None
                    tensor = env[leaf.number] = leaf.data.to(self.device)
                return tensor if writes else doubled(tensor)
            if isinstance(leaf, torch.device):
                return self.device
            return _HIGH.get(leaf, leaf) if isinstance(leaf, torch.dtype) else leaf

        args, kwargs = pytree.tree_map(real, (call.args, call.kwargs), is_leaf=lambda x: isinstance(x, Value))
        args = self._masked(number, call, args)
        statistic = next((s for s in self.statistics[number] if self._cut(s.labels)), None)
        if isinstance(call.target, type):  # a module that a user's rule takes as a whole
            args = args[1:]
        target = self._target(call)
        output = (
            target(*args, **kwargs)
            if statistic is None
            else _over_kept(statistic, call, args, kwargs, self._kept_positions(statistic), self._groups(number))
        )
        for value, tensor in zip(pytree.tree_leaves(call.output), pytree.tree_leaves(output), strict=False):
            if isinstance(value, Value):
                env[value.number] = tensor

    def _target(self, call: Call) -> Any:
        """What to call: the operator, one of the same value for any memory layout, or the module itself in float64."""
        if isinstance(call.target, type):
            return copy.deepcopy(self.model.get_submodule(call.module)).double().eval()
        return torch.ops.aten.reshape.default if call.target in _VIEWS else _kernel(call.target)

    def _cut(self, labels: tuple[Labels, ...]) -> bool:
        return any((self.times[one] == 0).any() for one in labels)

    def _masked(self, number: int, call: Call, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Zero the first operand of each sum where its positions are gone."""
        result = list(args)
        for entry in self.sums[number]:
            value, axis = entry.operands[0]
            gone = self.times[self.state.tag(value).axes[axis]] == 0
            if gone.any():
                at = next(i for i, a in enumerate(call.args) if a is value)
                keep = torch.from_numpy(~gone).to(result[at])
                result[at] = result[at] * keep.reshape([-1 if a == axis else 1 for a in range(result[at].dim())])
        return tuple(result)

    def _kept_positions(self, statistic: Statistic) -> dict[int, Tensor]:
        """For each axis with something gone, the positions that stay."""
        tag = self.state.tag(statistic.value)
        kept = {a: np.flatnonzero(self.times[tag.axes[a]]) for a in statistic.axes}
        return {a: torch.from_numpy(k).to(self.device) for a, k in kept.items() if len(k) < len(tag.axes[a])}

    def _groups(self, number: int) -> int | None:
        labels = self.state.groups.get(number)
        return None if labels is None else int((self.times[labels] != 0).sum()) if len(labels) > 1 else len(labels)


def _over_kept(
    statistic: Statistic,
    call: Call,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    kept: Mapping[int, Tensor],
    groups: int | None,
) -> Any:
    """Run a statistic over the positions that stay; the others come out as zero."""
    x = args[0]
    rank, small = x.dim(), x
    for axis, positions in kept.items():
        small = small.index_select(axis, positions)
    rest = list(args[1:])
    if "layer_norm" in statistic.kind or "rms_norm" in statistic.kind:
        count = len(rest[0])
        rest[0] = list(small.shape[-count:])
        rest[1:] = [_along(t, kept, rank) if isinstance(t, Tensor) else t for t in rest[1:]]
    elif "group_norm" in statistic.kind:
        rest[:2] = [t.index_select(0, kept[1]) if isinstance(t, Tensor) else t for t in rest[:2]]
        rest[3], rest[5] = small.shape[1], groups
    output = call.target(small, *rest, **kwargs)
    return pytree.tree_map_only(Tensor, lambda t: _spread(t, x, small, kept), output)


def _along(tensor: Tensor, kept: Mapping[int, Tensor], rank: int) -> Tensor:
    """Take the kept positions of a weight whose axes are the last ones of the input."""
    for axis, positions in kept.items():
        tensor = tensor.index_select(axis - rank + tensor.dim(), positions)
    return tensor


def _spread(tensor: Tensor, x: Tensor, small: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """Put an output of the form of the small input back into the form of the whole one."""
    if tensor.shape != small.shape:
        return tensor
    for axis, positions in kept.items():
        shape = list(tensor.shape)
        shape[axis] = x.shape[axis]
        tensor = tensor.new_zeros(shape).index_copy(axis, positions, tensor)
    return tensor


def _written(recording: Recording) -> set[int]:
    """The parameters and buffers into which a call writes, itself or through a view; copies must be written into."""
    base: dict[int, int] = {value.number: value.number for value in recording.sources.values()}
    written: set[int] = set()
    for call in recording.calls[: recording.evaluated]:
        if not isinstance(call.target, torch._ops.OpOverload):
            continue
        for argument, value in zip(call.target._schema.arguments, call.args, strict=False):
            source = base.get(value.number) if isinstance(value, Value) else None
            if source is not None and argument.alias_info is not None:
                written.update({source} if argument.alias_info.is_write else ())
                base.update((out.number, source) for out in values_in(call.output))
    return written


def _last_uses(recording: Recording) -> dict[int, list[int]]:
    """The values that are not needed any more after each call; parameters, buffers and outputs always are."""
    last: dict[int, int] = {}
    always = {v.number for v in [*recording.outputs, *recording.sources.values()]}
    for number, call in enumerate(recording.calls[: recording.evaluated]):
        for value in values_in((call.args, call.kwargs, call.output)):
            last[value.number] = number
    found: dict[int, list[int]] = collections.defaultdict(list)
    for value_number, number in last.items():
        if value_number not in always:
            found[number].append(value_number)
    return found
