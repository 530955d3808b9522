"""Heads for multi-channel labels: each class has several channels, and their votes are its logit.

Source: "CMPUT 466 Mini Project" (2017), section 3: the teacher's last hidden layer is read by a convolution with one
filter for each class, whose positions are the channels of that class; a sigmoid makes them votes, and the sum over the
channels is the logit. So a logit lies between 0 and the number of channels: cross-entropy saturates there. The student
has a linear layer with one output for each class and channel.

The report speaks of 36 channels with 6x6 filters of stride 2, and of 160 outputs of the student, which is 16 channels:
36 need a map of 16x16 without padding, or one of 12x12 padded to its own size over the stride; 16 fit a map of 8x8,
that of network in network, padded likewise. Any number that a map allows can be had.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from morph.errors import HeadError


class MultiChannelHead(nn.Module):
    """One filter for each class over a feature map: ``[N, C, H, W] -> [N, classes]``, the sums of the votes.

    Channels are numbered by class first: channel ``j`` of class ``i`` is at ``i * channels + j``.

    Args:
        in_channels: Channels of the feature map.
        num_classes: Number of classes.
        size: Height and width of the feature map.
        channels: Channels of each class.
        kernel: Side of the filters.
        stride: Their stride.
        flat: Whether the output is ``[N, classes]``; else ``[N, classes, 1, 1]``, for code that pools or flattens it.

    Raises:
        HeadError: If such filters do not give so many channels on such a map; says which numbers they give.

    Example:
        >>> head = MultiChannelHead(192, 10)
        >>> sum(p.numel() for p in head.parameters()), head(torch.randn(2, 192, 8, 8)).shape
        (69130, torch.Size([2, 10]))
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        size: tuple[int, int] = (8, 8),
        channels: int = 16,
        kernel: int = 6,
        stride: int = 2,
        *,
        flat: bool = True,
    ) -> None:
        super().__init__()
        self.num_classes, self.channels, self.flat = num_classes, channels, flat
        self.pad = nn.ZeroPad2d(padding_for(size, channels, kernel, stride))
        self.score = nn.Conv2d(in_channels, num_classes, kernel, stride)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        votes = torch.sigmoid(self.score(self.pad(x))).sum((2, 3), keepdim=True)
        return votes.flatten(1) if self.flat else votes


class VotingHead(nn.Module):
    """A linear layer with one output for each class and channel: ``[N, features] -> [N, classes]``, sums of votes.

    Channels are numbered as in `MultiChannelHead`.

    Args:
        in_features: Width of its input.
        num_classes: Number of classes.
        channels: Channels of each class.

    Raises:
        HeadError: If there is no class or no channel.
    """

    def __init__(self, in_features: int, num_classes: int, channels: int = 16) -> None:
        super().__init__()
        if min(num_classes, channels) < 1:
            raise HeadError(f"{num_classes} classes of {channels} channels; give 1 or more of both")
        self.num_classes, self.channels = num_classes, channels
        self.score = nn.Linear(in_features, num_classes * channels)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        votes: Tensor = torch.sigmoid(self.score(x)).unflatten(1, (self.num_classes, self.channels)).sum(2)
        return votes


def padding_for(size: tuple[int, int], channels: int, kernel: int, stride: int) -> tuple[int, int, int, int]:
    """How much padding (left, right, top, bottom) gives so many channels on a map: none, or as much as ``same`` takes.

    ``same`` padding gives ``ceil(H / stride)`` rows, the odd row and column at the end (as TensorFlow does it).

    Raises:
        HeadError: If neither does.
    """
    if min(*size, channels, kernel, stride) < 1:
        raise HeadError(f"{channels} channels by {kernel}x{kernel} filters of stride {stride}; give numbers above 0")
    totals = [max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in size]
    whole = [(side - kernel) // stride + 1 if side >= kernel else 0 for side in size]
    same = [-(-side // stride) for side in size]
    if whole[0] * whole[1] == channels:
        return 0, 0, 0, 0
    if same[0] * same[1] == channels:
        (top, bottom), (left, right) = ((total // 2, total - total // 2) for total in totals)
        return left, right, top, bottom
    found = [f"{same[0] * same[1]} padded to {same[0]}x{same[1]}"]
    if whole[0] * whole[1]:
        found.append(f"{whole[0] * whole[1]} without padding")
    raise HeadError(
        f"filters of {kernel}x{kernel} with stride {stride} on a map of {size[0]}x{size[1]} do not give {channels} "
        f"channels, but {' or '.join(found)}; give one of these, or another kernel and stride"
    )


LabelHead = MultiChannelHead | VotingHead


def head_of(model: nn.Module) -> LabelHead:
    """The label head of a model.

    Raises:
        HeadError: If it does not have exactly one.
    """
    heads = [module for module in model.modules() if isinstance(module, LabelHead)]
    if len(heads) != 1:
        raise HeadError(
            f"{type(model).__name__} has {len(heads)} heads for multi-channel labels, expected one; give it one with "
            "morph.put_label_head (a teacher) or morph.put_voting_head (a student)"
        )
    return heads[0]


def score_path(model: nn.Module) -> str:
    """Path of the layer that gives the logits of the channels, as `morph.teaching.terms.Channels` wants it.

    Raises:
        HeadError: As `head_of`.
    """
    score = head_of(model).score
    paths: list[str] = [path for path, module in model.named_modules() if module is score]
    return paths[0]


def channel_logits(model: nn.Module, *inputs: Any, **named: Any) -> tuple[Any, Tensor]:
    """Run a model with a label head: its output, and the logits of the channels ``[N, classes * channels]``.

    Gradients flow through both. The model keeps its mode, and no hook is left on it.

    Args:
        model: Has one `MultiChannelHead` or `VotingHead`.
        inputs: What the model is called with,
        named: and by name.

    Raises:
        HeadError: If it does not have exactly one, or runs it not exactly once.
    """
    head = head_of(model)
    scores: list[Tensor] = []
    handle = head.score.register_forward_hook(lambda module, args, output: scores.append(output))
    try:
        output = model(*inputs, **named)
    finally:
        handle.remove()
    if len(scores) != 1:
        raise HeadError(f"{type(model).__name__} ran its head {len(scores)} times for one batch, expected once")
    return output, scores[0].flatten(1)
