"""An obvious second opinion on a cut: what was removed must behave as if it were zero.

`judge` sets every removed position of every parameter to zero in a float64 copy of the original and compares outputs
with the pruned model. Normalisations and other statistics over removed channels are taken over the kept ones alone,
since they are what the pruned model has; where no weight tells which those are, they are the positions that are zero
everywhere, if they are as many as were removed. It knows nothing of how the cut was decided, so it judges any library.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

Kept = Mapping[str, Mapping[int, Tensor]]  # tensor name -> axis -> positions that stay
Pick = Callable[[Any], Any]

LIMITS = {torch.float64: 1e-6, torch.float32: 1e-3}  # models that cast to float32 inside reach 1e-6 in float64
aten = torch.ops.aten


@dataclass(frozen=True)
class Verdict:
    """What `judge` found.

    Attributes:
        status: ``exact``; ``differs``; ``blind`` if the removed channels did not matter, so that nothing was shown;
            ``does not run``; ``shape changed``; ``not measured`` if the reference itself does not run.
        relative: Largest difference over the largest output; None if none was measured.
        effect: The same between the original and the zeroed original.
        note: The error, or the precision.
    """

    status: str
    relative: float | None = None
    effect: float | None = None
    note: str = ""


def whole(output: Any) -> Any:
    """All that a model puts out."""
    return output


def judge(original: nn.Module, pruned: nn.Module, kept: Kept, inputs: Any, pick: Pick = whole) -> Verdict:
    """Compare ``pruned`` with ``original`` in which all that is not ``kept`` is zero.

    In float64; in float32 where the model refuses that. With nothing in ``kept`` this compares the two as they are.
    ``pick`` takes from an output what is to be compared.
    """
    try:
        outputs(pruned, inputs, torch.float32, pick)
    except Exception as error:
        return Verdict("does not run", note=brief(error))
    verdict = Verdict("not measured")
    for dtype in (torch.float64, torch.float32):
        try:
            before = outputs(original, inputs, dtype, pick)
            reference = zeroed_outputs(untied(original, pruned), kept, inputs, dtype, pick)
            after = outputs(pruned, inputs, dtype, pick)
        except Exception as error:
            verdict = Verdict("not measured", note=brief(error))
            continue
        if [x.shape for x in before] != [x.shape for x in after]:
            return Verdict("shape changed", note=f"{_shapes(before)} became {_shapes(after)}"[:200])
        if not any(bool(torch.isfinite(x).any()) for x in reference):
            verdict = Verdict("not measured", note="no output has a finite value")  # a mask of float32 in float64
            continue
        relative, effect = difference(reference, after), difference(before, reference)
        status = "exact" if relative <= LIMITS[dtype] else "differs"
        if kept and status == "exact" and effect <= LIMITS[dtype] / 100:
            status = "blind"
        return Verdict(status, relative, effect, str(dtype).removeprefix("torch."))
    return verdict


def brief(error: BaseException) -> str:
    """Kind and first line of an error."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]


def outputs(model: nn.Module, inputs: Any, dtype: torch.dtype, pick: Pick = whole) -> list[Tensor]:
    """Every floating-point tensor that a copy of ``model`` in ``dtype`` puts out."""
    return _call(copy.deepcopy(model).to(dtype), inputs, dtype, pick)


def _call(twin: nn.Module, inputs: Any, dtype: torch.dtype, pick: Pick) -> list[Tensor]:
    def cast(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    inputs = pytree.tree_map(cast, inputs)
    with torch.no_grad():
        result = twin(**inputs) if isinstance(inputs, dict) else twin(*inputs)
    leaves = pytree.tree_leaves(pick(result))
    return [x.detach().double() for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]


def difference(before: list[Tensor], after: list[Tensor]) -> float:
    """Largest difference of any output, over the largest value of that output; infinite if anything is not finite."""
    if [x.shape for x in before] != [x.shape for x in after]:
        return math.inf
    worst = 0.0
    for x, y in zip(before, after, strict=True):
        if not x.numel():
            continue
        finite = torch.isfinite(x)
        if not torch.equal(finite, torch.isfinite(y)) or not torch.equal(x[~finite], y[~finite]):
            return math.inf
        x, y = x[finite], y[finite]
        if x.numel():
            gap, scale = float((x - y).abs().max()), float(x.abs().max())
            worst = max(worst, gap / scale if scale else (0.0 if gap == 0 else math.inf))
    return worst


def untied(original: nn.Module, pruned: nn.Module) -> nn.Module:
    """A copy of ``original`` in which parameters no longer share memory if they do not in ``pruned``."""
    twin = copy.deepcopy(original)
    after = {name: p.data_ptr() for name, p in pruned.named_parameters(remove_duplicate=False)}
    owners: dict[int, str] = {}
    for name, parameter in list(twin.named_parameters(remove_duplicate=False)):
        owner = owners.setdefault(parameter.data_ptr(), name)
        if owner != name and owner in after and name in after and after[owner] != after[name]:
            path, _, leaf = name.rpartition(".")
            setattr(twin.get_submodule(path), leaf, nn.Parameter(parameter.detach().clone()))
    return twin


def zeroed_outputs(model: nn.Module, kept: Kept, inputs: Any, dtype: torch.dtype, pick: Pick = whole) -> list[Tensor]:
    """Outputs of a copy of ``model`` in which every parameter is zero where it is not kept."""
    twin = copy.deepcopy(model).to(dtype)
    tensors = dict(twin.named_parameters(remove_duplicate=False)) | dict(twin.named_buffers(remove_duplicate=False))
    keeps: dict[int, dict[int, Tensor]] = {}
    shares: set[tuple[int, int]] = set()  # (length of an axis, how many of it are removed), in lowest terms
    with torch.no_grad():
        for name, axes in kept.items():
            tensor = tensors[name]
            for axis, positions in axes.items():
                mask = torch.zeros(tensor.shape[axis], dtype=torch.bool)
                mask[positions] = True
                keeps.setdefault(tensor.data_ptr(), {})[axis] = mask
                removed = int((~mask).sum())
                shared = math.gcd(len(mask), removed)
                shares.add((len(mask) // shared, removed // shared))
                if tensor.is_floating_point() and not name.endswith(("running_mean", "running_var")):
                    tensor.movedim(axis, 0)[~mask] = 0
    with _KeptStatistics(keeps, shares):
        return _call(twin, inputs, dtype, pick)


class _KeptStatistics(TorchDispatchMode):
    """Take statistics over the kept positions only."""

    def __init__(self, keeps: dict[int, dict[int, Tensor]], shares: set[tuple[int, int]]) -> None:
        super().__init__()
        self.keeps, self.shares = keeps, shares
        self.rules: dict[Any, Callable[..., Any]] = {
            aten.native_layer_norm.default: self.layer_norm,
            aten.native_group_norm.default: self.group_norm,
            aten.native_batch_norm.default: self.batch_norm,
            aten._softmax.default: self.softmax,
            aten.mean.dim: self.mean,
            aten.var.correction: self.variance,
            aten.var_mean.correction: self.variance_and_mean,
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule = self.rules.get(func)
        changed = rule(*args, **(kwargs or {})) if rule else None
        return func(*args, **(kwargs or {})) if changed is None else changed

    def layer_norm(self, x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
        """Layer norm; the kept positions are those of its weight."""
        dims = list(range(x.dim() - len(shape), x.dim()))
        mask = torch.ones(shape, dtype=torch.bool)
        for axis, keep in self.keeps.get(weight.data_ptr(), {}).items() if weight is not None else ():
            mask &= keep.reshape([-1 if i == axis else 1 for i in range(len(shape))])
        if weight is None or mask.all():
            found = self._zero_positions(x, dims)
            if found is None:
                return None
            mask = found
        mean, variance = _moments(x, mask, dims)
        y = (x - mean) * torch.rsqrt(variance + eps)
        y = y if weight is None else y * weight
        return (y if bias is None else y + bias), mean, torch.rsqrt(variance + eps)

    def group_norm(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, *sizes: Any) -> Any:
        """Group norm; the kept positions are those of its weight."""
        n, c, _, groups, eps = sizes
        keep = self.keeps.get(weight.data_ptr(), {}).get(0) if weight is not None else None
        if keep is None:
            return None
        grouped = x.reshape(n, groups, c // groups, -1)
        mean, variance = _moments(grouped, keep.reshape(1, groups, c // groups, 1), [2, 3])
        y = ((grouped - mean) * torch.rsqrt(variance + eps)).reshape(x.shape)
        channels = [1, c] + [1] * (x.dim() - 2)
        y = y if weight is None else y * weight.reshape(channels)
        return (y if bias is None else y + bias.reshape(channels)), mean.reshape(n, groups), variance.reshape(n, groups)

    def batch_norm(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any) -> Any:
        """Batch norm in training mode, by which some models standardise the weights of a convolution."""
        _, _, training, _, eps = rest
        mask = self._zero_positions(x, [2]) if training and x.dim() == 3 and x.shape[0] == 1 else None
        if mask is None:
            return None
        mean, variance = _moments(x, mask, [2])
        y = (x - mean) * torch.rsqrt(variance + eps)
        y = y if weight is None else y * weight.reshape(1, -1, 1)
        y = y if bias is None else y + bias.reshape(1, -1, 1)
        return y.masked_fill(~mask, 0), mean.flatten(), variance.flatten()

    def softmax(self, x: Tensor, dim: int, half_to_float: bool) -> Tensor | None:
        """Softmax over channels, as in attention across channels: removed ones get no weight."""
        if dim % x.dim() != x.dim() - 1 or x.dim() < 2:
            return None
        zero = (x == 0).all(-2, keepdim=True)
        counts = zero.sum(-1)
        if not self._is_share(x.shape[-1], int(counts.flatten()[0])) or bool((counts != counts.flatten()[0]).any()):
            return None
        return torch.softmax(x.masked_fill(zero, -math.inf), -1)

    def mean(self, x: Tensor, dim: list[int] | None, keepdim: bool = False, *, dtype: Any = None) -> Tensor | None:
        """Mean over channels."""
        found = self._statistic(x, dim)
        return _shape(found[0], found[2], keepdim) if found else None

    def variance(self, x: Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Tensor | None:
        """Variance over channels."""
        found = self._statistic(x, dim, 1 if correction is None else correction)
        return _shape(found[1], found[2], keepdim) if found else None

    def variance_and_mean(self, x: Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Any:
        """Both."""
        found = self._statistic(x, dim, 1 if correction is None else correction)
        return (_shape(found[1], found[2], keepdim), _shape(found[0], found[2], keepdim)) if found else None

    def _statistic(self, x: Tensor, dim: Any, correction: float = 0) -> tuple[Tensor, Tensor, list[int]] | None:
        dims = sorted(d % x.dim() for d in (dim if dim else range(x.dim())))
        mask = self._zero_positions(x, dims)
        return None if mask is None else (*_moments(x, mask, dims, correction), dims)

    def _zero_positions(self, x: Tensor, dims: list[int]) -> Tensor | None:
        """Mask of what is kept along one of ``dims``: not zero throughout, if as many are as were removed somewhere."""
        for d in dims:
            others = [i for i in range(x.dim()) if i != d]
            zero = (x == 0).all(dim=others[0], keepdim=True) if others else x == 0
            for i in others[1:]:
                zero = zero.all(dim=i, keepdim=True)
            if self._is_share(x.shape[d], int(zero.sum())):
                return ~zero
        return None

    def _is_share(self, length: int, zeros: int) -> bool:
        shared = math.gcd(length, zeros)
        return 0 < zeros < length and (length // shared, zeros // shared) in self.shares


def _moments(x: Tensor, mask: Tensor, dims: list[int], correction: float = 0) -> tuple[Tensor, Tensor]:
    """Mean and variance over the masked positions of ``dims``; both keep the axes."""
    weight = mask.to(x.dtype).expand(x.shape)
    count = weight.sum(dims, keepdim=True).clamp(min=1 + correction)  # a group may be gone as a whole
    mean = (x * weight).sum(dims, keepdim=True) / count
    return mean, ((x - mean).square() * weight).sum(dims, keepdim=True) / (count - correction)


def _shape(x: Tensor, dims: list[int], keepdim: bool) -> Tensor:
    return x if keepdim else x.squeeze(tuple(dims))


def _shapes(tensors: list[Tensor]) -> str:
    return ", ".join(str(list(x.shape)) for x in tensors[:4])
