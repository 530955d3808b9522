"""A cut copy without data that is led the way of a run with data: the same way with the new sizes, or none."""

from __future__ import annotations

import pytest
import torch
from test_following import cut_of
from torch import Tensor, nn

import morph.fitting
from morph.analysis import analyse
from morph.analysis.answering import OnProcessor, alike
from morph.analysis.following import follows
from morph.analysis.recording import Kept, Value, named_modules, put_back
from morph.fitting import Fitter
from morph.pruning import prune
from morph.resizing import resize_own

WIDTH = 13  # a prime, and no other size in these networks


def plain(net: Finds, x: Tensor) -> Tensor:
    return x


def other_way_by_width(net: Finds, x: Tensor) -> Tensor:
    return torch.tanh(x) if x.shape[1] != WIDTH else x


def other_way_by_kept_width(net: Finds, x: Tensor) -> Tensor:
    return torch.tanh(x) if net.width != WIDTH else x


def other_way_by_both(net: Finds, x: Tensor) -> Tensor:
    return torch.tanh(x) if x.sum().item() < float("inf") and x.shape[1] != WIDTH else x


def other_number_by_width(net: Finds, x: Tensor) -> Tensor:
    return x * (1 / x.shape[1])


def other_constant_by_width(net: Finds, x: Tensor) -> Tensor:
    return x * torch.tensor([float(x.shape[1])], device=x.device)


def other_number_of_rounds(net: Finds, x: Tensor) -> Tensor:
    for _ in range(x.shape[1]):
        x = torch.relu(x)
    return x


def other_rows_by_width(net: Finds, x: Tensor) -> Tensor:
    return torch.cat([x, x[: x.shape[1] - WIDTH or None]])


def other_operator_by_width(net: Finds, x: Tensor) -> Tensor:
    return torch.tanh(x) if x.shape[1] != WIDTH else torch.relu(x)


def swallowed_difference(net: Finds, x: Tensor) -> Tensor:
    try:
        return torch.tanh(x) if x.shape[1] != WIDTH else torch.relu(x)
    except Exception:
        return torch.relu(x)


def swallowed_error(net: Finds, x: Tensor) -> Tensor:
    try:
        return x + torch.zeros(WIDTH, device=x.device)
    except Exception:
        return x + 0.0


def width_through_data(net: Finds, x: Tensor) -> Tensor:
    return x * float(torch.tensor(x.shape[1]).item())


def values_written_into_data(net: Finds, x: Tensor) -> Tensor:
    table = torch.arange(2.0)
    table[0] = x.abs().sum()
    return torch.tanh(x) if table[0].item() == 0 else x


def read_past_torch(net: Finds, x: Tensor) -> Tensor:
    return torch.tanh(x) if x.sum(1).tolist()[0] == 7.5 else x


def masked_rows(net: Finds, x: Tensor) -> Tensor:
    return x[x[:, :1].flatten() < float("inf")]


REFUSED = [
    other_way_by_width,
    other_way_by_both,
    other_number_by_width,
    other_constant_by_width,
    other_number_of_rounds,
    other_rows_by_width,
    other_operator_by_width,
    swallowed_difference,
    swallowed_error,
    width_through_data,
]
NEVER = [values_written_into_data, read_past_torch, masked_rows]  # cut or not, but by data


class Finds(nn.Module):
    """Rows for the places that score high: how many depends on values, how long they are on a width."""

    def __init__(self, step=plain) -> None:
        super().__init__()
        self.body, self.score, self.head = nn.Conv2d(3, WIDTH, 3), nn.Conv2d(WIDTH, 1, 1), nn.Linear(WIDTH, 5)
        self.step, self.width = step, WIDTH

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.body(images))
        found = []
        mean = torch.as_tensor([0.25], dtype=x.dtype, device=x.device)
        for scores, feature in zip(self.score(x), x, strict=True):
            rows, columns = torch.where(scores[0] + mean >= scores.mean())
            kept = torch.zeros(len(rows), dtype=torch.bool, device=x.device)
            kept[: max(1, len(rows) // 2)] = True
            made = torch.zeros((len(rows), len(feature)), device=x.device)
            made[:] = feature[:, rows, columns].T
            limit = rows[kept].max().item() if x.is_cpu and x.device.type == "cpu" and not x.is_meta else 0
            found.append(self.step(self, made)[:, :] / (1.5 + limit))
        return self.head(torch.cat(found).to(x.device).cpu()).sum(0, keepdim=True)


def case(step, seed=0, batch=2):
    torch.manual_seed(seed)
    return Finds(step).eval(), torch.randn(batch, 3, 11, 9)


def led(model, inputs, seed=0, **attributes):
    """Whether the cut copy without data goes the way that was recorded."""
    analysis, edits, times = cut_of(model, inputs, seed)
    fitter, recording = Fitter(model, inputs, analysis), analysis.recording
    assert recording.traced == "data"
    assert edits
    skeleton = recording.skeleton
    with put_back(Kept(named_modules(skeleton))):
        resize_own(skeleton, edits)
        vars(skeleton).update(attributes)
        found = follows(skeleton, inputs, recording, lambda v: fitter.shape(v, times))
    return found


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("seed", range(3))
def test_the_same_way_with_new_widths_is_let_through(seed, batch):
    assert led(*case(plain, seed, batch), seed)


@pytest.mark.parametrize("step", REFUSED, ids=lambda step: step.__name__)
def test_another_way_or_number_is_not_let_through(step):
    model, inputs = case(step)
    assert not led(model, inputs)
    recording = analyse(model, inputs).recording
    assert follows(recording.skeleton, inputs, recording, lambda v: v.shape)  # it is the cut that is refused


@pytest.mark.parametrize("step", NEVER, ids=lambda step: step.__name__)
def test_where_data_would_go_missing_there_is_no_answer(step):
    assert not led(*case(step))


def test_another_way_by_an_attribute_is_not_let_through():
    assert led(*case(other_way_by_kept_width))
    assert not led(*case(other_way_by_kept_width), width=6)


def test_a_constant_made_anew_is_compared():
    def step(net: Finds, x: Tensor) -> Tensor:
        return x * torch.tensor([net.width, 2.0], device=x.device).sum()

    assert led(*case(step))
    assert not led(*case(step), width=17)


@pytest.mark.parametrize("step", [plain, other_way_by_kept_width, *REFUSED, *NEVER], ids=lambda step: step.__name__)
@pytest.mark.parametrize("seed", range(2))
def test_the_way_without_data_decides_what_the_way_with_data_decides(step, seed, monkeypatch):
    model, inputs = case(step, seed)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    short = prune(model, inputs, ratio=0.5, verify=False, score="random", seed=seed)
    monkeypatch.setattr(morph.fitting, "follows", lambda *_: False)
    long = prune(model, inputs, ratio=0.5, verify=False, score="random", seed=seed)
    assert short.record.details["traced"] == "data"
    assert short.record.plan == long.record.plan
    assert short.record.details == long.record.details
    pairs = zip(short.model.state_dict().values(), long.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_with_data_at_once_there_is_nothing_to_lead():
    recording = analyse(*case(plain), with_data=True).recording
    assert recording.traced == "data"
    assert recording.skeleton is None


class Turns(nn.Module):
    """Goes a way with a fixed width if values are small, as they are once some of it is cut."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.body, self.head, self.limit = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 5), limit

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x).exp()
        if x.sum().item() < self.limit:
            if x.shape[-1] != WIDTH:
                raise LookupError("what is written here is for another width")
            x = x * 2.0
        return self.head(x)


def test_a_way_that_only_the_cut_model_goes_is_found_by_the_check():
    torch.manual_seed(0)
    inputs, model = torch.randn(4, 3), Turns(0.0)
    model.limit = model.body(inputs).exp().sum().item() - 0.1
    result = prune(model, inputs, ratio=0.5)
    assert all(check.passed for check in result.record.checks)
    assert result.model(inputs).isfinite().all()


def test_what_is_alike():
    value = Value(0, (2, 3), form=(torch.float32, (3, 1)))
    same = torch.zeros(2, 3, device="meta")
    assert alike((value, [value, 1, None], {"a": 2.5}), (same, [same, 1, None], {"a": 2.5}))
    for other in (same.double(), same[:, :2], same[None], 1, None):
        assert not alike(value, other)
    assert not alike([value], [same, same])
    assert not alike({"a": 1}, {"b": 1})
    assert not alike((1, 2), (1, 3))
    assert not alike(None, 0)
    assert not alike(Value(0, (2, 3)), same)  # of a run without data


def test_tensors_without_data_pass_for_those_of_the_processor():
    x, data = torch.empty(2, device="meta"), torch.zeros(2)
    with OnProcessor():
        assert x.device == torch.device("cpu")
        assert x.is_cpu
        assert not x.is_meta
        assert x.cpu() is x
        assert x.to(x.device) is x
        assert x.to(device="cpu", dtype=torch.float32) is x
        assert data.to(x.device) is data
        made = torch.zeros(2, device=x.device)
        number = torch.tensor([1.5], device=x.device)
    assert made.is_meta
    assert number.tolist() == [1.5]


class FindsNothing(nn.Module):
    """Joins tensors without elements, alone and to others, as detection does where it has found nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        nothing = torch.cat([torch.zeros(0), torch.zeros(0)])
        return self.head(torch.cat([self.body(x), nothing])) + nothing.sum()


def test_tensors_without_elements_are_joined():
    torch.manual_seed(0)
    result = prune(FindsNothing(), torch.randn(4, 3), ratio=0.5)
    assert result.model.body.out_features < WIDTH
    assert all(check.passed for check in result.record.checks)
