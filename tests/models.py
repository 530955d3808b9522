"""Small models and the helpers that keep a bug from hiding: random statistics, prime widths, snapshots."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter and buffer so that no channel is like another; the model computes something lively."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            if name.endswith("running_var") or (tensor.dim() == 1 and name.endswith("weight")):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            elif tensor.dim() > 1:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 1.3 / tensor[0].numel() ** 0.5)
            else:
                tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    return model


class Block(nn.Module):
    """A residual block with a grouped convolution; an in-place ReLU follows its sum."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(channels, channels, 3, padding=1, groups=groups)
        self.norm = nn.BatchNorm2d(channels)
        self.point = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.point(torch.relu(self.norm(self.mix(x))))
        return torch.relu_(x)


class Net(nn.Module):
    """Three blocks of 6, 6 and 10 groups at a width of 30; not a multiple of eight anywhere."""

    def __init__(self, classes: int = 7) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 30, 3, padding=1)
        self.blocks = nn.Sequential(Block(30, 6), Block(30, 6), Block(30, 10))
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(30, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.blocks(self.stem(x)).mean((2, 3))))


def images(n: int = 5, classes: int = 7, seed: int = 0, size: tuple[int, int] = (11, 13)) -> tuple[Tensor, Tensor]:
    """Random images that are not square, and labels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, *size, generator=generator), torch.randint(0, classes, (n,), generator=generator)


class Snapshot:
    """Everything about a model that surgery on a copy must not change."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.state = copy.deepcopy(model.state_dict())
        self.flags = self._flags()

    def _flags(self) -> list[object]:
        modules = [
            (
                n,
                type(m),
                m.training,
                list(m._forward_hooks),
                list(m._forward_pre_hooks),
                list(m._backward_hooks),
                list(m._buffers),
            )
            for n, m in self.model.named_modules()
        ]
        return [*modules, *((n, id(p), p.requires_grad, p.grad is None) for n, p in self.model.named_parameters())]

    def same(self) -> bool:
        """Whether nothing has changed, to the bit."""
        now = self.model.state_dict()
        return (
            self._flags() == self.flags
            and list(now) == list(self.state)
            and all(torch.equal(now[k], v) for k, v in self.state.items())
        )
