from __future__ import annotations

import copy
import warnings

import pytest
import torch
from models import Net, Snapshot, images, randomise
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from morph.cut import apply_plan
from morph.errors import EditError, PlanMismatchError
from morph.passes.regroup import merge_groups
from morph.plan import Deepen, Plan, Record, Regroup, Reinitialise, Resize, SetAttribute, Substitute
from morph.states import carry_model, move_scheduler, transplant
from morph.widening import widen

INDEX = (0, 1, 2, 3, 4, 1, 3, 3)  # hidden units of the wide net: 1 twice, 3 three times
COPIES = torch.tensor([1, 2, 1, 3, 1, 2, 3, 3], dtype=torch.float64)
WIDEN = Plan(
    (
        Resize("0.weight", 0, 5, INDEX),
        Resize("1.weight", 0, 5, INDEX),
        Resize("1.bias", 0, 5, INDEX),
        Resize("1.running_mean", 0, 5, INDEX),
        Resize("1.running_var", 0, 5, INDEX),
        Resize("3.weight", 1, 5, INDEX, tuple((1 / COPIES).tolist())),
    )
)
TWICE = Plan(
    tuple(
        Resize(e.tensor, e.axis, 5, (0, 1, 2, 3, 4, 4, 3, 2, 1, 0), (0.5,) * 10 if e.scale else ())
        for e in WIDEN.edits
        if isinstance(e, Resize)
    )
)


def small() -> nn.Module:
    net = nn.Sequential(nn.Linear(7, 5, bias=False), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    return randomise(net).double()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, classes: int = 3) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(11, 7, generator=generator, dtype=torch.float64)
        y = torch.randint(0, classes, (11,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


MAKERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.0, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.0, weight_decay=0.0),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.0, eps=1e-30),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.0),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.0),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.0),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.0, eps=1e-30),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.0, momentum=0.9, centered=True, eps=1e-30),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.0, t0=0),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.0),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_the_state_is_that_of_an_optimizer_that_saw_the_wide_net_from_the_start(kind):
    """At a rate of zero the weights stay, so both nets see the same function at each of five steps."""
    narrow = small()
    plan = TWICE if kind == "adafactor" else WIDEN  # it keeps means over axes, so the copies must be equally many
    wide = apply_plan(narrow, plan)
    old, expected = MAKERS[kind](narrow.parameters()), MAKERS[kind](wide.parameters())
    train(narrow, old, 5)
    train(wide, expected, 5)
    carried = transplant(old, plan, before=narrow, after=wide)
    assert type(carried) is type(old)
    compared = 0
    for name, parameter in wide.named_parameters():
        for key, value in expected.state[parameter].items():
            got = carried.state[parameter][key]
            if isinstance(value, torch.Tensor):
                assert torch.allclose(got, value, rtol=1e-10, atol=1e-14), (name, key)
                assert got.shape == value.shape
                compared += int(value.numel() > 1 and bool(value.any()))
            else:
                assert got == value
    assert compared >= 5


def test_a_wrong_power_is_seen():
    narrow = small()
    wide = apply_plan(narrow, WIDEN)
    old, expected = MAKERS["adam"](narrow.parameters()), MAKERS["adam"](wide.parameters())
    train(narrow, old, 2)
    train(wide, expected, 2)
    plain = Plan(tuple(Resize(e.tensor, e.axis, e.size, e.index) for e in WIDEN.edits if isinstance(e, Resize)))
    wrong = transplant(old, plain, before=narrow, after=wide)
    weight = wide.get_parameter("3.weight")
    assert not torch.allclose(wrong.state[weight]["exp_avg"], expected.state[weight]["exp_avg"])


def test_training_goes_on_and_nothing_that_came_in_is_touched():
    narrow = small()
    optimizer = torch.optim.SGD(narrow.parameters(), lr=0.05, momentum=0.9)
    train(narrow, optimizer, 3)
    snapshot, state = Snapshot(narrow), copy.deepcopy(optimizer.state_dict())
    wide = apply_plan(narrow, WIDEN)
    new = transplant(optimizer, WIDEN, before=narrow, after=wide)
    assert snapshot.same()
    assert str(optimizer.state_dict()) == str(state)
    train(wide, new, 3)
    x = torch.randn(4, 7, dtype=torch.float64)
    assert torch.isfinite(wide(x)).all()
    assert new.state_dict()["state"][0]["momentum_buffer"].shape == (8, 7)
    rebuilt = torch.optim.SGD(wide.parameters(), lr=0.05, momentum=0.9)
    rebuilt.load_state_dict(new.state_dict())  # the order is that of the model
    assert torch.equal(rebuilt.state[wide[0].weight]["momentum_buffer"], new.state[wide[0].weight]["momentum_buffer"])


def test_removed_positions_take_their_state_with_them():
    net = small()
    keep = (0, 2, 4)
    plan = Plan(tuple(Resize(e.tensor, e.axis, 5, keep) for e in WIDEN.edits if isinstance(e, Resize)))
    optimizer = torch.optim.Adam(net.parameters())
    train(net, optimizer, 2)
    cut = apply_plan(net, plan)
    new = transplant(optimizer, plan, before=net, after=cut)
    old = optimizer.state[net[3].weight]["exp_avg_sq"]
    assert torch.equal(new.state[cut[3].weight]["exp_avg_sq"], old[:, [0, 2, 4]])
    assert torch.equal(new.state[cut[3].bias]["exp_avg"], optimizer.state[net[3].bias]["exp_avg"])
    assert new.state[cut[3].bias]["exp_avg"] is not optimizer.state[net[3].bias]["exp_avg"]
    assert float(new.state[cut[0].weight]["step"]) == 2


def test_a_position_with_no_weight_starts_from_zero():
    net = small()
    scale = (1.0, 1.0, 1.0, 1.0, 1.0, 0.0)
    plan = Plan((Resize("3.weight", 1, 5, (0, 1, 2, 3, 4, 1), scale),))
    after = copy.deepcopy(net)
    after[3] = nn.Linear(6, 3).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    train(net, optimizer, 1)
    new = transplant(optimizer, plan, before=net, after=after)
    momentum, old = new.state[after[3].weight]["momentum_buffer"], optimizer.state[net[3].weight]["momentum_buffer"]
    assert torch.equal(momentum[:, :5], old)
    assert not momentum[:, 5].any()


def conv_net(*, momentum: float = 0.9) -> tuple[nn.Module, torch.optim.Optimizer]:
    net = randomise(Net()).double()
    x, y = images()
    named = list(net.named_parameters())
    optimizer = torch.optim.SGD(
        [
            {"params": [p for n, p in named if n.startswith("head")], "lr": 0.02, "weight_decay": 0.01},
            {"params": [p for n, p in named if n.startswith("blocks")]},
        ],
        lr=0.03,
        momentum=momentum,
    )
    nn.functional.cross_entropy(net(x.double()), y).backward()
    optimizer.step()
    return net, optimizer


def test_merged_groups_and_groups_of_parameters():
    net, optimizer = conv_net()
    plan = Plan((Regroup("blocks.1.mix", 6, 2, (30, 5, 3, 3)),))
    grown = apply_plan(net, plan)
    record = Record("expand", {}, plan, {}, {}, ())
    new = transplant(optimizer, record, before=net, after=grown)
    old = optimizer.state[net.blocks[1].mix.weight]["momentum_buffer"]
    assert torch.equal(new.state[grown.blocks[1].mix.weight]["momentum_buffer"], merge_groups(old, 6, 2))
    names = {id(p): n for n, p in grown.named_parameters()}
    members = [{names[id(p)] for p in group["params"]} for group in new.param_groups]
    assert members[0] == {"head.weight", "head.bias"}
    assert members[1] == {n for n in names.values() if n.startswith("blocks")}  # the stem is still left out
    assert [g["lr"] for g in new.param_groups] == [0.02, 0.03]
    assert [g["weight_decay"] for g in new.param_groups] == [0.01, 0]


def test_split_groups_keep_the_state_inside_the_new_groups():
    net, _ = conv_net()
    merge = Plan((Regroup("blocks.1.mix", 6, 2, (30, 5, 3, 3)),))
    split = Plan((Regroup("blocks.1.mix", 2, 6, (30, 15, 3, 3)),))
    wide = apply_plan(net, merge)
    back = apply_plan(wide, split)
    optimizer = torch.optim.Adam(wide.parameters())
    x, y = images()
    nn.functional.cross_entropy(wide(x.double()), y).backward()
    optimizer.step()
    new = transplant(optimizer, split, before=wide, after=back)
    full = optimizer.state[wide.blocks[1].mix.weight]["exp_avg"]
    kept = new.state[back.blocks[1].mix.weight]["exp_avg"]
    assert kept.shape == (30, 5, 3, 3)
    assert torch.equal(merge_groups(kept, 6, 2), full * merge_groups(torch.ones_like(kept), 6, 2))


def test_a_fresh_draw_leaves_no_state():
    net, optimizer = conv_net()
    plan = Plan((Regroup("blocks.1.mix", 6, 3, (30, 5, 3, 3)), Reinitialise(3)))
    new = transplant(optimizer, plan, before=net, after=apply_plan(net, plan))
    assert not new.state
    assert len(new.param_groups) == 2


def test_blocks_in_between_move_the_names_and_copies_start_fresh():
    net, optimizer = conv_net()
    size = sum(p.numel() for p in net.blocks[1].parameters())
    plan = Plan((Deepen("blocks", ("1",), 2, ("1.point.weight", "1.point.bias"), 3, size),))
    deep = apply_plan(net, plan)
    new = transplant(optimizer, plan, before=net, after=deep)
    moved = new.state[deep.blocks[4].mix.weight]["momentum_buffer"]
    assert torch.equal(moved, optimizer.state[net.blocks[2].mix.weight]["momentum_buffer"])
    assert all(p not in new.state for i in (2, 3) for p in deep.blocks[i].parameters())
    second = {id(p) for p in new.param_groups[1]["params"]}
    assert all(id(p) in second for p in deep.blocks.parameters())
    later = Plan((*plan.edits, Resize("blocks.4.norm.weight", 0, 30, tuple(range(29)))))
    with pytest.raises(
        PlanMismatchError, match=r"1 of \d+ parameters differ \(blocks.4.norm.weight: plan gives \[29\]"
    ):
        transplant(optimizer, later, before=net, after=deep)


def test_a_block_in_the_place_of_a_convolution_joins_its_group():
    net, optimizer = conv_net()
    with torch.no_grad():
        merged = apply_plan(net, Plan((Regroup("blocks.1.mix", 6, 1, (30, 5, 3, 3)),)))
    optimizer = torch.optim.SGD(merged.parameters(), lr=0.1, momentum=0.9)
    x, y = images()
    nn.functional.cross_entropy(merged(x.double()), y).backward()
    optimizer.step()
    plan = Plan((Substitute("blocks.1.mix", "G5", (30, 30, 3, 3), 0),))
    cheap = apply_plan(merged, plan)
    new = transplant(optimizer, plan, before=merged, after=cheap)
    assert len(new.param_groups[0]["params"]) == len(list(cheap.parameters()))
    assert all(p not in new.state for p in cheap.blocks[1].mix.parameters())
    assert cheap.blocks[1].norm.weight in new.state


def test_tied_weights_have_one_state():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(13, 4), nn.Linear(4, 13, bias=False)
            self.head.weight = self.embed.weight

    net, after = Tied().double(), Tied().double()
    after.embed.weight = after.head.weight = nn.Parameter(torch.zeros(13, 3, dtype=torch.float64))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net.head.weight.grad = torch.randn_like(net.head.weight)
    optimizer.step()
    new = transplant(optimizer, Plan((Resize("head.weight", 1, 4, (0, 1, 3)),)), before=net, after=after)
    old = optimizer.state[net.embed.weight]["momentum_buffer"]
    assert torch.equal(new.state[after.embed.weight]["momentum_buffer"], old[:, [0, 1, 3]])


def test_options_names_and_flags_stay():
    net = small().float()
    optimizer = torch.optim.Adam(
        net.named_parameters(), lr=torch.tensor(0.01), betas=(0.8, 0.95), fused=True, maximize=True
    )
    net[0].weight.grad = torch.ones_like(net[0].weight)
    optimizer.step()
    wide = apply_plan(net, WIDEN)
    new = transplant(optimizer, WIDEN, before=net, after=wide)
    group = new.param_groups[0]
    assert group["param_names"] == [n for n, _ in wide.named_parameters()]
    assert (group["fused"], group["maximize"], group["betas"]) == (True, True, (0.8, 0.95))
    assert group["lr"] is not optimizer.param_groups[0]["lr"]
    wide[0].weight.grad = torch.ones_like(wide[0].weight)
    new.step()
    assert float(new.state[wide[0].weight]["step"]) == 2
    assert wide[3].bias not in new.state  # it had no gradient, so no state


def test_refusals():
    net, other = small(), small()
    wide = apply_plan(net, WIDEN)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(EditError, match="LBFGS keeps state that belongs to no single parameter"):
        transplant(torch.optim.LBFGS(net.parameters()), WIDEN, before=net, after=wide)
    with pytest.raises(
        EditError, match=r"5 of the 5 parameters of SGD are not in .*\(group 0, \[5, 7\]; .*give the mo"
    ):
        transplant(sgd, WIDEN, before=other, after=wide)
    with pytest.raises(EditError, match=r"\(0.weight, group 0"):
        transplant(torch.optim.SGD(net.named_parameters()), WIDEN, before=other, after=wide)
    with pytest.raises(PlanMismatchError, match=r"does not lead from the old model to the new one: 4 of 5 .*0.weight"):
        transplant(sgd, WIDEN, before=net, after=net)
    wide_sgd = torch.optim.SGD(wide.parameters(), lr=0.1)
    with pytest.raises(PlanMismatchError, match=r"4 of 4 edits do not fit \(0.weight: plan has size 5 .* applied alr"):
        transplant(wide_sgd, WIDEN, before=wide, after=wide)
    with pytest.raises(PlanMismatchError, match=r"absent.weight: plan has shape .* found no such tensor"):
        transplant(sgd, Plan((Regroup("absent", 4, 2, (8, 2, 3, 3)),)), before=net, after=wide)
    with pytest.raises(PlanMismatchError, match="children 8"):
        transplant(sgd, Plan((Deepen("", ("8",), 1, (), 4, 0),)), before=net, after=wide)
    deeper = copy.deepcopy(net).append(nn.Linear(3, 3))
    with pytest.raises(PlanMismatchError, match=r"4.weight: nothing in the plan makes it"):
        transplant(sgd, Plan(()), before=net, after=deeper)


def test_an_optimizer_that_cannot_be_built_again_or_keeps_odd_state():
    class Odd(torch.optim.SGD):
        def __init__(self, params, secret):
            super().__init__(params, lr=0.1)

    net = small()
    wide = apply_plan(net, WIDEN)
    with pytest.raises(EditError, match=r"Odd cannot be built again from its options \(.*secret"):
        transplant(Odd(net.parameters(), 1), WIDEN, before=net, after=wide)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    sgd.state[net[0].weight] = {"absmax": torch.zeros(3)}
    with pytest.raises(EditError, match=r"the state absmax of 0.weight has the shape \[3\] and the parameter \[5, 7\]"):
        transplant(sgd, WIDEN, before=net, after=wide)
    sgd.state[net[0].weight] = {"mine": torch.arange(35.0).reshape(5, 7), "count": 3}
    new = transplant(sgd, WIDEN, before=net, after=wide)
    assert torch.equal(new.state[wide[0].weight]["mine"], torch.arange(35.0).reshape(5, 7)[list(INDEX)])
    assert new.state[wide[0].weight]["count"] == 3


SCHEDULERS = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "step": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 11),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "onecycle": lambda o: lr_scheduler.OneCycleLR(o, [0.3, 0.2], total_steps=20),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3, mode="exp_range", gamma=0.9),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 5), lr_scheduler.StepLR(o, 2, 0.5)], [5]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 6), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
}


@pytest.mark.parametrize("steps", [0, 4])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_schedulers_go_on_where_they_were(kind, steps):
    net = small()

    def make() -> torch.optim.Optimizer:
        groups = [{"params": net[0].parameters()}, {"params": net[3].parameters(), "lr": 0.05}]
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)

    def run(optimizer, scheduler, n):
        rates = []
        for _ in range(n):
            optimizer.step()
            scheduler.step(*([1.0] if kind == "plateau" else []))
            rates.append([(g["lr"], g["momentum"]) for g in optimizer.param_groups])
        return rates

    alone = make()
    expected = run(alone, SCHEDULERS[kind](alone), 12)[steps:]
    old = make()
    scheduler = SCHEDULERS[kind](old)
    run(old, scheduler, steps)
    wide = apply_plan(net, WIDEN)
    new = transplant(old, WIDEN, before=net, after=wide)
    moved = move_scheduler(scheduler, new)
    held = [copy.deepcopy(g["lr"]) for g in old.param_groups]
    before = str({k: v for k, v in scheduler.state_dict().items() if k != "_schedulers"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "The epoch parameter")
        assert run(new, moved, 12 - steps) == expected
    assert [g["lr"] for g in old.param_groups] == held
    assert str({k: v for k, v in scheduler.state_dict().items() if k != "_schedulers"}) == before


def test_a_scheduler_of_other_groups_is_refused():
    net = small()
    one = torch.optim.SGD(net.parameters(), lr=0.1)
    two = torch.optim.SGD([{"params": net[0].parameters()}, {"params": net[3].parameters()}], lr=0.1)
    with pytest.raises(EditError, match="StepLR drives an optimizer of 1 groups, the new one has 2"):
        move_scheduler(lr_scheduler.StepLR(one, 2), two)


def test_a_moving_average_of_the_weights_follows():
    net = small().eval()
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        train(net, optimizer, 1)
        average.update_parameters(net)
    average.eval()
    snapshot = Snapshot(average)
    x = torch.randn(9, 7, dtype=torch.float64)
    wide_average, wide = carry_model(average, WIDEN), apply_plan(net, WIDEN)
    assert isinstance(wide_average, AveragedModel)
    assert snapshot.same()
    assert torch.allclose(wide_average(x), average(x), rtol=1e-12)
    assert int(wide_average.n_averaged) == 3
    wide_average.update_parameters(wide)
    average.update_parameters(net)
    expected = apply_plan(average.module, WIDEN).state_dict()
    assert all(torch.allclose(v, expected[k]) for k, v in wide_average.module.state_dict().items())
    assert torch.allclose(carry_model(net, Record("widen", {}, WIDEN, {}, {}, ()))(x), net(x))


def test_edits_of_sizes_and_of_buffers_change_no_state():
    net = small()
    plan = Plan((Resize("1.running_mean", 0, 5, (4, 3, 2, 1, 0)), SetAttribute("1", "num_features", 5, 5)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    train(net, optimizer, 1)
    new = transplant(optimizer, plan, before=net, after=apply_plan(net, plan))
    assert len(new.state) == 5


@pytest.mark.parametrize("form", ["class", "graph"])
def test_the_state_of_a_net_that_was_widened_unit_by_unit(form):
    """What `widen` decides, with a depthwise convolution, a residual sum and normalisation in the net."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 11, 3), nn.BatchNorm2d(11)
            self.deep, self.point = nn.Conv2d(11, 11, 3, padding=1, groups=11), nn.Conv2d(11, 13, 1)
            self.back, self.head = nn.Conv2d(13, 11, 1), nn.Linear(11, 7)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.norm(self.stem(x)))
            x = x + self.back(torch.relu(self.point(self.deep(x))))
            return self.head(x.mean((2, 3)))

    net = randomise(Residual()).double().eval()
    x, y = images()
    result = widen(net, x.double(), ratio=1.4, form=form)

    def first_step(model: nn.Module) -> torch.optim.Optimizer:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
        nn.functional.cross_entropy(model(x.double()), y).backward()
        optimizer.step()
        return optimizer

    new = transplant(first_step(net), result.record, before=net, after=result.model)
    expected = first_step(result.model)
    assert sum(p.numel() for p in result.model.parameters()) > sum(p.numel() for p in net.parameters())
    for name, parameter in result.model.named_parameters():
        for key, value in expected.state[parameter].items():
            assert torch.allclose(new.state[parameter][key], value, rtol=1e-9, atol=1e-14), (name, key)
