"""Growth by gain: merges and copies in one plan, exact, replayable, and greedy in the slow and obvious way too."""

from __future__ import annotations

import json

import pytest
import torch
from models import Block, Net, Snapshot, images, randomise
from torch import nn

import morph
from morph.analysis import Sizes
from morph.batches import Batch
from morph.blocks import find_cells
from morph.counts import count
from morph.errors import NothingToGrowError, ProbeError, TargetError
from morph.gains import Copier, unit_rows
from morph.mixing import grow_by_gain
from morph.plan import Plan, Regroup, Resize
from morph.scores import cross_entropy, fisher
from morph.surgery import replay
from morph.tracing import trace

BATCH = images(6)


def net(*groups: int) -> nn.Module:
    """Three residual blocks with so many groups."""
    model = Net()
    model.blocks = nn.Sequential(*(Block(30, g) for g in groups or (6, 6, 6)))
    return randomise(model).double()


def batch() -> Batch:
    return BATCH[0].double(), BATCH[1]


def grow(model, **options):
    return grow_by_gain(model, [batch()], **options)


@pytest.fixture(scope="module")
def grown():
    model = net()
    snapshot = Snapshot(model)
    steps = []
    result = grow(model, target_params=30_000, on_step=steps.append)
    return model, snapshot, result, steps


def test_both_moves_in_one_plan_and_the_function_stays(grown):
    model, snapshot, result, _ = grown
    assert snapshot.same()
    kinds = [type(edit) for edit in result.record.plan.edits]
    assert set(kinds) >= {Regroup, Resize}
    assert kinds.index(Resize) > max(i for i, kind in enumerate(kinds) if kind is Regroup)
    x = batch()[0]
    torch.testing.assert_close(result.model.eval()(x), model.eval()(x), rtol=1e-12, atol=1e-12)
    assert len(result.record.checks) == 2
    assert all(check.passed for check in result.record.checks)
    snapshot.model.train()


def test_the_record_tells_sizes_steps_and_units(grown):
    _, _, result, steps = grown
    record = json.loads(json.dumps(result.record.to_json()))
    assert record["params_after"] == sum(p.numel() for p in result.model.parameters())
    assert record["macs_after"] == count(result.model, batch()[0][:1]).macs
    assert record["target"] == 30_000 <= record["params_after"]
    assert record["distance"] == record["params_after"] - 30_000
    assert [step["move"] for step in record["steps"]] == [step.move for step in steps]
    assert sum(step.added for step in steps) == record["params_after"] - record["params_before"]
    assert steps[-1].params == record["params_after"]
    assert steps[-1].macs == record["macs_after"]
    assert any(c["groups_after"] < c["groups_before"] for c in record["cells"])
    wider = [row for row in record["couplings"] if row["units_after"] > row["units_before"]]
    assert {row["name"] for row in wider} == {step.name for step in steps if step.move == "widen"}
    assert "unit of the loss" in record["scores"]


def test_a_merge_gains_what_the_cell_scores(grown):
    model, _, _, steps = grown
    traced = trace(model, batch()[0][:2])
    scores = fisher(traced, find_cells(traced), [batch()]).cells()
    merges = [step for step in steps if step.move == "regroup"]
    assert merges
    assert all(step.gain == pytest.approx(scores[step.name], rel=1e-12) for step in merges)


def test_the_plan_replays_to_the_bit(grown):
    model, _, result, _ = grown
    plan = Plan.from_json(json.loads(json.dumps(result.record.plan.to_json())))
    again = replay(model, plan, batch()[0]).model
    one, two = result.model.state_dict(), again.state_dict()
    assert list(one) == list(two)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_copies_are_doublings_so_that_float32_stays_exact_too():
    model = net().float()
    x = BATCH[0]
    result = grow_by_gain(model, [BATCH], target_params=60_000)
    assert all(check.relative < 1e-13 for check in result.record.checks)
    scales = {s for e in result.record.plan.edits if isinstance(e, Resize) for s in e.scale}
    assert scales <= {1.0, 0.5, 0.25, 0.125}
    assert len(scales) > 1
    torch.testing.assert_close(result.model.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-4)


def copier(*groups: int, metric="params", **options) -> Copier:
    model = net(*groups)
    sizes = count(model, batch()[0][:1])
    given = {"share": 0.125, "ignore": (), "form": "auto", "loss": cross_entropy} | options
    return Copier(model, [batch()], Sizes(sizes.params, sizes.macs), metric, **given)


def test_the_best_offer_is_the_best_of_all_asked_afresh():
    lazy = copier(1, 1, 1)
    assert len(lazy.free) == 4
    for _ in range(12):
        best = lazy.best()
        everything = [offer for name in lazy.free if (offer := lazy._offer(name)) is not None]
        assert best.rate == max(offer.rate for offer in everything)
        lazy.take(best)
    sizes = lazy._size(lazy.copies)
    assert (sizes.params, sizes.macs) == (lazy.sizes.params, lazy.sizes.macs)


@pytest.mark.parametrize("target", [14_000, 20_000, 30_000])
def test_one_order_over_both_moves(target):
    """Afterwards, asked afresh and slowly: no merge that is left and fits gains more than a copy that was taken."""
    model = net(2, 6, 3)
    record = grow(model, target_params=target).record
    copies = [step for step in record.details["steps"] if step["move"] == "widen"]
    done = {edit.module: edit.to for edit in record.plan.edits if isinstance(edit, Regroup)}
    scores = {cell["name"]: cell["score"] for cell in record.details["cells"]}
    for name, block in model.blocks.named_children():
        groups = done.get(f"blocks.{name}.mix", block.mix.groups)
        if groups == 1:
            continue
        added = block.mix.weight.numel() * block.mix.groups // groups
        added *= next(f for f in range(2, groups + 1) if groups % f == 0) - 1
        rate, size = scores[f"blocks.{name}"] / added, record.before["params"]
        size += sum(step["added"] for step in record.details["steps"] if step["move"] == "regroup")
        for step in copies[:-1]:
            assert step["gain"] / step["added"] > rate or size + added > target, (name, step)
            size += step["added"]


def test_multiply_adds_are_counted_as_they_turn_out():
    result = grow(net(), target_macs=5_000_000)
    assert result.record.after["macs"] >= 5_000_000
    assert result.record.after["macs"] == count(result.model, batch()[0][:1]).macs
    assert result.record.details["steps"][-1]["macs"] == result.record.after["macs"]


def test_the_last_step_copies_no_more_than_is_needed():
    """A whole step of half of all units would lead far past the target."""
    result = grow(net(), target_params=30_000, share=0.5)
    last = result.record.details["steps"][-1]
    assert last["move"] == "widen"
    chosen = copier(share=0.5)
    units = {row["name"]: row["units_before"] for row in result.record.details["couplings"]}
    assert result.record.details["distance"] < last["added"]
    assert chosen.best().step.added > last["added"] / units[last["name"]]


def test_without_couplings_merges_do_it_alone_and_may_lead_past_the_target():
    result = grow(net(), target_params=10_000, ignore=["*"])
    assert {type(edit) for edit in result.record.plan.edits} == {Regroup}
    assert result.record.details["couplings"] == []
    assert result.record.after["params"] >= 10_000


def test_where_no_unit_can_be_copied_at_first_merges_open_the_way():
    """Groups of 5 and of 3 on one stream: no block of it can be copied until they are merged."""
    model = net(6, 6, 10)
    for block in model.blocks:
        block.point = nn.Identity()  # what a block makes goes onto the stream as it is
    assert Copier(model, [batch()], Sizes(0, 0), "params", 0.125, (), "auto", cross_entropy).best() is None
    result = grow(model, target_params=30_000)
    moves = [step["move"] for step in result.record.details["steps"]]
    assert moves == sorted(moves)
    assert set(moves) == {"regroup", "widen"}
    assert all(check.passed for check in result.record.checks)


def test_without_groups_copies_do_it_alone():
    model = randomise(
        nn.Sequential(nn.Conv2d(3, 13, 3), nn.ReLU(), nn.Conv2d(13, 7, 3), nn.Flatten(), nn.Linear(441, 7))
    )
    result = grow_by_gain(model.double(), batch(), target_params=6_000, batch_size=4, probe_batches=2)
    assert {type(edit) for edit in result.record.plan.edits} == {Resize}
    assert result.record.checks[0].passed
    assert result.record.options["probe_batches"] == 2


class WithHead(nn.Module):
    """A head that only training uses."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 11, 3)
        self.head = nn.Linear(11, 7)
        self.extra = nn.Sequential(nn.Linear(11, 13), nn.ReLU(), nn.Linear(13, 7))

    def forward(self, x):
        x = torch.relu(self.body(x)).mean((2, 3))
        return (self.head(x), self.extra(x)) if self.training else self.head(x)


def test_what_evaluation_does_not_run_is_left():
    result = grow(randomise(WithHead()).double(), target_params=700)
    left = {item["name"]: item["reason"] for item in result.record.details["left"]}
    assert left == {"extra.0.weight[0]": "does not run in evaluation mode"}


def test_unit_rows_count_positions_as_units():
    model = randomise(nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 9 * 11, 7)))
    couplings = morph.analyse(model, BATCH[0][:2]).couplings.values()
    plan = morph.widen(model, BATCH[0][:2], ratio=1.4).record.plan
    assert unit_rows(couplings, plan, {"0.weight[0]"}) == [{"name": "0.weight[0]", "units_before": 5, "units_after": 7}]
    assert unit_rows(couplings, plan, ())[0]["units_after"] == 5


def test_positions_inside_copied_groups_are_not_said_to_be_copied():
    result = grow(net(), target_params=8_500, at=["blocks.0"])
    rows = {r["name"]: (r["units_before"], r["units_after"]) for r in result.record.details["couplings"]}
    assert rows["stem.weight[0]#1"] == (6, 7)
    assert all(before == after for name, (before, after) in rows.items() if name != "stem.weight[0]#1")
    assert "positions" in {r["name"]: r["reason"] for r in result.record.details["left"]}["stem.weight[0]"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target_params": 100}, TargetError, r"the target of 100 params is not above the 8,167 that the model has"),
        ({"target_macs": 5}, TargetError, r"the target of 5 macs is not above the [\d,]+ that the model has"),
        (
            {"target_params": 1e9},
            TargetError,
            r"the target of 1,000,000,000 params is out of reach: .* 8 times as wide",
        ),
        ({"target_params": 1e9, "ignore": ["*"]}, TargetError, "is out of reach: .* 0 couplings"),
        ({}, TargetError, "give one target"),
        (
            {"target_params": 9e3, "share": 0},
            TargetError,
            r"share must be in \(0, 1\] and probe_batches at least 1, got 0",
        ),
        ({"target_params": 9e3, "probe_batches": 0}, TargetError, "probe_batches at least 1, got 0.125 and 0"),
    ],
)
def test_refusals(options, error, message):
    with pytest.raises(error, match=message):
        grow(net(), **options)


def test_nothing_to_grow():
    model = randomise(nn.Sequential(nn.Flatten(), nn.Linear(429, 7))).double()
    with pytest.raises(NothingToGrowError, match="neither groups that can be merged nor units that can be copied"):
        grow(model, target_params=1e5, at=["1"])


def test_scores_that_are_zero():
    model = net()
    nn.init.zeros_(model.head.weight)
    with pytest.raises(
        ProbeError, match="every Fisher score is 0, so nothing ranks what to grow; train the model first"
    ):
        grow(model, target_params=30_000)
