"""Edits that draw random numbers and so do not keep the function: fresh weights, blocks and heads, noise on copies."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reinitialise:
    """Draw all weights afresh, as for a teacher that shall be untrained; the model's function is lost on purpose.

    Attributes:
        seed: Seed of the draw.
    """

    seed: int


@dataclass(frozen=True)
class Substitute:
    """Put a cheap block in the place of a convolution; its weights are drawn afresh, so the function is lost.

    Attributes:
        module: Path of the convolution.
        choice: The block; see `morph.passes.cheap_blocks`.
        shape: Shape of the convolution's weight, by which a plan knows its model.
        seed: Seed of the draw.
    """

    module: str
    choice: str
    shape: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class SwapHead:
    """Give a classifier another number of classes; some keep the weights of an old class, the others are drawn afresh.

    Attributes:
        module: Path of the linear layer or convolution.
        shape: Shape of its weight before, by which a plan knows its model.
        to: Number of classes afterwards.
        index: For each of the first classes afterwards, the old class whose weights it keeps; the others are fresh.
        seed: Seed of the draw.
    """

    module: str
    shape: tuple[int, ...]
    to: int
    index: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class PutLabelHead:
    """Put a `morph.label_heads.MultiChannelHead` on a feature map, where the classifier was.

    Attributes:
        module: Path of the module in whose place it goes, or, in the traced graph, its name.
        head: Path of the classifier, a linear layer or convolution.
        shape: Shape of the weight of the classifier, by which a plan knows its model.
        removed: Paths of modules that become `torch.nn.Identity`.
        source: Node of the traced graph that it reads; empty in a model that keeps its class.
        node: Node whose readers read it afterwards; likewise.
        sizes: Channels, height and width of the feature map.
        channels: Channels of each class.
        kernel: Side of its kernel.
        stride: Its stride.
        seed: Seed of the draw.
    """

    module: str
    head: str
    shape: tuple[int, ...]
    removed: tuple[str, ...]
    source: str
    node: str
    sizes: tuple[int, ...]
    channels: int
    kernel: int
    stride: int
    seed: int


@dataclass(frozen=True)
class PutVotingHead:
    """Put a `morph.label_heads.VotingHead` in the place of a classifier.

    Attributes:
        module: Path of the linear layer.
        shape: Shape of its weight, by which a plan knows its model.
        channels: Channels of each class.
        seed: Seed of the draw.
    """

    module: str
    shape: tuple[int, ...]
    channels: int
    seed: int


@dataclass(frozen=True)
class Perturb:
    """Add noise to some positions of a parameter, so that copies part in training; the function moves by that much.

    The noise is normal, with ``deviation`` times the root mean square of the whole parameter as standard deviation
    (Chen et al., "Net2Net", ICLR 2016, section 2: a small amount of noise breaks the symmetry of copied units).

    Attributes:
        tensor: Its name in the state_dict.
        axis: The axis.
        size: Length of that axis, by which a plan knows its model.
        positions: Where on that axis the noise goes.
        deviation: Relative standard deviation.
        seed: Seed of the draw.
    """

    tensor: str
    axis: int
    size: int
    positions: tuple[int, ...]
    deviation: float
    seed: int
