"""Bridges between a tap of the student and a tap of the teacher, made from their shapes.

Maps ``[N, C, H, W]`` (or ``[N, H, W, C]``, as Swin has them), tokens ``[N, L, D]`` and vectors ``[N, D]`` are
bridged: a 1x1 convolution or a linear map for channels, pooling or interpolation for resolution, tokens to maps where
they are those of images and make a square. Tokens that pad a text count as the others do. What a bridge learns
belongs to the teaching and not to the student.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from morph.errors import TeachingError

Shape = tuple[int, ...]
Kind = Literal["map", "map, channels last", "tokens", "vector"]

_PREFIX = 2  # tokens that stand for no place at most: class and distillation


@dataclass(frozen=True)
class Layout:
    """How to read a tapped tensor.

    Attributes:
        kind: What its axes are.
        channels: Number of channels, or width of a token or vector.
        size: Height and width; of tokens, the sides of the square that they make, or None.
        prefix: Tokens before those of the square.
        length: Number of tokens; 1 for others.
    """

    kind: Kind
    channels: int
    size: tuple[int, int] | None
    prefix: int = 0
    length: int = 1

    @property
    def is_map(self) -> bool:
        """Whether it is a map, or can be read as one."""
        return self.size is not None

    def as_map(self, value: Tensor) -> Tensor:
        """``value`` as ``[N, C, H, W]``, tokens that make no square as ``[N, D, L, 1]``; a view where that is possible.

        Raises:
            TeachingError: If tokens should make a square and do not.
        """
        if self.kind == "map, channels last":
            return value.permute(0, 3, 1, 2)
        if self.kind == "tokens":
            places = value[:, self.prefix :].transpose(1, 2)
            if self.size is None:
                return places[..., None]
            side = math.isqrt(places.shape[2])
            if side**2 != places.shape[2]:
                raise TeachingError(
                    f"{value.shape[1]} tokens make no square behind the first {self.prefix}, as those of the example "
                    "inputs do; give images of sizes that do"
                )
            return places.reshape(*places.shape[:2], side, side)
        return value


def layout_of(shape: Shape, aspect: float | None = 1.0) -> Layout:
    """Tell maps with channels first, maps with channels last, tokens and vectors apart.

    Of a tensor with four axes, those two next to each other whose ratio is nearest to that of the images are taken for
    height and width; on a tie, the last two.

    Args:
        shape: Of a tap, with the batch first.
        aspect: Height of the images over their width; None where there are none: tokens then make no square.

    Raises:
        TeachingError: If it has neither two, three nor four axes.
    """
    if len(shape) == 2:
        return Layout("vector", shape[1], None)
    if len(shape) == 3:
        side = math.isqrt(shape[1])
        prefix = shape[1] - side**2
        square = aspect is not None and side > 1 and prefix <= _PREFIX
        return Layout("tokens", shape[2], (side, side) if square else None, prefix if square else 0, shape[1])
    if len(shape) == 4:
        first, last = (abs(math.log(a / b / (aspect or 1.0))) for a, b in (shape[2:], shape[1:3]))
        if last < first:
            return Layout("map, channels last", shape[3], (shape[1], shape[2]))
        return Layout("map", shape[1], (shape[2], shape[3]))
    raise TeachingError(f"a tap of shape {shape}; expected a map [N, C, H, W], tokens [N, L, D] or a vector [N, D]")


class Bridge(nn.Module):
    """Brings a tap of the student and one of the teacher to the same shape; ``(student, teacher)`` to the same.

    Heights and widths are those that come, so images of several sizes may.

    Args:
        student: Layout of the student's tap.
        teacher: Layout of the teacher's.
        project: Whether the student's channels become as many as the teacher's, and its map as large. If not, channels
            stay and the larger of the two maps is pooled to the size of the smaller: nothing is learned. Tokens that
            make no square become ``[N, D, L, 1]`` then.

    Raises:
        TeachingError: If the two cannot be bridged.
    """

    def __init__(self, student: Layout, teacher: Layout, *, project: bool = True) -> None:
        super().__init__()
        self.layouts = student, teacher
        self.projects = project
        self.maps = _as_maps(student, teacher, project)
        self.adapter: nn.Module = nn.Identity()
        if project and student.channels != teacher.channels:
            make = nn.Linear if not self.maps else _pointwise
            self.adapter = make(student.channels, teacher.channels)

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Both in the same shape, but for the channels if they are not projected."""
        if not self.maps:
            return self.adapter(student), teacher
        student, teacher = self.layouts[0].as_map(student), self.layouts[1].as_map(teacher)
        if not self.projects:
            if self.layouts[0].size is None and student.shape[2] != teacher.shape[2]:
                raise TeachingError(
                    f"attention over {student.shape[2]} tokens (student) and {teacher.shape[2]} (teacher), which were "
                    "as many for the example inputs; pair layers that have as many for any input"
                )
            size = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
            return _resize(student, size), _resize(teacher, size)
        size = teacher.shape[2], teacher.shape[3]
        if student.shape[2] * student.shape[3] > size[0] * size[1]:
            return self.adapter(_resize(student, size)), teacher
        return _resize(self.adapter(student), size), teacher

    def __str__(self) -> str:
        if self.maps and self.projects:
            to = self.layouts[1].size
        else:
            sizes = [layout.size for layout in self.layouts if layout.size]
            to = (min(s[0] for s in sizes), min(s[1] for s in sizes)) if self.maps and sizes else None
        steps = []
        for whose, layout in zip(("", "teacher's "), self.layouts, strict=True):
            if self.maps and layout.kind != "map" and layout.size:
                steps.append(f"{whose}{layout.kind} to map")
            if to is not None and layout.size != to:
                steps.append(f"{whose}size to {to[0]}x{to[1]}")
        if not isinstance(self.adapter, nn.Identity):
            name = "1x1 convolution" if self.maps else "linear"
            steps.append(f"{name} {self.layouts[0].channels} -> {self.layouts[1].channels}")
        return ", ".join(steps) or "nothing to do"


def bridge(student: Shape, teacher: Shape, *, project: bool = True, aspect: float | None = 1.0) -> Bridge:
    """The bridge between taps of two shapes; see `Bridge` for ``project`` and errors, `layout_of` for ``aspect``.

    Example:
        >>> print(bridge((1, 32, 8, 8), (1, 64, 4, 4)))
        size to 4x4, 1x1 convolution 32 -> 64
    """
    return Bridge(layout_of(student, aspect), layout_of(teacher, aspect), project=project)


def _as_maps(student: Layout, teacher: Layout, project: bool) -> bool:
    """Whether both are read as maps; if not, they are tokens or vectors of the same number."""
    kinds = {student.kind, teacher.kind}
    if project and (kinds == {"vector"} or (kinds == {"tokens"} and student.length == teacher.length)):
        return False
    alike = kinds == {"tokens"} and student.length == teacher.length and student.size == teacher.size
    if (student.is_map and teacher.is_map) or (alike and not project):
        return True
    raise TeachingError(
        f"no bridge from {_told(student)} (student) to {_told(teacher)} (teacher)"
        + ("" if project else " for attention maps")
        + "; pair maps with maps or with tokens that make a square, tokens with as many tokens, vectors with vectors"
    )


def _told(layout: Layout) -> str:
    if layout.kind == "vector":
        return f"a vector of {layout.channels}"
    if layout.kind == "tokens":
        return f"{layout.length} tokens of {layout.channels}"
    return f"a {layout.kind} of {layout.channels} channels"


def _pointwise(inputs: int, outputs: int) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 1)


def _resize(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Pool where both sides shrink, interpolate where one grows."""
    if tuple(features.shape[2:]) == tuple(size):
        return features
    if features.shape[2] >= size[0] and features.shape[3] >= size[1]:
        return F.adaptive_avg_pool2d(features, size)
    return F.interpolate(features, size=torch.Size(size), mode="bilinear", align_corners=False)
