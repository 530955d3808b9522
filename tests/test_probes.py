"""Probes and Fisher scores: equal to gates, independent of batches, without a trace in the model."""

from __future__ import annotations

import pytest
import torch
from models import Net, Snapshot, images, randomise
from reference import gate_scores
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from morph.blocks import find_blocks, find_cells
from morph.errors import ProbeError
from morph.passes.probes import Probe, insert_probes, probes_of, remove_probes
from morph.scores import cross_entropy, fisher
from morph.tracing import trace
from morph.zoo.darts import DARTS_V2, DartsNet

BLOCKS = ["blocks.0", "blocks.1", "blocks.2"]


@pytest.fixture
def net():
    return randomise(Net()).double()


@pytest.fixture
def batch():
    x, y = images(6)
    return x.double(), y


def test_scores_equal_gates_one_sample_at_a_time(net, batch):
    traced = trace(net, batch[0])
    scores = fisher(traced, find_cells(traced), [batch])
    slow = gate_scores(net, BLOCKS, *batch)
    assert list(scores.channels) == BLOCKS
    assert scores.samples == 6
    for name in BLOCKS:
        torch.testing.assert_close(scores.channels[name], slow[name], rtol=1e-6, atol=0)
        assert scores.cells()[name] == pytest.approx(float(slow[name].sum()), rel=1e-6)


def test_scores_of_a_darts_net_equal_gates():
    net = randomise(DartsNet(DARTS_V2, layers=4, channels=4)).double()
    x, y = images(3, classes=10, size=(32, 32))
    traced = trace(net, x.double())
    cells = find_cells(traced)
    slow = gate_scores(net, [cell.name for cell in cells], x.double(), y)
    scores = fisher(traced, cells, [(x.double(), y)])
    for cell in cells:
        torch.testing.assert_close(scores.channels[cell.name], slow[cell.name], rtol=1e-6, atol=0)


def test_the_comparison_rejects_scores_without_the_activation_or_with_a_mean_loss(net, batch):
    traced = trace(net, batch[0])
    cells = find_cells(traced)
    mean = fisher(traced, cells, [batch], lambda o, t: cross_entropy(o, t) / len(t))
    slow = gate_scores(net, BLOCKS, *batch)
    ratio = slow["blocks.0"].sum() / mean.channels["blocks.0"].sum()
    assert float(ratio) == pytest.approx(36, rel=1e-6)


@pytest.mark.parametrize("sizes", [[6], [1] * 6, [4, 2], [5, 1]])
def test_the_split_into_batches_does_not_matter(net, batch, sizes):
    traced = trace(net, batch[0])
    cells = find_cells(traced)
    whole = fisher(traced, cells, [batch])
    parts = fisher(traced, cells, zip(batch[0].split(sizes), batch[1].split(sizes), strict=True))
    assert parts.samples == whole.samples
    for name in BLOCKS:
        torch.testing.assert_close(parts.channels[name], whole.channels[name], rtol=1e-12, atol=0)


def test_a_loader_and_a_loss_of_ones_own(net, batch):
    traced = trace(net, batch[0])
    loader = DataLoader(TensorDataset(batch[0], F.one_hot(batch[1], 7).double()), batch_size=4)
    scores = fisher(traced, find_cells(traced), loader, lambda o, t: -(o.log_softmax(1) * t).sum(1))
    slow = gate_scores(net, BLOCKS, *batch)
    torch.testing.assert_close(scores.channels["blocks.1"], slow["blocks.1"], rtol=1e-6, atol=0)


def test_a_block_called_twice_adds_before_squaring(net, batch):
    net.blocks[2] = net.blocks[0]
    traced = trace(net, batch[0])
    cells = find_cells(traced)
    assert [(cell.name, len(cell.nodes)) for cell in cells] == [("blocks.0", 2), ("blocks.1", 1)]
    slow = gate_scores(net, ["blocks.0"], *batch)
    torch.testing.assert_close(fisher(traced, cells, [batch]).channels["blocks.0"], slow["blocks.0"], rtol=1e-6, atol=0)


def test_insert_and_remove_leave_the_graph_as_it_was(net, batch):
    traced = trace(net, batch[0])
    before = traced.graph_module.code
    names = list(traced.graph_module._modules)
    probed = insert_probes(traced.graph_module, [("relu_1", 1), ("add", 1)])
    assert sorted(probes_of(probed)) == ["add", "relu_1"]
    assert len(probed.graph.nodes) == len(traced.graph_module.graph.nodes) + 2
    removed = remove_probes(probed)
    assert removed.code == before
    assert traced.graph_module.code == before
    assert list(removed._modules) == names == list(traced.graph_module._modules)
    torch.testing.assert_close(probed(batch[0]), net.eval()(batch[0]), rtol=0, atol=0)


def test_the_model_is_untouched(batch):
    net = randomise(Net()).double()
    net.blocks[1].eval()
    net.stem.weight.requires_grad_(False)
    net.stem.register_forward_hook(lambda *_: None)
    shot = Snapshot(net)
    traced = trace(net, batch[0])
    inner = Snapshot(traced.root)
    fisher(traced, find_cells(traced), [batch])
    assert shot.same()
    assert inner.same()
    net.head.bias.data[0] += 1
    assert not shot.same()


def test_in_place_operations_behind_a_probe_do_not_spoil_it(net, batch):
    """The sum of a block is overwritten by relu_; probing the sum itself must still see its value."""
    traced = trace(net, batch[0])
    cells = find_cells(traced, ["add", "relu_"])
    scores = fisher(traced, cells, [batch])
    assert float(scores.channels["add"].sum()) == pytest.approx(float(scores.channels["relu_"].sum()), rel=1e-9)


def test_tokens_are_scored_on_their_last_axis():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.Sequential(*[nn.Sequential(nn.Linear(11, 11), nn.GELU()) for _ in range(2)])
            self.head = nn.Linear(11, 7)

        def forward(self, x):
            return self.head(self.blocks(x).mean(1))

    x = torch.randn(4, 5, 11)
    traced = trace(Tokens(), x)
    scores = fisher(traced, find_cells(traced, ["blocks.?"]), [(x, torch.randint(0, 7, (4,)))])
    assert [len(v) for v in scores.channels.values()] == [11, 11]


def test_a_model_without_blocks_is_probed_at_its_convolutions():
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 7, 3), nn.Flatten(), nn.Linear(7 * 7 * 9, 7))
    x, _ = images()
    assert [cell.name for cell in find_cells(trace(net, x))] == ["0", "2"]


def test_blocks_are_the_outermost_repeated_modules():
    assert find_blocks(Net()) == BLOCKS
    assert find_blocks(DartsNet(layers=4)) == [f"cells.{i}" for i in range(4)]


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (lambda o, t: F.cross_entropy(o, t), r"one value per sample, shape \[6\], got \[\]; use reduction='none'"),
        (
            lambda o, t: F.cross_entropy(o, t, reduction="none") * float("nan"),
            "the loss of sample 0 of a probe batch is nan",
        ),
        (lambda o, t: t.double(), "does not depend on any probed cell"),
        (
            lambda o, t: F.cross_entropy(o.detach().requires_grad_(), t, reduction="none"),
            "blocks.0 receives no gradient",
        ),
    ],
)
def test_a_bad_loss_is_refused(net, batch, loss, text):
    traced = trace(net, batch[0])
    shot = Snapshot(traced.root)
    with pytest.raises(ProbeError, match=text):
        fisher(traced, find_cells(traced), [batch], loss)
    assert shot.same()


def test_bad_probes_are_refused(net, batch):
    traced = trace(net, batch[0])
    with pytest.raises(ProbeError, match="no node 'nothing' in the graph"):
        insert_probes(traced.graph_module, [("nothing", 1)])
    with pytest.raises(ProbeError, match="'add' is probed already"):
        insert_probes(traced.graph_module, [("add", 1), ("add", 1)])
    with pytest.raises(
        ProbeError, match=r"--at nothing\*: no module or node of that name; modules are named like .*head"
    ):
        find_cells(traced, ["nothing*"])
    with pytest.raises(ProbeError, match="there is no batch to probe with"):
        fisher(traced, find_cells(traced), [])


def test_labels_outside_the_classes_are_refused():
    with pytest.raises(ProbeError, match=r"labels run from 0 to 9, the model has 7 classes \(0 to 6\)"):
        cross_entropy(torch.randn(2, 7), torch.tensor([0, 9]))
    with pytest.raises(ProbeError, match=r"one int64 label per sample, got torch.float32 \[2\]"):
        cross_entropy(torch.randn(2, 7), torch.randn(2))
    with pytest.raises(ProbeError, match="the model gives dict"):
        cross_entropy({}, torch.tensor([0]))


def test_the_first_axis_must_be_the_batch(batch):
    class Folding(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 7, 3)

        def forward(self, x):
            return self.conv(x.repeat(2, 1, 1, 1))[: x.shape[0]].mean((2, 3))

    x, y = images(6)
    traced = trace(Folding(), x)
    with pytest.raises(ProbeError, match="conv gives 12 rows for 6 samples"):
        fisher(traced, find_cells(traced), [(x, y)])


def test_a_probe_does_nothing_without_gradients():
    probe = Probe()
    x = torch.randn(2, 3)
    with torch.no_grad():
        assert probe(x) is x
    assert probe.gradient is None
