"""Networks as people write them by hand: what their code does with numbers, types and memory must not mislead a cut."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from analysis_support import gap, run, slow_zeroed, some_units
from models import randomise
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from morph import analyse, load_plan, prune, replay, widen
from morph.analysis.picking import padding_after
from morph.errors import NothingToGrowError
from morph.removal import Remover


class Image(nn.Module):
    """Ends with a linear layer over the mean of space."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(3, width, 3, padding=1), nn.Linear(width, 5)

    def end(self, x: Tensor) -> Tensor:
        return self.head(x.mean((2, 3)))


class PaddedShortcut(Image):
    """The shortcut of a CIFAR ResNet: zeros in place of the channels that it lacks, four on each side."""

    def __init__(self) -> None:
        super().__init__(16)
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, 2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        return self.end(torch.relu(self.second(x) + short))


class Divided(Image):
    """Divides by numbers of channels, one of them a whole number."""

    def __init__(self) -> None:
        super().__init__(12)
        self.second = nn.Conv2d(12, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = torch.sigmoid(x / math.sqrt(x.shape[1]))
        x = self.second(x)
        return self.end(torch.relu(x) * 3 / x.size(1))


def made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    return randomise(kind().double()).eval()


def image() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("kind", [PaddedShortcut, Divided])
@pytest.mark.parametrize("form", ["class", "graph", "auto"])
@pytest.mark.parametrize("seed", range(4))
def test_numbers_in_the_code_keep_their_meaning(kind, form, seed):
    model, x = made(kind), image()
    analysis = analyse(model, x)
    choice = some_units(analysis, seed)
    done = Remover(model, x, analysis, form).remove(choice)
    assert gap(run(slow_zeroed(model, analysis, done.choice), x), run(done.model, x)) < 1e-12
    if form != "class":  # whose code has the numbers in it
        assert not done.left
        assert done.form == "graph"


@pytest.mark.parametrize("kind", [PaddedShortcut, Divided])
def test_numbers_in_the_code_keep_their_meaning_in_a_wider_model(kind):
    model, x = made(kind), image()
    for ratio in (1.25, 2.0):
        wide = widen(model, x, ratio=ratio, verify=False)
        assert gap(run(model, x), run(wide.model, x)) < 1e-12
        assert wide.record.details["form"] == "graph"


def test_a_padding_has_as_many_positions_as_stay_on_its_side():
    import numpy as np

    labels = np.array([1, 2, 3, 4, 5, 6, 7])  # two before, three inside, two behind
    times = np.array([1, 0, 1, 1, 0, 1, 1, 2])
    axes = [np.zeros(2, np.int64), labels, np.zeros(6, np.int64)]
    assert padding_after(axes, times, [1, 1, 2, 2]) == [1, 1, 1, 3]
    assert padding_after(axes, times, [1, 1, 2, -1]) == [1, 1, 1, -1]


class Transposed(nn.Module):
    """An autoencoder whose decoder is the transposed encoder: each axis of the weight is read in one of two calls."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.before = nn.Linear(24, 16, bias=False), nn.Linear(7, 24)
        self.bias, self.out = nn.Parameter(torch.empty(24)), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        code = torch.sigmoid(self.encoder(torch.relu(self.before(x))))
        return self.out(F.linear(code, self.encoder.weight.t(), self.bias))


@pytest.mark.parametrize("verify", [True, False])
def test_a_weight_that_is_read_along_both_axes_is_not_copied(verify):
    model, x = made(Transposed), torch.randn(3, 7, dtype=torch.float64)
    with pytest.raises(NothingToGrowError, match="used in another way too"):
        widen(model, x, ratio=2.0, verify=verify)
    assert prune(model, x, ratio=0.5).record.after["params"] < 0.6 * sum(p.numel() for p in model.parameters())


class RootMeanSquare(nn.Module):
    """Torch's own norm with no epsilon: it takes that of the type at hand."""

    def __init__(self, affine: bool) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(7, 12), nn.RMSNorm(12, elementwise_affine=affine)
        self.last = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(self.first(x))))


@pytest.mark.parametrize("affine", [True, False])
def test_an_epsilon_that_follows_the_type_is_that_of_the_model(affine):
    model, x = randomise(RootMeanSquare(affine)).eval(), 1e-3 * torch.randn(3, 7)
    with torch.no_grad():
        model.first.bias.mul_(1e-3)  # so small that the epsilon matters
    for done in (prune(model, x, ratio=0.5), widen(model, x, ratio=2.0)):
        assert all(check.relative < 1e-12 for check in done.record.checks)
        assert done.model.norm.eps is None
        assert replay(model, done.record.plan, x).record.checks[0].passed


class Writes(Image):
    """Writes into its input, and over what a gradient needs."""

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2.0)
        y = torch.sigmoid(self.first(x))
        z = y * y
        y.mul_(0.5)
        return self.end(z + y)


class OldCheckpoint(Image):
    """Checkpoints in the old way cannot give the gradient of an input alone."""

    def forward(self, x: Tensor) -> Tensor:
        return self.end(checkpoint(self.first, x, use_reentrant=True))


@pytest.mark.parametrize("kind", [Writes, OldCheckpoint])
def test_a_model_that_cannot_be_differentiated_is_compared_by_its_outputs(kind):
    torch.manual_seed(0)
    model, x = randomise(kind(12)).double().eval(), image()
    kept = x.clone()
    wide = widen(model, x, ratio=1.25)
    again = replay(model, wide.record.plan, x)
    assert [check.name for check in again.record.checks] == ["outputs"]
    assert torch.equal(x, kept)
    prune(model, x, ratio=0.5)
    assert torch.equal(x, kept)


def test_a_record_that_cut_nothing_is_replayed(tmp_path):
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), torch.randn(2, 3, 4)
    done = prune(model, x, ratio=0.5)
    done.record.save(tmp_path / "record.json")
    assert replay(model, load_plan(tmp_path / "record.json"), x).record.after == done.record.before


class Bounded(nn.Module):
    """The rows of its table are bounded, which the table's own forward does in place."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.middle, self.last = nn.Embedding(13, 12, max_norm=1.0), nn.Linear(12, 9), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.middle(self.table(x))))


def test_a_bounded_table_stays_whole_and_is_not_touched():
    model, x = made(Bounded).float(), torch.arange(12).reshape(3, 4)
    before = copy.deepcopy(model.state_dict())
    done = prune(model, x, ratio=0.5)
    assert done.model.table.weight.shape == (13, 12)
    assert done.model.middle.weight.shape == (5, 12)
    assert any("bounded" in frozen.reason for frozen in analyse(model, x).frozen)
    replay(model, done.record.plan, x)
    widen(model, x, ratio=1.25)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


class TwoNorms(nn.Module):
    """A norm with weights is told its width by them, one of the same class and width without must be told."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(7, 12), nn.LayerNorm(12)
        self.middle, self.bare = nn.Linear(12, 12), nn.LayerNorm(12, elementwise_affine=False)
        self.last = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.bare(self.middle(torch.relu(self.norm(self.first(x))))))


def test_norms_with_and_without_weights_follow_together():
    model, x = made(TwoNorms), torch.randn(3, 7, dtype=torch.float64)
    for ratio in (0.25, 0.5):
        done = prune(model, x, ratio=ratio, ranking="local", form="class")
        assert not done.record.details["left"]
        widths = [done.model.norm.normalized_shape, done.model.bare.normalized_shape]
        assert widths == [(int(12 * (1 - ratio)),)] * 2


class Constant(nn.Module):
    """Adds a table that it keeps as a plain attribute, as some video models keep their positions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(7, 12), nn.Linear(12, 5)
        self.positions = torch.randn(3, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x) + self.positions))


def test_a_constant_holds_channels_and_the_reason_names_the_way_out():
    model, x = Constant(), torch.randn(2, 3, 7)
    reasons = {frozen.reason: frozen.positions for frozen in analyse(model, x).frozen}
    assert [positions for reason, positions in reasons.items() if "register it" in reason] == [43]
    table = model.__dict__.pop("positions")
    model.register_buffer("positions", table)
    assert [c.units for c in analyse(model, x).couplings.values()] == [12]


class Headed(nn.Module):
    """Attention by einsum, whose parameters have an axis for heads and one for positions in them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.empty(4, 12, 6)) for _ in range(3))
        self.o, self.last = nn.Parameter(torch.empty(4, 6, 12)), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k = torch.einsum("bsd,hdK->bhsK", x, self.q), torch.einsum("btd,hdk->bhtk", x, self.k)
        weights = torch.einsum("bhsk,bhtk->bhst", q, k).softmax(-1)
        read = torch.einsum("bhst,bthk,hkd->bsd", weights, torch.einsum("btd,hdk->bthk", x, self.v), self.o)
        return self.last(x + read)


@pytest.mark.parametrize("heads", ["whole", "inside", "both"])
@pytest.mark.parametrize("seed", range(3))
def test_heads_with_an_axis_of_their_own_are_cut_and_the_record_is_replayed(heads, seed):
    model, x = made(Headed), torch.randn(2, 5, 12, dtype=torch.float64)
    done = prune(model, x, ratio=0.4, ranking="local", score="random", seed=seed, heads=heads)
    again = replay(model, done.record.plan, x)
    assert again.record.checks[0].relative < 1e-12
    assert torch.equal(again.model(x), done.model(x))
    assert done.model.q.shape != model.q.shape


class SpatialAttention(Image):
    """Weighs places by the mean and the largest of their channels (CBAM); or asks which channel is the largest."""

    def __init__(self, asks: bool = False) -> None:
        super().__init__(12)
        self.asks, self.weigh = asks, nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        largest, where = x.max(1, keepdim=True)
        weights = self.weigh(torch.cat([x.mean(1, keepdim=True), where.to(x) if self.asks else largest], 1))
        return self.end(x * torch.sigmoid(weights))


@pytest.mark.parametrize("seed", range(3))
def test_the_largest_channel_is_that_of_those_that_stay(seed):
    torch.manual_seed(seed)
    model, x = randomise(SpatialAttention().double(), seed=seed).eval(), image()
    done = prune(model, x, ratio=0.5, score="random", seed=seed)
    kept = next(edit for edit in done.record.plan.edits if edit.tensor == "first.weight").index
    assert len(kept) == 6
    with torch.no_grad():
        y = model.first(x)[:, list(kept)]
        weights = model.weigh(torch.cat([y.mean(1, keepdim=True), y.amax(1, keepdim=True)], 1))
        wanted = (y * torch.sigmoid(weights)).mean((2, 3)) @ model.head.weight[:, list(kept)].T + model.head.bias
    assert torch.allclose(done.model(x), wanted, atol=1e-13)
    assert widen(model, x, ratio=2.0).record.checks[0].relative < 1e-12


def test_channels_stay_where_the_number_of_the_largest_is_asked_for():
    analysis = analyse(SpatialAttention(asks=True).double().eval(), image())
    assert not analysis.couplings
    assert any("its index" in frozen.reason for frozen in analysis.frozen)
