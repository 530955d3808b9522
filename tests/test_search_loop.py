"""The loop of the search on a net whose sizes are counted by hand."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics

import pytest
import torch
from gate_nets import CountedNet, GatedNet, PlainNet, alphas, samples
from lightning_fabric import Fabric
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from morph.apg import APG
from morph.errors import DataError, GateError, SearchError, SearchStateError, TargetError
from morph.search_budget import Flat, Meter, check_budget, close_in_order
from morph.search_loop import Search
from morph.search_options import SearchOptions
from morph.search_progress import Keep
from morph.search_schedule import (
    distances,
    floor_of,
    last_gates,
    learning_rate,
    least_penalty,
    order_of_closing,
    paced,
    wanted_size,
)

X, Y = samples(48)
FLAT = Flat({"gate": 5, "middle": 11})
FAST = SearchOptions(lambda2=0.3, gate_lr=0.05, lr=0.05, batch_size=10, epochs=40, count_every=3)


def search(options=FAST, data=(X, Y), target=50, keep=None, loss=None, seed=0, precision="32-true"):
    net = GatedNet(seed)
    meter = Meter(CountedNet(), FLAT, "macs")
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    return Search(
        net,
        PlainNet(seed),
        net.gates(),
        alphas(net),
        meter,
        target,
        data,
        options.make_loss(loss),
        options,
        fabric,
        keep,
    )


def by_name(found):
    return FLAT.split(found.closed)


@pytest.mark.parametrize("mode", ["kd-weighted", "kd", "np-weighted", "np"])
def test_it_stops_at_the_budget_and_not_far_below(mode):
    run = search(dataclasses.replace(FAST, mode=mode))
    told = []
    found = run.run(told.append)
    size = run.meter.size(found.closed)
    assert size <= 50
    assert 0 < int(found.closed.sum()) < 16
    assert found.step < run.steps
    assert [p.step for p in told] == list(range(3, found.step + 1, 3))
    assert all(p.gates_total == 16 and p.steps == 200 for p in told)
    assert (told[0].kl is None) == mode.startswith("np")
    assert (found.values == 0).eq(found.closed).all()
    assert [row["step"] for row in found.history] == [p.step for p in told]


def test_mixed_precision_leaves_the_gates_fine():
    run = search(precision="bf16-mixed")
    found = run.run()
    assert run.meter.size(found.closed) <= 50
    assert all(gate.dtype == torch.float32 for gate in run.apg.named().values())
    with pytest.raises(GateError, match="too coarse"):
        search(precision="bf16-true")


def test_gates_that_close_together_are_not_all_closed():
    """Equal gates without a pull would all close in the same step, far below the budget."""
    run = search(dataclasses.replace(FAST, mode="kd", lambda2=5.0, lr=1e-6, count_every=1), target=60)
    run.alpha = torch.ones(16)
    for group in run.apg.param_groups:
        for gate in group["params"]:
            run.apg.state[gate]["alpha"].fill_(1.0)
    found = run.run()
    assert found.reopened > 0
    assert 60 - 11 <= run.meter.size(found.closed) <= 60
    assert (found.values[~found.closed] != 0).all()


def test_the_time_is_kept_by_a_stronger_penalty():
    late = search(dataclasses.replace(FAST, lambda2=1e-6, epochs=30), target=30)
    found = late.run()
    assert late.meter.size(found.closed) <= 30
    assert found.step <= late.steps == 150
    values = [value for _, value in found.lambda2]
    assert len(values) > 1
    assert max(values) > 1e-6
    assert 2 * found.forced < int(found.closed.sum())


def test_without_need_the_penalty_stays():
    found = search(dataclasses.replace(FAST, lambda2=1.0)).run()
    assert found.lambda2 == [[0, 1.0]]


def test_the_size_comes_down_in_a_line():
    """Nothing is asked of the first tenth; the budget is to be met by four fifths."""
    sizes = [wanted_size(1000, 300, step, 200) for step in (0, 20, 55, 90, 160, 200)]
    assert sizes == pytest.approx([1000, 1000, 825, 650, 300, 300])


def test_the_penalty_follows_how_far_behind_the_size_is():
    assert paced(0.5, 0.2, 0.0, 0.1) == 0.5
    assert paced(0.5, 0.2, 0.01, 0.02) == pytest.approx(0.5 * math.exp(0.08))
    assert paced(0.5, 0.2, 9.0, 0.1) == pytest.approx(0.5 * math.exp(0.5))  # no faster, however far it is behind
    assert paced(0.5, 0.2, -0.05, 0.01) == pytest.approx(0.5 * math.exp(-0.2))
    assert paced(0.1, 0.2, 0.01, 0.02) == pytest.approx(0.2 * math.exp(0.08))
    assert paced(0.1, 0.2, -0.05, 0.02) == pytest.approx(0.1 * math.exp(-0.4))


def test_the_least_penalty_closes_the_costliest_gate_in_three_tenths_of_the_search():
    assert least_penalty(torch.tensor([0.2, 1.0]), 0.01, 0.9, 117_300) == pytest.approx(2.84e-4, rel=1e-2)
    net = GatedNet()
    alpha = alphas(net)
    apg = APG(net.gates(), 0.02, least_penalty(FLAT.join(alpha), 0.02, 0.9, 2000), alpha, clamp=True)
    step = 0
    while not FLAT.join(apg.closed()).any():
        step += 1
        for gate in net.gates().values():
            gate.weight.grad = torch.zeros_like(gate.weight)
        apg.step()
    assert 590 <= step <= 620


def test_small_steps_of_a_long_search_add_up():
    """A penalty that grows by less than a thousandth from look to look grows all the same, and is told sparingly."""
    run = search(dataclasses.replace(FAST, lambda2=1.0, count_every=1, epochs=20_000), target=87)
    nothing = torch.zeros(16, dtype=torch.bool)
    run.looked = run.found.step = run.steps // 2
    for _ in range(1000):
        run.found.step += 1
        run._adjust(torch.ones(16), nothing)
    assert run.lambda2 == pytest.approx(math.exp(20 * 1000 / run.steps), rel=1e-3)
    assert 10 < len(run.found.lambda2) < 30
    assert run.found.lambda2[-1][1] == pytest.approx(run.lambda2, rel=0.01)


@pytest.mark.parametrize(("steps", "lr", "most"), [(600, 0.5, 0.2), (1200, 0.5, 0.1), (20_000, 0.05, 0.1)])
def test_gates_that_the_loss_holds_close_along_the_line(steps, lr, most):
    """Each is held by a spring of its own; the size stays near the one that is wanted, and the weakest close."""
    springs = torch.logspace(-4, -1, 60)
    gate = nn.Parameter(torch.ones(60))
    apg = APG([gate], lr, 1e-6)
    least = least_penalty(torch.ones(60), lr, 0.9, steps)
    off, step = [], 0
    while (size := int((apg.sparse(gate) != 0).sum())) > 20 and step < steps:
        if step and step % 10 == 0:
            off.append((size - wanted_size(60, 20, step, steps)) / 40)
            apg.param_groups[0]["lambda2"] = paced(apg.param_groups[0]["lambda2"], least, off[-1], 10 / steps)
        gate.grad = springs * (gate.detach() - 1)
        apg.step()
        step += 1
    assert 0.7 * steps < step < 0.9 * steps
    assert statistics.mean(map(abs, off)) < most
    assert torch.equal(apg.sparse(gate) != 0, springs >= springs[40])


@pytest.mark.parametrize("seed", range(5))
def test_no_site_is_emptied_before_every_site_is_down_to_its_last_tenth(seed):
    """Closed in this order, each site keeps its floor until all have reached it; the obvious loop agrees."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 40, (6,), generator=draw).tolist()
    far = torch.randint(0, 9, (sum(lengths),), generator=draw) / 8  # many equal ones
    sites = torch.arange(6).repeat_interleave(torch.tensor(lengths))
    last = last_gates(far, lengths)
    wanted, rest = [], []
    for site, gates in enumerate(lengths):
        own = sorted((float(far[i]), i) for i in torch.nonzero(sites == site)[:, 0].tolist())
        wanted += own[: gates - max(1, round(gates / 10))]
        rest += own[gates - max(1, round(gates / 10)) :]
    assert order_of_closing(far, last).tolist() == [i for d, i in sorted(wanted) + sorted(rest) if d > 0]
    assert [int(last[sites == site].sum()) for site in range(6)] == [floor_of(gates) for gates in lengths]


def short(rounds: int, target: int) -> Search:
    """The costly gates come first: 5 in front of the first layer, then 11; ``a b + 3 b`` multiply-adds are left."""
    options = dataclasses.replace(FAST, lambda2=1e-6, epochs=rounds, batch_size=8, count_every=1, lr=1e-4)
    run = search(options, target=target)
    run.alpha = torch.tensor([1.0] * 5 + [0.1] * 11)
    run._weigh(None)
    return run


def left(run: Search) -> dict[str, int]:
    found = run.run()
    assert run.meter.size(found.closed) <= run.target
    return {name: int((~mask).sum()) for name, mask in by_name(found).items()}


@pytest.mark.parametrize("rounds", [1, 8])
def test_in_a_short_search_no_layer_is_emptied(rounds, monkeypatch):
    assert left(short(rounds, 14)) == {"gate": 1, "middle": 3}
    monkeypatch.setattr("morph.search_loop.last_gates", lambda far, _: torch.zeros(len(far), dtype=torch.bool))
    assert left(short(rounds, 14))["gate"] == 0


def test_a_raised_penalty_spares_the_last_gates_of_a_layer(monkeypatch):
    """They bear what the penalty was at first; without that the steep one takes them along."""
    run = short(8, 14)
    assert left(run)["gate"] == 1
    assert run.found.forced < int(run.found.closed.sum())  # the penalty itself closed some
    shares = torch.cat([run.apg.state[gate]["alpha"] for gate in run.apg.named().values()]) / run.alpha
    assert sorted({*shares.tolist()})[-1] == 1.0
    assert int((shares < 1e-3).sum()) == 2
    unspared = short(8, 14)
    monkeypatch.setattr(unspared, "_weigh", lambda _: None)
    assert left(unspared)["gate"] == 0


def test_what_cannot_be_met_otherwise_empties_a_layer_and_says_so():
    run = search(dataclasses.replace(FAST, lambda2=1e-6, epochs=1, lr=1e-4), target=3)
    assert min(left(run).values()) == 0


@pytest.mark.parametrize("kind", ["tensors", "loader", "list"])
@pytest.mark.parametrize("stop", [3, 11, 20])
def test_a_search_that_was_stopped_ends_as_one_that_was_not(tmp_path, kind, stop):
    def data():
        if kind == "tensors":
            return X, Y
        loader = DataLoader(TensorDataset(X, Y), batch_size=10, shuffle=True)
        return loader if kind == "loader" else list(DataLoader(TensorDataset(X, Y), batch_size=10))

    options = dataclasses.replace(FAST, lambda2=0.05, epochs=20)
    torch.manual_seed(5)
    whole = search(options, data()).run()
    keep = Keep(tmp_path / "state.pt", None, {"of": "this"})
    torch.manual_seed(6)
    calls = itertools.count(1)
    with pytest.raises(KeyboardInterrupt):
        search(options, data(), keep=keep).run(should_stop=lambda: next(calls) == stop)
    again = search(options, data(), keep=keep, seed=4)
    again.teacher.load_state_dict(PlainNet().state_dict())
    again.resume()
    assert again.found.step == stop
    assert torch.equal(again.alpha, FLAT.join(alphas(again.model)))
    found = again.run()
    assert torch.equal(found.closed, whole.closed)
    assert torch.equal(found.values, whole.values)
    assert found.history == whole.history
    assert found.lambda2 == whole.lambda2


def test_a_search_that_was_killed_goes_on_from_its_last_writing(tmp_path):
    options = dataclasses.replace(FAST, lambda2=0.05, epochs=20)
    whole = search(options).run()

    class KilledError(Exception):
        pass

    def die(progress):
        if progress.step > 20:
            raise KilledError

    keep = Keep(tmp_path / "state.pt", 7, {})
    with pytest.raises(KilledError):
        search(options, keep=keep).run(die)
    again = search(options, keep=keep)
    again.resume()
    assert again.found.step == 14
    assert torch.equal(again.run().values, whole.values)
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]


def test_a_loss_that_is_no_number_stops_it_and_the_last_good_state_stays(tmp_path):
    steps = itertools.count(1)

    def poisoned(student, teacher, labels):
        loss = F.cross_entropy(student, labels, reduction="none")
        return loss * float("nan") if next(steps) == 13 else loss

    keep = Keep(tmp_path / "state.pt", 5, {})
    run = search(dataclasses.replace(FAST, lambda2=0.0), keep=keep, loss=poisoned)
    with pytest.raises(SearchError, match=r"not a finite number after step 15.*last good state is in .*state\.pt"):
        run.run()
    again = search(dataclasses.replace(FAST, lambda2=0.0), keep=keep)
    again.resume()
    assert again.found.step == 10
    assert all(torch.isfinite(p).all() for p in again.model.parameters())


def test_a_loader_that_ends_early_keeps_the_state(tmp_path):
    class Short:
        def __len__(self):
            return 48

        def __init__(self):
            self.rounds = 0

        def batches(self, batch_size, seed):
            self.rounds += 1
            pairs = zip(X.split(batch_size), Y.split(batch_size), strict=True)
            yield from itertools.islice(pairs, 5 if self.rounds < 3 else 2)

    keep = Keep(tmp_path / "state.pt", None, {})
    with pytest.raises(DataError, match="ended early: round 3 gave 2 of 5 batches; the last good state"):
        search(dataclasses.replace(FAST, lambda2=0.0), Short(), keep=keep).run()
    again = search(keep=keep)
    again.resume()
    assert again.found.step == 12


def test_an_iterator_is_refused():
    with pytest.raises(DataError, match="does not say how long it is"):
        search(data=iter([(X, Y)]))


@pytest.mark.parametrize(
    ("content", "text"),
    [(b"", "not a checkpoint"), (b"rubbish", "not a checkpoint"), (None, "belongs to another search: of is 'that'")],
)
def test_checkpoints_that_are_none(tmp_path, content, text):
    path = tmp_path / "state.pt"
    if content is None:
        calls = itertools.count(1)
        with pytest.raises(KeyboardInterrupt):
            search(keep=Keep(path, None, {"of": "that"})).run(should_stop=lambda: next(calls) == 2)
    else:
        path.write_bytes(content)
    with pytest.raises(SearchStateError, match=text):
        search(keep=Keep(path, None, {"of": "this"})).resume()


def test_budgets_that_are_met_or_out_of_reach():
    meter = Meter(CountedNet(), FLAT, "macs")
    assert check_budget(meter, 87, "multiply-adds") == 88
    with pytest.raises(TargetError, match="the teacher has 88 multiply-adds, within the target of 88"):
        check_budget(meter, 88, "multiply-adds")
    with pytest.raises(TargetError, match=r"2 parameters are out of reach.*still has 3"):
        check_budget(Meter(CountedNet(), FLAT, "params"), 2, "parameters")


def test_as_few_gates_are_closed_in_order_as_will_do():
    meter = Meter(CountedNet(), FLAT, "macs")
    nothing = torch.zeros(16, dtype=torch.bool)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    for target in range(0, 89, 7):
        number = close_in_order(meter, nothing, order, target)
        slow = next(n for n in range(17) if meter.size(nothing.clone().index_fill_(0, order[:n], True)) <= target)
        assert number == slow
    assert close_in_order(meter, nothing, order[:2], 1) is None


def test_distances_and_rates():
    far = distances(torch.tensor([1.0, -0.5, 0.0, 1.0]), torch.tensor([0.5, 1.0, 1.0, 0.0]))
    assert far.tolist() == [2.0, 0.5, 0.0, float("inf")]
    assert order_of_closing(far, torch.zeros(4, dtype=torch.bool)).tolist() == [1, 0, 3]
    assert order_of_closing(far, torch.tensor([False, True, True, False])).tolist() == [0, 3, 1]
    rates = [learning_rate(0.1, step, 300) for step in (0, 149, 150, 254, 255, 299)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"mode": "best"}, "mode 'best'; expected one of kd-weighted"),
        ({"epochs": 0}, "epochs of 0"),
        ({"lr": -1.0}, "lr of -1"),
        ({"lambda2": float("inf")}, "lambda2 of inf; give a number of 0 or above, finite"),
        ({"momentum": 1.0}, "momentum of 1.0; give a number of at least 0 and below 1"),
        ({"tau": -1.0}, "temperature of -1"),
    ],
)
def test_options(wrong, text):
    with pytest.raises(TargetError, match=text):
        SearchOptions(**wrong)


def test_gates_take_longer_steps_in_a_shorter_search():
    """Steps times their length stay what they are in the paper, until steps would be too long."""
    options = SearchOptions()
    assert options.gate_step(300 * 391) == options.gate_step(10**7) == 0.01
    assert options.gate_step(30 * 391) == pytest.approx(0.1)
    assert options.gate_step(10) == 0.5
    assert SearchOptions(gate_lr=0.03).gate_step(10) == 0.03
    with pytest.raises(TargetError, match="gate_lr of 0"):
        SearchOptions(gate_lr=0.0)
