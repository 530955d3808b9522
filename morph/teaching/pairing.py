"""Which layer of the student learns from which layer of the teacher."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor, nn

from morph.errors import TeachingError
from morph.inputs import Inputs, arguments_of, images_in
from morph.teaching.adapters import Bridge, Layout, layout_of
from morph.teaching.capture import first_tensor
from morph.teaching.taps import tap
from morph.tracing import try_inputs

_DROP = 1.5  # a map is down-sampled where its height and width shrink by this or more; less is a border that is lost


@dataclass(frozen=True)
class Pair:
    """A tap of the teacher and one of the student.

    Attributes:
        teacher: Name of the teacher's tap.
        student: Name of the student's.
        teacher_shape: What it gives for the example inputs.
        student_shape: Likewise.
        aspect: Height of the images over their width; None where there are none.
        project: Whether the student's channels become those of the teacher; not needed where attention is compared.
    """

    teacher: str
    student: str
    teacher_shape: tuple[int, ...]
    student_shape: tuple[int, ...]
    aspect: float | None = 1.0
    project: bool = True

    @property
    def layouts(self) -> tuple[Layout, Layout]:
        """Those of student and teacher."""
        return layout_of(self.student_shape, self.aspect), layout_of(self.teacher_shape, self.aspect)

    def bridge(self, *, project: bool | None = None) -> Bridge:
        """A new bridge between them, by default as ``project`` says; see `morph.teaching.adapters.Bridge`."""
        student, teacher = self.layouts
        try:
            return Bridge(student, teacher, project=self.project if project is None else project)
        except TeachingError as error:
            raise TeachingError(f"the pair {self.teacher} (teacher), {self.student} (student): {error}") from error


class Pairs(tuple[Pair, ...]):
    """Pairs in the order of the network; ``print`` shows them with shapes and bridges."""

    __slots__ = ()

    def __str__(self) -> str:
        rows = [("teacher", "", "student", "", "bridge")]
        rows += [(p.teacher, _dims(p.teacher_shape), p.student, _dims(p.student_shape), str(p.bridge())) for p in self]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join(line.rstrip() for line in lines)


def propose_pairs(teacher: nn.Module, student: nn.Module, example_inputs: Inputs, number: int = 3) -> Pairs:
    """Pair layers by depth and resolution.

    The taps of a network that shrinks its maps are the last outputs before each down-sampling and the last before the
    map is pooled away (Whettam 2020: three for CIFAR networks); those of equal resolution are paired, or, where too few
    are equal, those that are equally far from the end. A network that does not shrink its maps or tokens (ViT, BERT)
    has as taps the outputs of evenly spread blocks, as many as the other network has taps: the last of the teacher and
    the last of the student are a pair, and so on in equal steps. The last ``number`` pairs are proposed.

    Args:
        teacher: Not touched.
        student: Not touched.
        example_inputs: What both accept: a tensor, a tuple of arguments, or a mapping of named ones.
        number: Most pairs.

    Raises:
        TeachingError: If there is nothing to pair.
        TraceError: If a network does not accept the inputs.

    Example:
        >>> import torch
        >>> from morph.zoo import build
        >>> print(propose_pairs(build("wrn-16-2"), build("darts-10"), torch.zeros(1, 3, 32, 32)))
        teacher             student             bridge
        groups.0  32x32x32  cells.2  64x32x32   1x1 convolution 64 -> 32
        groups.1  64x16x16  cells.5  128x16x16  1x1 convolution 128 -> 64
        relu      128x8x8   cells.9  256x8x8    1x1 convolution 256 -> 128
    """
    if number < 1:
        raise TeachingError(f"{number} pairs; give 1 or more")
    aspect = aspect_of(example_inputs)
    found = [_all_taps(model, example_inputs, number) for model in (teacher, student)]
    for whose, (taps, _) in zip(("teacher", "student"), found, strict=True):
        if not taps:
            raise TeachingError(f"the {whose} has no maps or tokens to pair; name pairs yourself, or teach by outputs")
    most = min(number, *(len(taps) for taps, _ in found))
    both = [_spread(taps, most) if blocks else taps for taps, blocks in found]
    matched = _matched(both[0], both[1], number, aspect)
    return Pairs(Pair(t.name, s.name, t.shape, s.shape, aspect) for t, s in matched)


def check_pairs(
    teacher: nn.Module, student: nn.Module, pairs: Sequence[tuple[str, str]], example_inputs: Inputs
) -> Pairs:
    """Give one's own pairs their shapes.

    Args:
        teacher: Not touched.
        student: Not touched.
        pairs: ``(tap of the teacher, tap of the student)``, named as in `morph.tap`, each standing for one tensor.
        example_inputs: What both accept: a tensor, a tuple of arguments, or a mapping of named ones.

    Raises:
        TeachingError: If there are no pairs, or a pair can in no way be bridged.
        TapError: If there is no such tap; the nearest are named.
        TraceError: If a network does not accept the inputs.
    """
    if not pairs:
        raise TeachingError("no pairs; give one or more, e.g. ('layer1', 'layer1')")
    shapes = []
    for whose, model, names in (
        ("teacher", teacher, [t for t, _ in pairs]),
        ("student", student, [s for _, s in pairs]),
    ):
        found = tap(model, names, example_inputs).shapes
        for name in names:
            if name not in found:
                raise TeachingError(f"the {whose}'s tap {name} stands for several; choose one of {', '.join(found)}")
        shapes.append([found[name] for name in names])
    aspect = aspect_of(example_inputs)
    checked = Pairs(Pair(t, s, a, b, aspect) for (t, s), a, b in zip(pairs, *shapes, strict=True))
    for pair in checked:
        pair.bridge()
    return checked


class Stage(NamedTuple):
    """A tap that was found: its name, and the shape of what it gives."""

    name: str
    shape: tuple[int, ...]


def stage_taps(model: nn.Module, example_inputs: Inputs, number: int) -> list[Stage]:
    """The last output before each down-sampling; where there is none, those of ``number`` evenly spread blocks."""
    taps, blocks = _all_taps(model, example_inputs, number)
    return _spread(taps, number) if blocks else taps


def _all_taps(model: nn.Module, example_inputs: Inputs, number: int) -> tuple[list[Stage], bool]:
    """The last output before each down-sampling, or those of all blocks; and whether it is blocks."""
    tree = _calls(model, example_inputs)
    aspect = aspect_of(example_inputs)
    stages: list[Stage] = []
    for call in _atoms(tree.inside, aspect):
        side, last = _side(call.shape, aspect), _side(stages[-1].shape, aspect) if stages else None
        if side is None or (last and _drops(side, last)):  # no map, or one that was enlarged again
            continue
        if last and not _drops(last, side):
            stages.pop()
        stages.append(Stage(call.name, call.shape))
    if len(stages) < min(2, number):
        row = _row(tree)
        return row or stages, bool(row)
    return stages, False


@dataclass
class _Call:
    """A call of a module, and those inside it."""

    name: str
    kind: type
    shape: tuple[int, ...]
    inside: list[_Call]

    def all(self) -> Iterator[_Call]:
        yield self
        for call in self.inside:
            yield from call.all()


def _calls(model: nn.Module, example_inputs: Inputs) -> _Call:
    """Run a copy of the model once in evaluation mode and write down who called whom, in order."""
    twin = copy.deepcopy(model).eval()
    paths = {module: path for path, module in twin.named_modules()}
    stack: list[list[_Call]] = [[]]
    counts: dict[str, int] = {}

    def enter(module: nn.Module, args: Any) -> None:
        stack.append([])

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        inside = stack.pop()
        found = first_tensor(output)
        path = paths[module]
        counts[path] = counts.get(path, 0) + 1
        shape = tuple(found.shape) if isinstance(found, Tensor) else ()
        stack[-1].append(_Call(f"{path}#{counts[path]}", type(module), shape, inside))

    for module in twin.modules():
        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
    try_inputs(twin, *arguments_of(example_inputs))
    root = stack[0][0]
    for call in root.all():
        path, _, _ = call.name.rpartition("#")
        call.name = path if counts[path] == 1 else call.name
    return root


def _atoms(calls: Sequence[_Call], aspect: float | None) -> list[_Call]:
    """Parts of the network in order, each shrinking its map at most once.

    A part is taken apart if it shrinks its map more often, and only goes down in doing so: windows of attention and
    branches of several resolutions stay inside their block.
    """
    found = []
    for call in calls:
        inner = _atoms(call.inside, aspect) if _levels(call, aspect) > 2 else []
        sides = [side for atom in inner if (side := _side(atom.shape, aspect))]
        falls = all(not _drops(b, a) for a, b in pairwise(sides))
        found += inner if len(sides) > 1 and falls else [call]
    return found


def _levels(call: _Call, aspect: float | None) -> int:
    """How many resolutions there are inside a call."""
    sides = sorted({side for inner in call.all() if (side := _side(inner.shape, aspect))}, reverse=True)
    return sum(1 for i, side in enumerate(sides) if i == 0 or _drops(sides[i - 1], side))


def _side(shape: tuple[int, ...], aspect: float | None) -> float | None:
    """Geometric mean of height and width; None where the map is pooled away, or is no map."""
    if len(shape) not in (3, 4):
        return None
    layout = layout_of(shape, aspect)
    if layout.size is None:
        return None
    side = math.sqrt(layout.size[0] * layout.size[1])
    return side if side > 1 else None


def _drops(before: float, after: float) -> bool:
    return before >= _DROP * after


def _row(tree: _Call) -> list[Stage]:
    """The outputs of blocks: the longest row of siblings of one class and one shape of maps or tokens."""
    rows: dict[tuple[Any, ...], list[_Call]] = {}
    for outer in tree.all():
        for call in outer.inside:
            if call.inside and len(call.shape) in (3, 4):
                rows.setdefault((id(outer), call.kind, call.shape), []).append(call)
    row = max(rows.values(), key=len, default=[])
    return [Stage(call.name, call.shape) for call in row]


def _spread(row: list[Stage], number: int) -> list[Stage]:
    """So many of a row in equal steps, the last one among them."""
    number = min(number, len(row))
    return [row[math.ceil((i + 1) * len(row) / number) - 1] for i in range(number)]


def _matched(
    teacher: list[Stage], student: list[Stage], number: int, aspect: float | None
) -> list[tuple[Stage, Stage]]:
    """Those of equal resolution if enough are, else those equally far from the end."""
    left, right = ({_places(stage.shape, aspect): stage for stage in stages} for stages in (teacher, student))
    equal = [(stage, right[places]) for places, stage in left.items() if places in right]
    most = min(number, len(teacher), len(student))
    if len(equal) >= most and len(left) == len(teacher) and len(right) == len(student):
        return equal[-number:]
    return list(zip(teacher[-most:], student[-most:], strict=True))


def _places(shape: tuple[int, ...], aspect: float | None) -> tuple[int, ...]:
    """Height and width, or the number of tokens."""
    layout = layout_of(shape, aspect)
    return layout.size or (layout.length,)


def aspect_of(example_inputs: Inputs) -> float | None:
    """Height of the first image over its width; None where there is none."""
    first = images_in(example_inputs)
    return None if first is None else first.shape[-2] / first.shape[-1]


def _dims(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape[1:]))
