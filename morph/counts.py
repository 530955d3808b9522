"""Parameters and multiply-adds of a model, counted twice by independent counters.

The unit is one multiply-add = 1, for one sample, in evaluation mode. Only contractions count: convolutions, linear
layers, matrix products, einsum and attention; what batch norm, pooling and the like cost is listed apart, by operator.

fvcore counts on a recorded graph; `torch.utils.flop_counter` (two per multiply-add) counts while the model runs. Where
the two do not agree, `Counts.difference` says in which modules and for which operators.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from morph.count_rules import CONTRACTIONS, RULES
from morph.errors import CountError
from morph.twins import Maker, Sample, clone, meta, one_sample, twin, zeros
from morph.unfused import plain_attention

FIRST, SECOND = "fvcore", "torch.utils.flop_counter"

ByOperator = dict[str, dict[str, int]]
"""Multiply-adds by module path, then by operator."""


@dataclass(frozen=True)
class ModuleCount:
    """One module with all that is inside it.

    Attributes:
        params: Elements of its parameters, each tensor once.
        macs: Multiply-adds of one sample.
        type: Name of its class.
    """

    params: int
    macs: int
    type: str


@dataclass(frozen=True)
class Counts:
    """What `count` found. All operations are those of one sample in evaluation mode.

    Attributes:
        params: Elements of all parameters; a tensor that is used twice counts once.
        trainable: Those of them that require a gradient.
        buffers: Elements of all buffers.
        macs: Multiply-adds of the contractions, by ``counter``.
        elementwise: Operations of other operators by fvcore's own weights (two per element for batch norm).
        by_module: Each module path (``""`` is the model) in the order of ``named_modules``. A module that is used
            under two paths stands under its first one.
        unsupported: How often an operator ran that fvcore has no rule for, so that it counts nothing.
        uncalled: Paths of modules that did not run: not called, nothing in them called, none of their parameters read.
        second: Multiply-adds by `torch.utils.flop_counter`.
        difference: Why ``macs`` and ``second`` differ; ``None`` if they are equal and found independently.
        counter: Who counted ``macs`` and ``by_module``: fvcore, or the second counter where fvcore cannot trace.
        input_shapes: Shape of each input, without the batch axis.
    """

    params: int
    trainable: int
    buffers: int
    macs: int
    elementwise: Mapping[str, int]
    by_module: Mapping[str, ModuleCount]
    unsupported: Mapping[str, int]
    uncalled: tuple[str, ...]
    second: int
    difference: str | None
    counter: str
    input_shapes: tuple[tuple[int, ...], ...]


def count_params(model: nn.Module) -> int:
    """Count the elements of all parameters; a tensor that is used twice counts once."""
    return sum(p.numel() for p in model.parameters())


def count(model: nn.Module, inputs: Tensor | tuple[Any, ...] | Mapping[str, Any]) -> Counts:
    """Count parameters and multiply-adds.

    A copy runs, without the hooks, in evaluation mode and without gradients, so the model is left as it is. Only the
    first sample of a batch is counted: inputs whose first axis is as long as that of the first are cut to length 1.

    Args:
        model: The model, on any device; weights on the meta device will do.
        inputs: A tensor ``[N, ...]``, a tuple of arguments, or a mapping of named arguments; values matter only to
            models whose path depends on them. fvcore takes tensors by position alone, so others are counted once.

    Raises:
        CountError: If there is no tensor or no sample in the inputs, or the model is TorchScript, cannot be copied, or
            does not run.
    """
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            what = f"the TorchScript module {path!r}" if path else "a TorchScript model"
            raise CountError(f"{what} cannot be counted; count the model that it was made from")
    sample = one_sample(inputs)
    cuda = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with _quiet(), torch.no_grad(), torch.random.fork_rng(cuda):
        run, copies = _run(model, sample)
        trace = _trace(model, sample, copies)
    first = run.counts if trace.failed else trace.counts
    macs, second = (sum(counts[""].values()) for counts in (first, run.counts))
    difference = None
    if trace.failed:
        difference = f"{FIRST} cannot trace this model ({trace.failed}); counted by {SECOND} alone"
    elif macs != second:
        difference = _explain(model, trace, run)
    return Counts(
        params=count_params(model),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        buffers=sum(b.numel() for b in model.buffers()),
        macs=macs,
        elementwise=trace.elementwise,
        by_module={
            path: ModuleCount(count_params(module), sum(first[path].values()), type(module).__name__)
            for path, module in model.named_modules()
        },
        unsupported=trace.skipped.get("", {}),
        uncalled=run.uncalled,
        second=second,
        difference=difference,
        counter=SECOND if trace.failed else FIRST,
        input_shapes=tuple(tuple(x.shape[1:]) for x in sample.tensors),
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warnings of tracing, and switch off the fused attention that neither counter sees into."""
    with plain_attention(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@dataclass(frozen=True)
class _Run:
    counts: ByOperator
    uncalled: tuple[str, ...]


class _Reads(TorchDispatchMode):
    """Notes which tensors any operator reads."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.update(id(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        return func(*args, **(kwargs or {}))


def _run(model: nn.Module, sample: Sample) -> tuple[_Run, tuple[Maker, ...]]:
    """Run under `FlopCounterMode`, on the meta device if that works; also say which copies the trace may use."""
    try:
        return _run_on(twin(model, meta), sample.each(meta)), (zeros, clone)
    except Exception:  # whatever the meta device cannot do; the real run decides
        pass
    try:
        copied = twin(model, clone)
    except Exception as error:
        raise CountError(f"the model cannot be copied, which counting needs: {_line(error)}") from error
    try:
        return _run_on(copied, sample.each(clone)), (clone,)
    except Exception as error:
        shapes = ", ".join(str(tuple(x.shape)) for x in sample.tensors)
        raise CountError(
            f"the model does not run on an input of shape {shapes}: {_line(error)}; give the shape that it is made for"
        ) from error


def _run_on(model: nn.Module, sample: Sample) -> _Run:
    called: set[nn.Module] = set()
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, _: called.add(module))
    with _Reads() as reads, FlopCounterMode(display=False) as mode:
        model(*sample.args, **sample.named)
    found = mode.get_flop_counts()
    first_path = {module: path for path, module in model.named_modules()}
    counts: ByOperator = {path: {} for path in first_path.values()}
    for path, module in model.named_modules(remove_duplicate=False):  # the mode knows a shared module by its last path
        operators = found.get(f"{type(model).__name__}.{path}" if path else "Global", {})
        if operators:
            counts[first_path[module]] = {op.__name__: flops // 2 for op, flops in operators.items()}
    for module, path in reversed(first_path.items()):
        if module not in called:
            counts[path] = _sum(counts[first_path[child]] for child in module.children())
    uncalled = tuple(path for module, path in first_path.items() if _idle(module, called, reads.seen))
    return _Run(counts, uncalled)


def _idle(module: nn.Module, called: set[nn.Module], read: set[int]) -> bool:
    if not called.isdisjoint(module.modules()) or any(id(p) in read for p in module.parameters()):
        return False
    return type(module).forward is not nn.Module.forward or any(True for _ in module.children())


def _sum(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return dict(total)


def _line(error: Exception) -> str:
    """Give the first line of an error's text, as part of a sentence."""
    text = str(error).strip()
    return (text.splitlines()[0] if text else type(error).__name__).rstrip(".;:")


@dataclass(frozen=True)
class _Trace:
    counts: ByOperator = field(default_factory=dict)
    elementwise: dict[str, int] = field(default_factory=dict)
    skipped: ByOperator = field(default_factory=dict)
    failed: str = ""


def _trace(model: nn.Module, sample: Sample, copies: Sequence[Maker]) -> _Trace:
    """Count with fvcore on the first copy that it can trace; ``failed`` says why none could be."""
    if sample.named or not all(isinstance(x, Tensor) for x in sample.args):
        return _Trace(failed="it takes tensors by position alone")
    failed = ""
    for make in copies:
        try:
            return _trace_on(twin(model, make), sample.each(make).args)
        except Exception as error:  # the next copy may do
            failed = _line(error)
    return _Trace(failed=failed or "it has no values")


def _trace_on(model: nn.Module, sample: tuple[Tensor, ...]) -> _Trace:
    from fvcore.nn import FlopCountAnalysis  # warns when it is imported, which is silenced here

    model.register_forward_hook(lambda _, __, out: tuple(x for x in tree_leaves(out) if isinstance(x, Tensor)))
    analysis = FlopCountAnalysis(model, sample)
    analysis.set_op_handle(**RULES).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    everything = analysis.by_module_and_operator()
    counts: ByOperator = {
        path: {op: int(n) for op, n in everything[path].items() if op in CONTRACTIONS}
        for path, _ in model.named_modules()
    }
    elementwise = {op: int(n) for op, n in everything[""].items() if op not in CONTRACTIONS}
    return _Trace(counts, elementwise, {path: dict(analysis.unsupported_ops(path)) for path in counts})


def _explain(model: nn.Module, trace: _Trace, run: _Run) -> str:
    """Name the modules whose own operators (not those of their children) the two counters count differently."""
    groups: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        first, second, skipped = (_own(path, module, counts) for counts in (trace.counts, run.counts, trace.skipped))
        if sum(first.values()) == sum(second.values()):
            continue
        what = f"{FIRST} counts {_listed(first)}, {SECOND} {_listed(second)}"
        if sum(first.values()) < sum(second.values()) and skipped:
            what += f" ({FIRST} has no rule for {', '.join(sorted(skipped))})"
        groups.setdefault(what, []).append(f"{path or 'the model'} ({type(module).__name__})")
    parts = []
    for what, places in groups.items():
        more = f" and {len(places) - 1} more" if len(places) > 1 else ""
        parts.append(f"in {places[0]}{more} {what}")
    rest = f"; and {len(parts) - 3} more kinds of difference" if len(parts) > 3 else ""
    return "; ".join(parts[:3]) + rest


def _own(path: str, module: nn.Module, counts: ByOperator) -> dict[str, int]:
    own = Counter(counts.get(path, {}))
    for name, _ in module.named_children():
        own.subtract(counts.get(f"{path}.{name}" if path else name, {}))
    return {op: n for op, n in own.items() if n}


def _listed(operators: Mapping[str, int]) -> str:
    return ", ".join(f"{op} {n:,}" for op, n in sorted(operators.items())) or "nothing"
