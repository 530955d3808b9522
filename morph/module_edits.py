"""Edits that let a module know its new sizes; they change no tensor."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SetAttribute:
    """Give a module another size in one of its attributes, such as ``groups`` or ``num_heads``.

    Attributes:
        module: Path of the module.
        attribute: Name of the attribute.
        value: What it was, by which a plan knows its model.
        new: What it becomes.
    """

    module: str
    attribute: str
    value: int | tuple[int, ...]
    new: int | tuple[int, ...]


@dataclass(frozen=True)
class FreeAttention:
    """Let a ``torch.nn.MultiheadAttention`` go on as `morph.attention.FreeMultiheadAttention`.

    That class has heads of any number and size; torch's own has heads times head size equal to its width. What the
    softmax divides by stays as it was. The edit also resizes one that has gone free already.

    Attributes:
        module: Path of the module.
        num_heads: Number of heads before, and
        head_dim: positions of each in queries and keys before, by which a plan knows its model.
        to: Number of heads afterwards.
        sizes: Positions of each afterwards: in queries and keys, and in values.
    """

    module: str
    num_heads: int
    head_dim: int
    to: int
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class SetConfig:
    """Give the configuration that a model of transformers carries another size.

    Attributes:
        setting: Its name; dots lead into configurations inside.
        value: What it was, by which a plan knows its model.
        new: What it becomes.
    """

    setting: str
    value: int
    new: int
