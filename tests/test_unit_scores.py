"""Scores of units, on couplings written by hand."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision
from models import Snapshot, images, randomise
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from morph.analysis import analyse
from morph.couplings import Coupling, Place, Reader
from morph.errors import DataError, ProbeError
from morph.unit_gradients import find_reading, split_samples
from morph.unit_scores import score_units


def rows(units, k=1, first=0):
    return (first + np.arange(units * k)).reshape(units, k)


def coupling(units, places, readers=(), name=None, blocks=1):
    """Places and readers as ``(name, axis)`` or ``(name, axis, positions)``; one position per unit if not said."""
    full = [(n, a, *(p or [rows(units)])) for n, a, *p in places]
    read = [(n, a, *(p or [rows(units)])) for n, a, *p in readers]
    name = name or f"{full[0][0]}[{full[0][1]}]"
    return Coupling(name, units, tuple(Place(*p) for p in full), tuple(Reader(*r) for r in read), (), (), blocks)


class Residual(nn.Module):
    """A stem, a residual branch with a depthwise convolution that runs twice, and a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 7, 3, padding=1)
        self.bn = nn.BatchNorm2d(7)
        self.inner = nn.Conv2d(7, 11, 1)
        self.deep = nn.Conv2d(11, 11, 3, padding=1, groups=11)
        self.norm = nn.BatchNorm2d(11)
        self.back = nn.Conv2d(11, 7, 1)
        self.fc = nn.Linear(7, 5)

    def forward(self, x):
        x = torch.relu_(self.bn(self.stem(x)))
        for _ in range(2):
            x = x + self.back(torch.relu(self.norm(self.deep(self.inner(x)))))
        return self.fc(x.mean((2, 3)))


def residual():
    stream = coupling(
        7,
        [
            *(("stem.weight", 0), ("stem.bias", 0), ("bn.weight", 0), ("bn.bias", 0), ("bn.running_mean", 0)),
            *(("inner.weight", 1), ("back.weight", 0), ("back.bias", 0), ("fc.weight", 1)),
        ],
        [("inner", 1), ("fc", 1)],
    )
    inside = coupling(
        11,
        [
            *(("inner.weight", 0), ("inner.bias", 0), ("deep.weight", 0), ("deep.bias", 0)),
            *(("norm.weight", 0), ("norm.bias", 0), ("norm.running_var", 0), ("back.weight", 1)),
        ],
        [("deep", 1), ("back", 1)],
    )
    return randomise(Residual().double()).eval(), [stream, inside]


class Attention(nn.Module):
    """Three heads of four positions, written with one weight for queries, keys and values."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(7, 36)
        self.proj = nn.Linear(12, 7)
        self.fc = nn.Linear(7, 5)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
        return self.fc(self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)).mean(1))


def attention():
    each = np.arange(36).reshape(3, 3, 4)
    whole, out = each.transpose(1, 0, 2).reshape(3, 12), rows(3, 4)
    inside = each[:2].transpose(2, 0, 1).reshape(4, 6)
    heads = coupling(
        3, [("qkv.weight", 0, whole), ("qkv.bias", 0, whole), ("proj.weight", 1, out)], [("proj", -1, out)]
    )
    queries = coupling(4, [("qkv.weight", 0, inside), ("qkv.bias", 0, inside)], name="queries", blocks=3)
    return randomise(Attention().double()).eval(), [heads, queries]


def tokens(n=6, length=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, length, 7, generator=generator).double(), torch.randint(0, 5, (n,), generator=generator)


def pictures(n=6):
    x, y = images(n, classes=5)
    return x.double(), y


def gates(model, wanted, x, y):
    """The slow obvious way: multiply each reader's input by gates of ones, one sample after another, and autodiff."""
    scores = {}
    for c, readers in wanted:
        total = torch.zeros(c.units, dtype=torch.float64)
        for n in range(len(x)):
            gate = torch.ones(c.units, dtype=torch.float64, requires_grad=True)
            handles = [model.get_submodule(r.module).register_forward_pre_hook(gating(gate, r)) for r in readers]
            (g,) = torch.autograd.grad(F.cross_entropy(model(x[n : n + 1]), y[n : n + 1]), gate)
            total += g**2 / 2 / len(x)
            for handle in handles:
                handle.remove()
        scores[c.name] = total
    return scores


def gating(gate, reader):
    def hook(_, args):
        x = args[0].movedim(reader.axis, -1)
        factor = torch.ones(x.shape[-1], dtype=torch.float64)
        for u, positions in enumerate(reader.positions):
            for p in positions:
                factor = factor * torch.where(torch.arange(len(factor)) == p, gate[u], 1.0)
        return (x * factor).movedim(-1, reader.axis)

    return hook


def weight_terms(model, places, x, y):
    """``sum w * dL/dw`` of each unit, entry by entry, for each sample: ``[samples, units]``."""
    found = []
    for n in range(len(x)):
        parameters = {k: v.detach().clone().requires_grad_() for k, v in model.named_parameters()}
        loss = F.cross_entropy(functional_call(model, parameters, (x[n : n + 1],)), y[n : n + 1])
        loss.backward()
        row = [0.0] * len(places[0].positions)
        for place in places:
            w = parameters[place.tensor]
            product = (w * w.grad).movedim(place.axis, 0)
            for u, positions in enumerate(place.positions):
                row[u] += float(sum(product[p].sum().detach() for p in positions))
        found.append(row)
    return torch.tensor(found, dtype=torch.float64)


def same(a, b):
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], rtol=1e-10, atol=1e-14) for k in a)


def test_fisher_is_that_of_gates_in_front_of_the_last_readers():
    model, (stream, inside) = residual()
    x, y = pictures()
    wanted = gates(model, [(stream, stream.readers), (inside, inside.readers[1:])], x, y)

    assert same(score_units(model, [stream, inside], "fisher", data=(x, y)), wanted)
    assert not same(gates(model, [(stream, stream.readers[:1]), (inside, inside.readers[1:])], x, y), wanted)


def test_fisher_does_not_depend_on_how_samples_are_split():
    model, couplings = residual()
    x, y = pictures()
    whole = score_units(model, couplings, "fisher", data=[(x, y)])
    parts = score_units(model, couplings, "fisher", data=[[x[:1], y[:1]], [x[1:4], y[1:4]], [x[4:], y[4:]]])

    assert same(whole, parts)


def test_fisher_of_heads_and_of_queries_that_nothing_reads():
    model, (heads, queries) = attention()
    x, y = tokens()
    scores = score_units(model, {c.name: c for c in (heads, queries)}, "fisher", data=[(x, y)])
    terms = weight_terms(model, queries.places, x, y)

    assert same({heads.name: scores[heads.name]}, gates(model, [(heads, heads.readers)], x, y))
    assert torch.allclose(scores[queries.name], terms.square().mean(0) / 2, rtol=1e-10)
    assert same({heads.name: scores[heads.name]}, score_units(model, [heads], "fisher", data=[(x, y)]))


def test_fisher_through_a_weight_that_no_module_calls():
    """The projections of `nn.MultiheadAttention` are called as functions; the weight gives the same number."""

    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
            self.fc = nn.Linear(12, 5)

        def forward(self, x):
            x = torch.cat([x, x[..., :5]], -1)
            return self.fc(self.attention(x, x, x)[0].mean(1))

    model = randomise(Packed().double()).eval()
    x, y = tokens()
    out = rows(3, 4)
    heads = coupling(3, [("attention.out_proj.weight", 1, out)], [("attention", -1, out)])
    score = score_units(model, [heads], "fisher", data=(x, y))[heads.name]
    terms = weight_terms(model, heads.places, x, y)

    assert torch.allclose(score, terms.square().mean(0) / 2, rtol=1e-10)
    reading = find_reading(heads, dict(model.named_modules()), dict(model.named_parameters()))
    assert not reading.inputs
    assert [p.tensor for p in reading.weights] == ["attention.out_proj.weight"]


@pytest.mark.parametrize("length", [5, 6])  # 6 is also the number of samples: shapes do not tell
def test_fisher_where_samples_are_not_the_first_axis(length):
    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(7, 11), nn.Linear(11, 5)

        def forward(self, x):
            return self.b(torch.tanh(self.a(x.transpose(0, 1)))).mean(0)

    model = randomise(Transposed().double()).eval()
    x, y = tokens(6, length)
    c = coupling(11, [("a.weight", 0), ("a.bias", 0), ("b.weight", 1)], [("b", -1)])

    assert same(score_units(model, [c], "fisher", data=(x, y)), gates(model, [(c, c.readers)], x, y))


def test_fisher_of_a_transposed_convolution_is_read_at_its_input():
    model = randomise(
        nn.Sequential(nn.Conv2d(3, 7, 1), nn.ConvTranspose2d(7, 5, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    )
    x, y = pictures()
    c = coupling(7, [("0.weight", 0), ("0.bias", 0), ("1.weight", 0)], [("1", 1)])

    assert same(score_units(model.eval(), [c], "fisher", data=(x, y)), gates(model, [(c, c.readers)], x, y))


def test_inputs_may_be_named_and_the_loss_may_need_no_targets():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = attention()[0]

        def forward(self, *, x, shift):
            return {"out": self.net(x) + shift}

    inner, (heads, _) = attention()
    model = Named().eval()
    named = coupling(
        3, [(f"net.{p.tensor}", p.axis, p.positions) for p in heads.places], [("net.proj", -1, rows(3, 4))]
    )
    x, y = tokens()

    def loss(outputs, targets):
        return F.cross_entropy(outputs["out"], y[: len(outputs["out"])], reduction="none")

    found = score_units(model, [named], "fisher", inputs={"x": x, "shift": torch.zeros(1)}, loss=loss)
    wanted = score_units(inner, [heads], "fisher", data=(x, y))
    assert torch.allclose(found[named.name], wanted[heads.name], rtol=1e-10)


def test_taylor_is_the_squared_sum_over_entries_of_the_mean_gradient():
    model, couplings = residual()
    x, y = pictures()
    scores = score_units(model, couplings, "taylor", data=[(x[:2], y[:2]), (x[2:], y[2:])])
    for c in couplings:
        places = [p for p in c.places if "running" not in p.tensor]
        assert torch.allclose(scores[c.name], weight_terms(model, places, x, y).mean(0).square(), rtol=1e-9)


@pytest.mark.parametrize("p", [1, 2])
def test_magnitude_is_the_mean_over_places_divided_by_its_mean(p):
    model, couplings = residual()
    scores = score_units(model, couplings, f"l{p}")
    for c in couplings:
        weights = [q for q in c.places if q.tensor.endswith("weight")]
        wanted = torch.zeros(c.units, dtype=torch.float64)
        for place in weights:
            w = model.get_parameter(place.tensor).detach()
            for u in range(c.units):
                wanted[u] += w.select(place.axis, int(place.positions[u, 0])).abs().pow(p).sum() / len(weights)
        assert torch.allclose(scores[c.name], wanted / wanted.mean(), rtol=1e-12)


def test_magnitude_agrees_with_torch_pruning():
    tp = pytest.importorskip("torch_pruning")
    model = randomise(torchvision.models.resnet18(num_classes=11)).eval()
    x = torch.randn(2, 3, 32, 32)
    found = {c.places[0].tensor.removesuffix(".weight"): c for c in analyse(model, x).couplings.values()}
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=x)
    compared = 0
    for name in ("layer1.0.conv1", "layer2.1.conv1", "conv1", "layer3.0.conv2"):
        conv = model.get_submodule(name)
        group = graph.get_pruning_group(conv, tp.prune_conv_out_channels, idxs=list(range(conv.out_channels)))
        for p in (1, 2):
            wanted = tp.importance.GroupMagnitudeImportance(p=p)(group).double()
            got = score_units(model, [found[name]], f"l{p}")[found[name].name]
            assert torch.allclose(got, wanted, rtol=1e-4), name
            compared += 1
    assert compared == 8


def test_magnitude_of_heads_adds_the_positions_and_biases_count_only_alone():
    model, (heads, _) = attention()
    score = score_units(model, [heads], "l1")[heads.name]
    w, v = model.qkv.weight.detach().abs(), model.proj.weight.detach().abs()
    wanted = torch.stack([w[heads.places[0].positions[u]].sum() + v[:, 4 * u : 4 * u + 4].sum() for u in range(3)])
    alone = coupling(7, [("proj.bias", 0)])

    assert torch.allclose(score, wanted / wanted.mean(), rtol=1e-12)
    bias = model.proj.bias.detach().abs()
    assert torch.allclose(score_units(model, [alone], "l1")[alone.name], bias / bias.mean(), rtol=1e-12)


@pytest.mark.parametrize("score", ["l1", "l2", "taylor", "fisher"])
def test_units_on_buffers_alone_score_one(score):
    model, (stream, _) = residual()
    buffer = replace(stream, name="buffer", places=stream.places[4:5], readers=())
    scores = score_units(model, [buffer, stream], score, data=pictures())
    assert list(scores) == ["buffer", stream.name]
    assert scores["buffer"].tolist() == [1.0] * 7
    assert same({stream.name: scores[stream.name]}, score_units(model, [stream], score, data=pictures()))


def test_an_expert_that_a_sample_does_not_take_gets_nothing_from_it():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.left, self.right = nn.Linear(7, 11), nn.Linear(11, 5), nn.Linear(11, 5)
            self.inner = nn.Linear(11, 11)

        def forward(self, x):
            x = self.first(x.mean(1))
            out = torch.zeros(len(x), 5, dtype=x.dtype)
            left = x[:, 0] > 0
            if left.any():
                out[left] = self.left(torch.tanh(self.inner(x[left])))
            out[~left] = self.right(x[~left])
            return out

    model = randomise(Experts().double()).eval()
    x, y = tokens(8)
    c = coupling(11, [("inner.weight", 0), ("inner.bias", 0), ("left.weight", 1)], [("left", -1)])
    taken = model.first(x.mean(1))[:, 0] > 0
    assert 0 < int(taken.sum()) < 8

    wanted = gates(model, [(c, c.readers)], x[taken], y[taken])[c.name] * int(taken.sum()) / 8
    assert torch.allclose(score_units(model, [c], "fisher", data=(x, y))[c.name], wanted, rtol=1e-10)
    with pytest.raises(ProbeError, match="1 couplings receive no gradient from the loss on this data"):
        score_units(model, [c], "fisher", data=(x[~taken], y[~taken]))


def test_weights_of_zero_score_zero():
    model, (stream, _) = residual()
    for p in model.parameters():
        nn.init.zeros_(p)
    assert score_units(model, [stream], "l2")[stream.name].tolist() == [0.0] * 7


def test_bn_is_the_mean_of_the_scales():
    model, couplings = residual()
    scores = score_units(model, couplings, "bn")
    assert torch.equal(scores["stem.weight[0]"], model.bn.weight.detach().abs())
    assert torch.equal(scores["inner.weight[0]"], model.norm.weight.detach().abs())

    pairs = coupling(3, [("bn.weight", 0, rows(3, 2)), ("norm.weight", 0, rows(3))])
    wanted = (model.bn.weight[:6].abs().reshape(3, 2).mean(1) + model.norm.weight[:3].abs()) / 2
    assert torch.allclose(score_units(model, [pairs], "bn")[pairs.name], wanted.detach(), rtol=1e-12)


def test_random_follows_the_seed_and_leaves_the_global_state():
    model, couplings = residual()
    state = torch.get_rng_state()
    one, again, other = (score_units(model, couplings, "random", seed=s) for s in (3, 3, 4))
    assert same(one, again)
    assert not same(one, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_function_of_ones_own():
    model, couplings = residual()
    scores = score_units(model, couplings, lambda m, c: m.fc.weight.sum() * torch.arange(c.units))
    assert [len(s) for s in scores.values()] == [7, 11]
    assert all(s.dtype == torch.float64 and not s.requires_grad for s in scores.values())


@pytest.mark.parametrize("score", ["l1", "l2", "bn", "taylor", "fisher", "random"])
def test_the_model_is_left_as_it_was(score):
    model, couplings = residual()
    model.train()
    model.bn.eval()
    model.fc.weight.requires_grad_(False)
    handle = model.inner.register_forward_hook(lambda *_: pytest.fail("a hook of the model ran"))
    before = Snapshot(model)
    scores = score_units(model, couplings, score, data=[pictures()])
    assert before.same()
    assert all(s.dtype == torch.float64 and s.device.type == "cpu" for s in scores.values())
    handle.remove()
    assert not before.same()


def test_scores_come_out_under_no_grad_too():
    model, couplings = residual()
    wanted = score_units(model, couplings, "fisher", data=pictures())
    with torch.no_grad():
        assert same(score_units(model, couplings, "fisher", data=pictures()), wanted)


def test_magnitudes_of_a_large_net_are_quick():
    model = torchvision.models.resnet50()
    couplings = analyse(model, torch.randn(2, 3, 64, 64)).couplings
    start = time.perf_counter()
    scores = score_units(model, couplings, "l2")
    assert time.perf_counter() - start < 5  # 0.4 s on an idle core
    assert len(scores) == len(couplings) > 30


def test_samples_are_cut_out_of_nested_inputs():
    x, y = tokens(3)
    parts = list(split_samples({"x": x, "mask": torch.ones(2), "flag": True}, y))
    assert [p[0]["x"].shape[0] for p in parts] == [1, 1, 1]
    assert torch.equal(torch.cat([p[1] for p in parts]), y)
    assert all(p[0]["flag"] is True and p[0]["mask"].shape == (2,) for p in parts)


def test_refusals():
    model, couplings = residual()
    x, y = pictures()
    plain = coupling(7, [("fc.weight", 1)], [("fc", 1)])

    def score(name, wanted=couplings, **options):
        return score_units(model, wanted, name, **options)

    with pytest.raises(ProbeError, match=r"score 'l3' is not one of l1, l2, bn, taylor, fisher, random, nor a call"):
        score("l3")
    with pytest.raises(ProbeError, match=r"1 of 3 couplings do not: fc.weight\[1\]; leave them out"):
        score("bn", [*couplings, plain])
    for name in ("fisher", "taylor"):
        with pytest.raises(ProbeError, match=f"score '{name}' needs data, batches of"):
            score(name)
        with pytest.raises(ProbeError, match="needs no targets, inputs"):
            score(name, inputs=x)
        with pytest.raises(ProbeError, match="there is no batch to score with; give data"):
            score(name, data=[])
        with pytest.raises(DataError, match=r"batch 1 of the data is not a pair .* but Tensor"):
            score(name, data=[(x, y), x])
        with pytest.raises(ProbeError, match=r"shape \[6\], got \[\]; use reduction='none'"):
            score(name, data=(x, y), loss=F.cross_entropy)
        with pytest.raises(ProbeError, match=r"one value per sample, shape \[6\], got float"):
            score(name, data=(x, y), loss=lambda o, t: 1.0)
        with pytest.raises(ProbeError, match="the loss of sample 0 of a batch is nan"):
            score(name, data=(x * float("nan"), y))
        with pytest.raises(
            ProbeError, match=r"2 couplings receive no gradient from the loss on this data: stem.weight"
        ):
            score(name, data=(x, y), loss=lambda o, t: o.detach().sum(1))
        unused = coupling(5, [("lost.weight", 0)])
        model.lost = nn.Linear(2, 5).double()
        with pytest.raises(ProbeError, match=r"1 couplings receive no gradient .*: lost.weight\[0\]; they are"):
            score(name, [*couplings, unused], data=(x, y))
        del model.lost
    with pytest.raises(ProbeError, match=r"<lambda> must give a tensor of shape \[7\] for stem.*, got \[3\]"):
        score(lambda m, c: torch.zeros(3))
    with pytest.raises(ProbeError, match=r"must give a tensor of shape .* got list"):
        score(lambda m, c: [0.0] * 7)
    with torch.no_grad():
        model.norm.weight[2] = float("inf")
    with pytest.raises(ProbeError, match=r"inner.weight\[0\]: the score of 1 of 11 units is not finite, first inf of"):
        score("bn")


def test_a_model_that_cannot_be_copied_is_refused():
    class Stuck(nn.Linear):
        def __deepcopy__(self, memo):
            raise RuntimeError("no copies")

    with pytest.raises(ProbeError, match="Stuck cannot be copied to be scored: no copies"):
        score_units(Stuck(3, 2), [coupling(2, [("weight", 0)])], "taylor", data=pictures())
