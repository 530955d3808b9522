"""Small networks, one for each way in which channels hang together; prime widths, float64, random statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from models import randomise
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

Made = tuple[nn.Module, Any]
NETS: dict[str, Callable[[], Made]] = {}
_IMAGE = (3, 3, 7, 5)
_TOKENS = (3, 5, 12)


def make(name: str) -> Made:
    """A model with random weights, and inputs that it accepts."""
    model, inputs = NETS[name]()
    return randomise(model.double()).eval(), inputs


def draw(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def net(inputs: Callable[[], Any]) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Register a class under its name in small letters."""

    def register(cls: type[nn.Module]) -> type[nn.Module]:
        NETS[cls.__name__.lower()] = lambda: (cls(), inputs())
        return cls

    return register


def image() -> Tensor:
    return draw(*_IMAGE)


def tokens() -> Tensor:
    return draw(*_TOKENS)


def numbers() -> Tensor:
    return torch.randint(0, 13, (3, 6), generator=torch.Generator().manual_seed(1))


class Ended(nn.Module):
    """What comes after the trunk of an image network: the mean over space, and a linear layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.head = nn.Linear(channels, 5)

    def end(self, x: Tensor) -> Tensor:
        return self.head(x.mean((2, 3)))


@net(image)
class Chain(Ended):
    def __init__(self) -> None:
        super().__init__(7)
        self.one, self.bn = nn.Conv2d(3, 11, 3), nn.BatchNorm2d(11)
        self.two, self.act = nn.Conv2d(11, 7, 3, bias=False), nn.PReLU(7)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.act(self.two(torch.sigmoid(self.bn(self.one(x))))))


@net(image)
class Residual(Ended):
    def __init__(self) -> None:
        super().__init__(11)
        self.stem, self.mid, self.back = nn.Conv2d(3, 11, 3), nn.Conv2d(11, 7, 1), nn.Conv2d(7, 11, 1)
        self.bn = nn.BatchNorm2d(11, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.bn(self.back(torch.sigmoid(self.mid(x))))
        return self.end(torch.sigmoid(x))


@net(image)
class Projection(Ended):
    def __init__(self) -> None:
        super().__init__(13)
        self.stem, self.mid, self.back = nn.Conv2d(3, 11, 3), nn.Conv2d(11, 7, 1), nn.Conv2d(7, 13, 1, bias=False)
        self.short, self.bn = nn.Conv2d(11, 13, 1), nn.BatchNorm2d(13)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.end(torch.relu_(self.short(x) + self.bn(self.back(torch.sigmoid(self.mid(x))))))


@net(image)
class Dense(Ended):
    def __init__(self) -> None:
        super().__init__(23)
        self.one, self.two, self.three = nn.Conv2d(3, 11, 3), nn.Conv2d(11, 7, 1), nn.Conv2d(18, 5, 1)
        self.bn = nn.BatchNorm2d(18)

    def forward(self, x: Tensor) -> Tensor:
        one = torch.relu(self.one(x))
        both = torch.cat([one, self.two(one)], 1)
        return self.end(torch.cat([self.three(torch.sigmoid(self.bn(both))), both], 1))


@net(image)
class Depthwise(Ended):
    def __init__(self) -> None:
        super().__init__(7)
        self.up, self.depth, self.down = nn.Conv2d(3, 11, 1), nn.Conv2d(11, 11, 3, groups=11), nn.Conv2d(11, 7, 1)
        self.bn = nn.BatchNorm2d(11)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(torch.relu(self.down(torch.sigmoid(self.bn(self.depth(self.up(x)))))))


@net(image)
class Grouped(Ended):
    """Three groups of 5 in and 7 out: positions inside the groups, and whole groups."""

    def __init__(self) -> None:
        super().__init__(11)
        self.up, self.mix, self.down = nn.Conv2d(3, 15, 1), nn.Conv2d(15, 21, 3, groups=3), nn.Conv2d(21, 11, 1)
        self.bn = nn.BatchNorm2d(15)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(torch.relu(self.down(torch.sigmoid(self.mix(torch.sigmoid(self.bn(self.up(x))))))))


@net(image)
class Transposed(Ended):
    def __init__(self) -> None:
        super().__init__(15)
        self.one, self.two = nn.Conv2d(3, 11, 3), nn.ConvTranspose2d(11, 15, 3, stride=2)
        self.three = nn.ConvTranspose2d(15, 15, 2, groups=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.three(torch.sigmoid(self.two(torch.sigmoid(self.one(x))))))


@net(image)
class Shuffle(Ended):
    """Two grouped convolutions with a channel shuffle between them."""

    def __init__(self) -> None:
        super().__init__(12)
        self.up, self.mix, self.out = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 12, 1, groups=3), nn.Conv2d(12, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.mix(torch.relu(self.up(x))))
        n, c, h, w = x.shape
        return self.end(self.out(x.view(n, 3, c // 3, h, w).transpose(1, 2).reshape(n, c, h, w)))


@net(image)
class Gated(Ended):
    """Halves of one convolution multiply each other (GLU), once by `chunk`, once by unequal `split`."""

    def __init__(self) -> None:
        super().__init__(7)
        self.one, self.two, self.three = nn.Conv2d(3, 22, 1), nn.Conv2d(11, 12, 1), nn.Conv2d(5, 7, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.one(x).chunk(2, 1)
        a, b = self.two(a * torch.sigmoid(b)).split([5, 7], 1)
        return self.end(torch.relu(self.three(a)) + torch.sigmoid(b))


@net(image)
class Squeeze(Ended):
    def __init__(self) -> None:
        super().__init__(7)
        self.up, self.down = nn.Conv2d(3, 11, 3), nn.Conv2d(11, 7, 1)
        self.one, self.two = nn.Linear(11, 5), nn.Linear(5, 11)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        gate = torch.sigmoid(self.two(torch.sigmoid(self.one(F.adaptive_avg_pool2d(x, 1).flatten(1)))))
        return self.end(self.down(x * gate[:, :, None, None]))


@net(image)
class Pixels(nn.Module):
    """A pixel shuffle on 7 channels of 2 x 2, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.mid, self.out = nn.Conv2d(3, 28, 3, padding=1), nn.Conv2d(7, 5, 1), nn.Conv2d(20, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(torch.sigmoid(F.pixel_shuffle(self.up(x), 2)))
        return self.out(F.pixel_unshuffle(torch.sigmoid(x), 2))


@net(image)
class Flattened(nn.Module):
    """Seven channels of 5 x 3 pixels each read by a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(3, 7, 3), nn.Linear(105, 11), nn.Linear(11, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.sigmoid(self.two(torch.sigmoid(self.one(x)).flatten(1))))


@net(lambda: draw(4, 13))
class Mlp(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Linear(13, 11), nn.BatchNorm1d(11), nn.Sigmoid(), nn.Linear(11, 7), nn.GELU(), nn.Linear(7, 5)
        )


class Heads(nn.Module):
    """Attention by hand, with the sizes from the shapes of its tensors and one attribute."""

    def __init__(self, width: int, heads: int = 3, shared: int = 1) -> None:
        super().__init__()
        self.heads, self.shared = heads, shared
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, width // shared, bias=False)
        self.v, self.o = nn.Linear(width, width // shared), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q = self.q(x).view(n, t, self.heads, -1).transpose(1, 2)
        k, v = (f(x).view(n, t, self.heads // self.shared, -1).transpose(1, 2) for f in (self.k, self.v))
        if self.shared > 1:
            k, v = k.repeat_interleave(self.shared, 1), v.repeat_interleave(self.shared, 1)
        weights = (q @ k.transpose(-2, -1) * 0.5).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).reshape(n, t, -1))


@net(numbers)
class Transformer(nn.Module):
    """Embedding, LayerNorm, attention by hand and an MLP on one residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.place = nn.Embedding(13, 12), nn.Parameter(torch.zeros(1, 6, 12))
        self.ln1, self.heads, self.ln2 = nn.LayerNorm(12), Heads(12), nn.LayerNorm(12, bias=False)
        self.up, self.down, self.out = nn.Linear(12, 17), nn.Linear(17, 12), nn.Linear(12, 5)

    def forward(self, i: Tensor) -> Tensor:
        x = self.table(i) + self.place
        x = x + self.heads(self.ln1(x))
        return self.out(x + self.down(F.gelu(self.up(self.ln2(x)))))


@net(tokens)
class Grouphead(nn.Module):
    """Grouped-query attention: 4 heads for queries, 2 for keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.attention, self.out = nn.Linear(12, 20), Heads(20, 4, shared=2), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attention(torch.sigmoid(self.inner(x))))


@net(tokens)
class Packed(nn.Module):
    """Queries, keys and values from one linear layer; a fused attention operator."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 3
        self.qkv, self.o, self.norm = nn.Linear(12, 45), nn.Linear(15, 12), nn.LayerNorm(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.head(self.norm(x + self.o(mixed.transpose(1, 2).reshape(n, t, -1))))


@net(tokens)
class Torchhead(nn.Module):
    """torch's own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.mix = nn.Linear(12, 15), nn.MultiheadAttention(15, 3, batch_first=True)
        self.norm, self.head = nn.LayerNorm(15), nn.Linear(15, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return self.head(self.norm(x + self.mix(x, x, x, need_weights=False)[0]))


@net(lambda: draw(3, 4, 6, 7))
class Windows(nn.Module):
    """Attention inside windows, as in Swin: tokens are regrouped, channels are not."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(7, 11), nn.Linear(11, 13), nn.Linear(13, 5)
        self.norm = nn.LayerNorm(11)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.one(x))
        n, h, w, c = x.shape
        x = x.view(n, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        x = (x @ x.transpose(1, 2)).softmax(-1) @ x
        x = x.view(n, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
        return self.head(torch.sigmoid(self.two(x)).mean((1, 2)))


@net(image)
class Groupnorm(Ended):
    """Three groups of 5 channels, each normalised by itself."""

    def __init__(self) -> None:
        super().__init__(7)
        self.one, self.norm, self.two = nn.Conv2d(3, 15, 3), nn.GroupNorm(3, 15), nn.Conv2d(15, 7, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.two(torch.sigmoid(self.norm(self.one(x)))))


@net(image)
class Convnext(Ended):
    """LayerNorm on channels, with the channels last, in a residual block with a scale of its own."""

    def __init__(self) -> None:
        super().__init__(11)
        self.stem, self.norm = nn.Conv2d(3, 11, 1), nn.LayerNorm(11)
        self.depth = nn.Conv2d(11, 11, 3, padding=1, groups=11)
        self.up, self.down, self.scale = nn.Linear(11, 13), nn.Linear(13, 11), nn.Parameter(torch.ones(11, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.down(F.gelu(self.up(self.norm(self.depth(x).permute(0, 2, 3, 1)))))
        return self.end(x + self.scale * y.permute(0, 3, 1, 2))


@net(image)
class Twice(Ended):
    """One convolution used twice, so that its inputs and outputs are the same channels."""

    def __init__(self) -> None:
        super().__init__(11)
        self.stem, self.loop = nn.Conv2d(3, 11, 3), nn.Conv2d(11, 11, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(torch.sigmoid(self.loop(torch.sigmoid(self.loop(self.stem(x))))))


@net(numbers)
class Tied(nn.Module):
    """The table of the embedding is also the weight of the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mid, self.back = nn.Embedding(13, 11), nn.Linear(11, 7), nn.Linear(7, 11)
        self.head = nn.Linear(11, 13)
        self.head.weight = self.table.weight

    def forward(self, i: Tensor) -> Tensor:
        return self.head(self.back(torch.sigmoid(self.mid(self.table(i)))))


@net(image)
class Weightnorm(Ended):
    def __init__(self) -> None:
        super().__init__(7)
        self.one, self.two = weight_norm(nn.Conv2d(3, 11, 3)), weight_norm(nn.Conv2d(11, 7, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.end(torch.sigmoid(self.two(torch.sigmoid(self.one(x)))))


@net(lambda: (draw(3, 7), draw(3, 11, seed=6)))
class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(7, 13), nn.Linear(11, 13), nn.Linear(13, 5)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        out = self.head(torch.sigmoid(self.left(x) + self.right(y)))
        return out, out.argmax(1)


@net(lambda: {"y": draw(3, 11), "x": draw(3, 7, seed=6)})
class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(7, 13), nn.Linear(11, 17), nn.Linear(30, 5)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"out": self.head(torch.sigmoid(torch.cat([self.left(x), self.right(y)], -1)))}


@net(image)
class Constants(Ended):
    """Sizes written into the code: only the traced graph can carry other ones."""

    def __init__(self) -> None:
        super().__init__(7)
        self.one, self.two, self.three = nn.Conv2d(3, 13, 3), nn.Conv2d(13, 7, 1), nn.Linear(8 * 15, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.one(x))
        y = self.three(torch.relu(x[:, 5:]).reshape(-1, 8 * 5 * 3))
        return self.end(self.two(torch.cat([x[:, :5], x[:, 5:]], 1)) * y.view(-1, 7, 1, 1))


@net(tokens)
class Attributes(nn.Module):
    """Sizes kept in attributes of the user's own names, one of them a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.n_head, self.width, self.form = 3, 15, (3, 5)
        self.value, self.out, self.head = nn.Linear(12, 15), nn.Linear(15, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        v = self.value(x).view(*x.shape[:2], *self.form).transpose(1, 2)
        v = torch.sigmoid(v).transpose(1, 2).reshape(x.shape[0], x.shape[1], self.width)
        return self.head(torch.sigmoid(self.out(v)))


@net(image)
class Odd(Ended):
    """Tensors of other kinds: scalars, whole numbers, a complex weight, frozen parameters, buffers along channels."""

    def __init__(self) -> None:
        super().__init__(11)
        self.one, self.bn = nn.Conv2d(3, 11, 3), nn.BatchNorm2d(11).requires_grad_(False)
        self.two = nn.Conv2d(11, 11, 1)
        self.register_buffer("scale", torch.tensor(0.7))
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("mean", torch.zeros(11, 1, 1))
        self.register_buffer("unused", torch.zeros(11))
        self.levels = nn.Parameter(torch.arange(5), requires_grad=False)
        self.phase = nn.Parameter(torch.polar(torch.ones(5), torch.arange(5.0)).to(torch.complex128))
        self.one.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.one(x)) - self.mean) * self.scale
        x = self.end(self.two(x) + x)
        return (x * self.levels * self.phase).real
