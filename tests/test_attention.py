"""Attention that has gone free: the same bits as torch's own, cut in every way, saved, replayed and trained on."""

from __future__ import annotations

import copy
import itertools
import json
import re
import warnings
from typing import Any

import pytest
import torch
from models import Snapshot
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.models import VisionTransformer

import morph
from morph.analysis import analyse
from morph.attention import FreeMultiheadAttention
from morph.cut import apply_plan
from morph.errors import CheckFailedError, EditError, PlanMismatchError
from morph.files import open_model, save_model
from morph.heads import attention_edits, free_attention
from morph.plan import FreeAttention, Plan, Resize, SetAttribute
from morph.removal import Remover, check_cut

HEADS = ("whole", "inside", "both")


def drawn(model: nn.Module) -> Any:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def _slow_path():
    """Torch's own attention without its fused kernel, whose rounding differs."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


# -- the module itself


def inputs_of(kind: str, width: int, kdim: int | None, vdim: int | None, batch_first: bool) -> tuple[Tensor, ...]:
    def make(length: int, size: int) -> Tensor:
        shape = (length, size) if kind == "unbatched" else (2, length, size) if batch_first else (length, 2, size)
        return torch.randn(shape, dtype=torch.float64)

    query = make(5, width)
    if kind == "self":
        return query, query, query
    key = make(7, kdim or width)
    return query, key, key if kind == "cross" else make(7, vdim or width)


def masks_of(kind: str, lengths: tuple[int, int]) -> list[dict[str, Any]]:
    rows = 1 if kind == "unbatched" else 2
    holes = torch.rand(lengths) > 0.6
    holes[:, 0] = False
    padding = torch.zeros(rows, lengths[1], dtype=torch.bool)
    padding[0, -2:] = True
    padding = padding[0] if kind == "unbatched" else padding
    minus = torch.zeros(padding.shape, dtype=torch.float64).masked_fill(padding, float("-inf"))
    per_head = torch.randn(rows * 3, *lengths, dtype=torch.float64)
    causal = torch.triu(torch.ones(lengths), 1).bool()
    return [
        {},
        {"attn_mask": holes},
        {"attn_mask": per_head},
        {"key_padding_mask": padding},
        {"key_padding_mask": minus},
        {"attn_mask": holes, "key_padding_mask": padding},
        {"attn_mask": per_head, "key_padding_mask": minus},
        {"attn_mask": causal, "is_causal": True},
        {"attn_mask": causal, "is_causal": True, "key_padding_mask": padding},
    ]


@pytest.mark.usefixtures("_slow_path")
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    ("kind", "kdim"),
    [("self", None), ("cross", None), ("three", None), ("three", 11), ("unbatched", None), ("unbatched", 11)],
)
def test_on_the_weights_of_torch_it_gives_the_same_bits(kind, kdim, batch_first):
    for bias, extra, zero in ((True, False, False), (False, True, False), (True, True, True), (False, False, True)):
        options = {"bias": bias, "add_bias_kv": extra, "add_zero_attn": zero, "kdim": kdim, "vdim": kdim and 13}
        own = drawn(nn.MultiheadAttention(15, 3, batch_first=batch_first, **options).double())
        free = FreeMultiheadAttention.of(copy.deepcopy(own))
        tensors = inputs_of(kind, 15, kdim, kdim and 13, batch_first)
        lengths = (5, 5 if kind == "self" else 7)
        for masks, (weights, average) in itertools.product(masks_of(kind, lengths), ((True, extra), (False, True))):
            wanted = own(*tensors, need_weights=weights, average_attn_weights=average, **masks)
            got = free(*tensors, need_weights=weights, average_attn_weights=average, **masks)
            assert torch.equal(got[0], wanted[0])
            assert (got[1] is None) == (wanted[1] is None)
            assert got[1] is None or torch.equal(got[1], wanted[1])


def by_hand(free: FreeMultiheadAttention, query: Tensor, memory: Tensor, masked: Tensor) -> Tensor:
    """Slow and obvious: head by head, sample by sample; ``query [N, L, E], memory [N, S, E], masked [L, S]``."""
    heads, size, values = free.num_heads, free.head_dim, free.value_head_dim
    weights = free.in_proj_weight.split([heads * size, heads * size, heads * values])
    biases = free.in_proj_bias.split([heads * size, heads * size, heads * values])
    samples = []
    for x, y in zip(query, memory, strict=True):
        q, k, v = (t @ w.T + b for t, w, b in zip((x, y, y), weights, biases, strict=True))
        mixed = []
        for h in range(heads):
            a, b, c = (t[:, h * n : (h + 1) * n] for t, n in ((q, size), (k, size), (v, values)))
            scores = (a @ b.T / free.scale_dim**0.5).masked_fill(masked, float("-inf"))
            mixed.append(torch.softmax(scores, -1) @ c)
        samples.append(torch.cat(mixed, 1) @ free.out_proj.weight.T + free.out_proj.bias)
    return torch.stack(samples)


@pytest.mark.parametrize("values", [4, 7])
@pytest.mark.parametrize("need_weights", [True, False])
def test_free_sizes_are_what_they_say(values, need_weights):
    free = FreeMultiheadAttention(10, 2, batch_first=True).double()
    rows = 3 * (4 + 4 + values)
    free.in_proj_weight = nn.Parameter(torch.randn(rows, 11, dtype=torch.float64))
    free.in_proj_bias = nn.Parameter(torch.randn(rows, dtype=torch.float64))
    free.out_proj = nn.Linear(3 * values, 13).double()
    free.resize(3, 4, values)
    assert (free.embed_dim, free.kdim, free.vdim, free.num_heads, free.head_dim) == (11, 11, 11, 3, 4)
    query, memory = torch.randn(2, 5, 11).double(), torch.randn(2, 6, 11).double()
    masked = torch.rand(5, 6) > 0.7
    masked[:, 0] = False
    wanted = by_hand(free, query, memory, masked)
    got = free(query, memory, memory, attn_mask=masked, need_weights=need_weights)[0]
    assert torch.allclose(got, wanted, rtol=0, atol=1e-12)
    free.scale_dim += 1
    moved = free(query, memory, memory, attn_mask=masked, need_weights=need_weights)[0]
    assert not torch.allclose(moved, wanted, rtol=0, atol=1e-3)


def test_it_trains_and_is_copied_and_exported():
    own = nn.MultiheadAttention(12, 3, dropout=0.3, batch_first=True)
    free = FreeMultiheadAttention.of(copy.deepcopy(own))
    x = torch.randn(2, 5, 12)
    for weights in (True, False):
        torch.manual_seed(1)
        wanted = own(x, x, x, need_weights=weights)[0]
        torch.manual_seed(1)
        assert torch.equal(free(x, x, x, need_weights=weights)[0], wanted)
    free(x, x, x)[0].sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in free.named_parameters() if n != "in_proj_bias")
    again = copy.deepcopy(free.eval())
    assert type(again) is FreeMultiheadAttention
    program = torch.export.export(again, (x, x, x))
    assert torch.allclose(program.module()(x, x, x)[0], free(x, x, x)[0], atol=1e-6)


def test_what_does_not_fit_is_refused_in_words():
    class Own(nn.MultiheadAttention):
        pass

    free = FreeMultiheadAttention(12, 3)
    with pytest.raises(EditError, match=r"Own is not torch\.nn\.MultiheadAttention itself"):
        FreeMultiheadAttention.of(Own(12, 3))
    with pytest.raises(EditError, match=r"2 heads of 4 and 4 positions need \[24\] rows .* got \[36\] and 12"):
        free.resize(2, 4, 4)
    x = torch.randn(5, 2, 12)
    for args, options, message in (
        ((x, x, x), {"attn_mask": torch.zeros(4, 5)}, r"attn_mask has shape \[4, 5\], expected \[5, 5\]"),
        ((x, x, x), {"key_padding_mask": torch.zeros(5, 2).bool()}, r"has shape \[5, 2\], expected \[2, 5\]"),
        ((x, x, x), {"attn_mask": torch.zeros(5, 5).long()}, "masks are of truth values"),
        ((x, x, x), {"is_causal": True}, "attn_mask must be given"),
        ((x[..., 1:], x, x), {}, r"query has shape \[5, 2, 11\], expected 2 or 3 axes, the last of 12"),
        ((x, x, x[1:]), {}, r"key has shape \[5, 2, 12\], value \[4, 2, 12\]"),
    ):
        with pytest.raises(ValueError, match=message):
            free(*args, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nested = torch.nested.nested_tensor([torch.randn(3, 12), torch.randn(4, 12)])
    with pytest.raises(ValueError, match="nested tensors are not supported"):
        free(nested, nested, nested)


# -- models with it


class Encoder(nn.Module):
    """A `torch.nn.TransformerEncoder` with padded sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(7, 12)
        layer = nn.TransformerEncoderLayer(12, 2, 23, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(12, 5)

    def forward(self, x: Tensor, padded: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x), src_key_padding_mask=padded))


class Detr(nn.Module):
    """A decoder layer as that of DETR: positions are added to queries and keys, not to values."""

    def __init__(self, kdim: int | None = None, **options: Any) -> None:
        super().__init__()
        width = kdim or 20
        self.embed, self.memory = nn.Linear(7, 20), nn.Linear(5, width)
        self.position, self.place = nn.Parameter(torch.zeros(1, 20)), nn.Parameter(torch.zeros(1, width))
        self.own = nn.MultiheadAttention(20, 5, **options)
        self.cross = nn.MultiheadAttention(20, 2, kdim=kdim, vdim=kdim, **options)
        self.first, self.second = nn.LayerNorm(20), nn.LayerNorm(20)
        self.inner, self.outer, self.head = nn.Linear(20, 23), nn.Linear(23, 20), nn.Linear(20, 6)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = self.embed(x), self.memory(y)
        query = x + self.position
        x = self.first(x + self.own(query, query, x)[0])
        x = self.second(x + self.cross(x + self.position, y + self.place, y, need_weights=False)[0])
        return self.head(x + self.outer(self.inner(x).relu()))


class Decoder(nn.Module):
    """A `torch.nn.TransformerDecoder` under a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(7, 15)
        layer = nn.TransformerDecoderLayer(15, 3, 22, batch_first=True, norm_first=True)
        self.decoder, self.head = nn.TransformerDecoder(layer, 1), nn.Linear(15, 5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device, dtype=x.dtype)
        return self.head(self.decoder(self.embed(x), self.embed(y), tgt_mask=mask, tgt_is_causal=True))


class Clip(nn.Module):
    """A text encoder as that of CLIP: sequence first, and a causal mask in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(17, 15), nn.Parameter(torch.zeros(5, 15))
        self.attend, self.norm = nn.MultiheadAttention(15, 3), nn.LayerNorm(15)
        self.inner, self.outer, self.project = nn.Linear(15, 23), nn.Linear(23, 15), nn.Parameter(torch.zeros(15, 7))
        self.register_buffer("mask", torch.full((5, 5), float("-inf")).triu(1))

    def forward(self, tokens: Tensor) -> Tensor:
        x = (self.embed(tokens) + self.position).transpose(0, 1)
        normed = self.norm(x)
        x = x + self.attend(normed, normed, normed, need_weights=False, attn_mask=self.mask)[0]
        return (x + self.outer(self.inner(x).relu())).mean(0) @ self.project


def vision() -> VisionTransformer:
    return VisionTransformer(32, 8, num_layers=2, num_heads=3, hidden_dim=24, mlp_dim=37, num_classes=11)


def example(name: str) -> tuple[nn.Module, Any]:
    padded = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 0, 0], [0, 0, 0, 1, 1]]).bool()
    sequences = (torch.randn(5, 3, 7), torch.randn(4, 3, 5))
    made: dict[str, tuple[Any, Any]] = {
        "vision": (vision, torch.randn(2, 3, 32, 32)),
        "encoder": (Encoder, (torch.randn(3, 5, 7), padded)),
        "detr": (Detr, sequences),
        "detr, own widths": (lambda: Detr(9, bias=False), sequences),
        "detr, extra keys": (lambda: Detr(add_bias_kv=True, add_zero_attn=True), sequences),
        "clip": (Clip, torch.randint(0, 17, (2, 5))),
        "decoder": (Decoder, (torch.randn(2, 5, 7), torch.randn(2, 3, 7))),
    }
    build, inputs = made[name]
    return drawn(build()), inputs


NAMES = ("vision", "encoder", "detr", "detr, own widths", "detr, extra keys", "clip", "decoder")


def freed(model: nn.Module) -> list[FreeMultiheadAttention]:
    return [m for m in model.modules() if isinstance(m, FreeMultiheadAttention)]


def output(model: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", NAMES)
def test_everything_is_cut_in_the_class_of_the_user(name, heads):
    model, inputs = example(name)
    snapshot = Snapshot(model)
    result = morph.prune(model, inputs, ratio=0.4, heads=heads)
    assert snapshot.same()
    details = result.record.details
    assert (type(result.model), details["form"], details["left"]) == (type(model), "class", [])
    assert result.record.checks[0].relative < 1e-12
    assert freed(result.model)
    assert not freed(model)
    assert all(isinstance(m, nn.MultiheadAttention) for m in freed(result.model))
    assert any(m.num_heads * m.head_dim != m.embed_dim or m.head_dim != m.scale_dim for m in freed(result.model))


def test_the_fused_kernels_of_torch_pass_it_by():
    model, inputs = example("encoder")
    result = morph.prune(model, inputs, ratio=0.4, heads="inside")
    assert [m.num_heads for m in freed(result.model)] == [2, 2]  # even, as the fused kernel asks
    quick = output(result.model, inputs)  # in evaluation mode and without gradients
    slow = result.model(*inputs)
    kept = ~inputs[1]
    assert torch.allclose(quick[kept], slow[kept], atol=1e-6)
    assert not result.model.encoder.use_nested_tensor
    assert model.encoder.use_nested_tensor
    for module in freed(result.model):
        module._qkv_same_embed_dim = True  # then torch's encoder layer would run its own kernel on these weights
    with pytest.raises(RuntimeError):
        output(result.model, inputs)


def test_the_record_is_replayed_to_the_same_bits(tmp_path):
    model, inputs = example("vision")
    result = morph.prune(model, inputs, ratio=0.4, heads="both")
    result.record.save(tmp_path / "record.json")
    plan = morph.load_plan(tmp_path / "record.json")
    assert plan == result.record.plan
    again = morph.replay(copy.deepcopy(model), plan, inputs)
    assert torch.equal(output(again.model, inputs), output(result.model, inputs))
    assert again.record.after == result.record.after
    with pytest.raises(PlanMismatchError, match="it looks applied already"):
        morph.replay(result.model, plan, inputs, verify=False)


def test_steps_cut_what_has_gone_free_once_more():
    model, inputs = example("encoder")
    result = morph.prune(model, inputs, ratio=0.6, steps=2, heads="both")
    assert [check.relative < 1e-12 for check in result.record.checks] == [True, True]
    assert len(freed(result.model)) == 2
    assert {m.scale_dim for m in freed(result.model)} == {6}
    again = apply_plan(model, Plan.from_json(json.loads(json.dumps(result.record.plan.to_json()))))
    assert torch.equal(output(again, inputs), output(result.model, inputs))


@pytest.mark.parametrize("name", ["vision", "detr"])
def test_files_hold_it(name, tmp_path):
    model, inputs = example(name)
    cut = morph.prune(model, inputs, ratio=0.4, heads="both").model
    save_model(cut, tmp_path / "cut.pt")
    opened = open_model(tmp_path / "cut.pt").model
    assert len(freed(opened)) == 2
    assert torch.equal(output(opened, inputs), output(cut, inputs))
    torch.save(cut, tmp_path / "pickled.pt")
    if name == "vision":
        assert torch.equal(output(open_model(tmp_path / "pickled.pt").model, inputs), output(cut, inputs))


def test_the_traced_graph_holds_it():
    model, inputs = example("vision")
    result = morph.prune(model, inputs, ratio=0.4, form="graph")
    assert result.record.details["form"] == "graph"
    assert freed(result.model)
    twice = morph.prune(result.model, inputs, ratio=0.3, form="graph", heads="inside")
    assert twice.record.checks[0].relative < 1e-12
    assert len(freed(twice.model)) == 2


def test_the_state_of_the_optimizer_follows():
    model, inputs = example("encoder")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()(*inputs).square().mean().backward()
    optimizer.step()
    result = morph.prune(model, inputs, ratio=0.4, heads="both")
    moved = morph.transplant(optimizer, result.record, before=model, after=result.model)
    resize = {(e.tensor, e.axis): e.index for e in result.record.plan.edits if isinstance(e, Resize)}
    name = "encoder.layers.0.self_attn.in_proj_weight"
    old = optimizer.state[dict(model.named_parameters())[name]]["exp_avg"]
    rows, columns = (torch.tensor(resize[name, axis]) for axis in (0, 1))
    new = moved.state[dict(result.model.named_parameters())[name]]["exp_avg"]
    assert torch.equal(new, old[rows][:, columns])
    result.model(*inputs).square().mean().backward()
    moved.step()


# -- which class it is


def cut_of(model: nn.Module, choice: dict[str, list[int]], inputs: Any) -> Any:
    analysis = analyse(model, inputs)
    removed = Remover(model, inputs, analysis).remove(choice)
    return removed, check_cut(removed, model, inputs, analysis)


def test_torch_keeps_its_class_where_its_code_can_carry_the_cut():
    model, inputs = example("encoder")
    heads = {f"encoder.layers.{i}.self_attn.in_proj_weight[0]": [1] for i in range(2)}
    removed, check = cut_of(model, {**heads, "embed.weight[0]": [0, 2, 4, 6, 8, 10]}, inputs)
    assert check.relative < 1e-12
    assert freed(removed.model) == []
    assert [m.embed_dim for m in removed.model.modules() if isinstance(m, nn.MultiheadAttention)] == [6, 6]
    assert removed.model.encoder.use_nested_tensor
    attributes = [e.attribute for e in removed.plan.edits if isinstance(e, SetAttribute)]
    assert sorted(set(attributes)) == ["embed_dim", "kdim", "num_heads", "vdim"]
    removed, check = cut_of(model, heads, inputs)
    assert check.relative < 1e-12
    assert len(freed(removed.model)) == 2


def test_only_what_is_cut_goes_free():
    model, inputs = example("detr")
    removed, check = cut_of(model, {"own.in_proj_weight[0]": [0, 3]}, inputs)
    assert check.relative < 1e-12
    assert (type(removed.model.own), type(removed.model.cross)) == (FreeMultiheadAttention, nn.MultiheadAttention)


def test_weights_that_are_computed_for_each_call_stay_whole():
    model, inputs = example("encoder")
    nn.utils.parametrizations.weight_norm(model.encoder.layers[0].self_attn.out_proj)
    result = morph.prune(model, inputs, ratio=0.4, heads="both")
    assert result.record.checks[0].passed
    assert type(result.model.encoder.layers[0].self_attn) is nn.MultiheadAttention


def test_a_checkpoint_is_told_what_the_model_needs(tmp_path):
    model, inputs = example("encoder")
    result = morph.prune(model, inputs, ratio=0.4, heads="inside")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    edited = morph.edit_checkpoint(result.record.plan, tmp_path / "model.safetensors", tmp_path / "cut.safetensors")
    assert re.search(r"self_attn: 2 heads of 6 -> 2 of \(\d, \d\), as one of free sizes", str(edited))
    tensors = load_file(tmp_path / "cut.safetensors")
    assert all(torch.equal(t, tensors[name]) for name, t in result.model.state_dict().items())


def test_a_wrong_divisor_is_noticed(monkeypatch):
    """Positions inside heads are cut, and the softmax would divide by the root of the new size."""
    model, inputs = example("vision")
    right = FreeMultiheadAttention.resize

    def wrong(self: FreeMultiheadAttention, heads: int, size: int, values: int) -> None:
        right(self, heads, size, values)
        self.scale_dim = size

    plan = morph.prune(model, inputs, ratio=0.4, heads="inside").record.plan
    monkeypatch.setattr(FreeMultiheadAttention, "resize", wrong)
    with pytest.raises(CheckFailedError):
        morph.replay(model, plan, inputs)


def test_copies_of_whole_heads_are_told_from_copies_inside():
    module = nn.MultiheadAttention(6, 2, bias=False)

    def rows(index: list[int]) -> Resize:
        return Resize("in_proj_weight", 0, 18, tuple(i + part for part in (0, 6, 12) for i in index))

    for index, to, size in (
        ([0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5], 4, 3),
        ([0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5], 2, 6),
        ([3, 5], 1, 2),
        ([0, 2, 3, 4], 2, 2),
    ):
        out = Resize("out_proj.weight", 1, 6, tuple(index))
        assert attention_edits(module, [rows(index), out]) == [FreeAttention("", 2, 3, to, (size, size))]
    assert attention_edits(module, [rows([0, 1, 3])]) == []  # heads of two sizes


@pytest.mark.parametrize("name", ["encoder", "vision"])
def test_widening_is_exact(name):
    model, inputs = example(name)
    result = morph.widen(model, inputs, ratio=2)
    assert result.record.checks[0].passed
    assert result.record.after["params"] > 1.5 * result.record.before["params"]


def test_a_plan_for_another_model_is_refused():
    edit = FreeAttention("encoder.layers.0.self_attn", 3, 4, 2, (4, 4))
    with pytest.raises(PlanMismatchError, match=r"encoder.layers.0.self_attn has 2 heads of 6, the plan 3 heads of 4"):
        apply_plan(Encoder(), Plan((edit,)))
    with pytest.raises(PlanMismatchError, match="head has no attention that can go free"):
        free_attention(Encoder(), [FreeAttention("head", 3, 4, 2, (4, 4))])
    with pytest.raises(EditError, match="need"):
        apply_plan(Encoder(), Plan((FreeAttention("encoder.layers.0.self_attn", 2, 6, 1, (6, 6)),)))
