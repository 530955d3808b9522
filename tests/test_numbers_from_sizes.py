"""Numbers that the code computes from a width and computes with: they are what they were, in class and graph form."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import morph

USES: dict[str, Callable[[Tensor], Tensor]] = {
    "divided by a root": lambda x: x / math.sqrt(x.size(1)),
    "clamped to a share": lambda x: torch.clamp(x, max=x.size(1) / 50),
    "clamped to a whole number": lambda x: torch.clamp(9 * x, max=x.size(1)),
    "slope": lambda x: F.leaky_relu(x - 1, 1 / x.size(1)),
    "elu": lambda x: F.elu(x - 1, x.size(1)),
    "softplus": lambda x: F.softplus(x, x.size(1)),
    "power": lambda x: torch.pow(x, x.size(1) / 8),
    "filled": lambda x: x.masked_fill(x > 0.2, x.size(1)),
    "chosen": lambda x: torch.where(x > x.size(1) - 12, x, x.size(1)),
    "by name": lambda x: torch.addcmul(x, x, x, value=x.size(1)),
    "order of a norm": lambda x: F.normalize(x + 1, p=x.size(1) - 10, dim=2),
}


class Numbered(nn.Module):
    """Two convolutions of prime widths with something between them that looks at the width."""

    def __init__(self, use: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.use = use
        self.first, self.second, self.head = nn.Conv2d(3, 13, 3), nn.Conv2d(13, 7, 3), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.use(self.first(x).relu())
        out: Tensor = self.head(self.second(x).mean((2, 3)))
        return out


@pytest.mark.parametrize("form", ["auto", "graph"])
@pytest.mark.parametrize("use", USES)
def test_number_stays(use: str, form: str) -> None:
    torch.manual_seed(0)
    model, x = Numbered(USES[use]).eval(), torch.randn(3, 3, 9, 9)
    done = morph.prune(model, x, ratio=0.5, form=form)
    assert max(check.relative for check in done.record.checks) < 1e-12
    assert done.model.get_submodule("first").weight.shape[0] == 7
    again = morph.prune(model, x, ratio=0.5, form=form, verify=False)
    assert torch.equal(again.model(x), done.model(x))
