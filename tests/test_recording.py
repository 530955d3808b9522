"""What is written down of a run: every operator, where it was called, and what happens when a run is not possible."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from analysis_nets import NETS, draw, make
from analysis_support import gap, run
from models import Snapshot
from torch import Tensor, nn

from morph.analysis import analyse
from morph.analysis.recorder import record, rerun
from morph.analysis.recording import arguments_of, named_tensors, skeleton, tensors_of, without_data
from morph.analysis.tags import values_in
from morph.errors import TraceError
from morph.pruning import prune
from morph.zeroing import run_doubled, run_zeroed


@pytest.mark.parametrize("name", NETS)
def test_the_calls_written_down_are_all_that_the_model_does(name):
    """Executed with data, the recording gives what the model gives."""
    model, inputs = make(name)
    state = analyse(model, inputs).state
    again = run_zeroed(state, model, inputs, np.ones(state.atoms.count, np.int64))
    assert gap(run(model, inputs), again) < 1e-12
    assert gap(run(model, inputs), run_doubled(model, inputs)) < 1e-12


def test_a_call_knows_its_module_and_the_users_line():
    model, inputs = make("transformer")
    recording = record(model, inputs)
    assert recording.traced == "shapes"
    assert {c.module for c in recording.calls} >= {"", "table", "ln1", "heads", "heads.q", "heads.o", "up", "out"}
    soft = next(c for c in recording.calls if "softmax" in str(c.target))
    assert soft.module == "heads"
    assert re.search(r"analysis_nets\.py:\d+, in forward$", soft.where)
    plain = record(nn.Sequential(nn.Linear(5, 3)), draw(2, 5).float())
    assert [c.where for c in plain.calls if "linear" in str(c.target)] == [""]


def test_values_carry_shapes_and_names_but_no_data():
    model, inputs = make("odd")
    recording = record(model, inputs)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert {n: v.shape for n, v in recording.sources.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    assert all(recording.values[v.number] is v for v in recording.values)
    assert [v.floating for n, v in recording.sources.items() if n in ("levels", "phase", "steps")] == [False] * 3
    assert [v.shape for v in recording.inputs] == [tuple(inputs.shape)]
    assert [v.shape for v in recording.outputs] == [(3, 5)]
    assert all(v.data is None for c in recording.calls for v in values_in((c.args, c.output)))


def test_an_operator_in_place_gives_back_its_argument():
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(5, 7)

        def forward(self, x: Tensor) -> Tensor:
            y = self.one(x)
            y.mul_(2)
            return torch.relu_(y)

    recording = record(InPlace(), torch.randn(2, 5))
    written = [c for c in recording.calls if str(c.target).startswith(("aten.mul_", "aten.relu_"))]
    assert len(written) == 2
    assert all(c.output is c.args[0] for c in written)
    assert recording.outputs == [written[0].output]


def test_tensors_are_listed_once_by_their_first_name():
    model, inputs = make("tied")
    names = [n for n, _ in named_tensors(model)]
    assert "table.weight" in names
    assert "head.weight" not in names
    assert list(record(model, inputs).sources) == names


def test_parameters_that_share_memory_in_another_form_stay():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(5, 7), nn.Linear(7, 5)
            self.two.weight = nn.Parameter(self.one.weight.detach().t())

        def forward(self, x: Tensor) -> Tensor:
            return self.two(torch.relu(self.one(x)))

    analysis = analyse(Shared(), torch.randn(2, 5))
    assert not analysis.couplings
    assert any(f.reason == "shares its memory with another tensor" for f in analysis.frozen)


def test_arguments_and_tensors():
    x, y = torch.zeros(1), torch.ones(2)
    assert arguments_of(x) == ((x,), {})
    assert arguments_of((x, 3)) == ((x, 3), {})
    assert arguments_of({"a": y}) == ((), {"a": y})
    assert [t is u for t, u in zip(tensors_of({"a": [x, (y, 3)]}), (x, y), strict=True)] == [True, True]


def test_a_skeleton_has_no_data_and_shares_nothing():
    model, _ = make("odd")
    model.train()
    snapshot = Snapshot(model)
    bare = skeleton(model)
    assert all(p.device.type == "meta" for p in bare.parameters() if p.is_floating_point())
    assert bare.steps.device.type == "cpu"
    assert bare.steps == 3
    assert bare.steps is not model.steps
    assert not bare.training
    assert snapshot.same()
    assert without_data(torch.arange(3)).tolist() == [0, 1, 2]


# ---- runs that need data


class Looks(nn.Module):
    """Control flow that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(5, 7), nn.Linear(7, 11), nn.Linear(11, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.sigmoid(self.one(x))
        if y.sum() > 0:
            y = torch.sigmoid(self.two(y))
        return self.three(y)


def test_a_model_that_looks_at_values_is_run_with_data():
    model, inputs = Looks(), torch.randn(4, 5)
    snapshot = Snapshot(model)
    analysis = analyse(model, inputs)
    assert analysis.traced == "data"
    assert sorted(c.units for c in analysis.couplings.values()) == [7, 11]
    assert snapshot.same()


def test_a_model_that_looks_at_values_but_has_none_is_refused_with_its_line():
    with torch.device("meta"):
        model = Looks()
    with pytest.raises(
        TraceError, match=r"Looks does not accept inputs of shape \[4, 5\]: .*test_recording\.py:\d+, in"
    ):
        analyse(model, torch.randn(4, 5))


def test_constants_made_on_the_device_of_the_input_have_their_data():
    class Ramp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(5, 7), nn.Linear(7, 3)

        def forward(self, x: Tensor) -> Tensor:
            ramp = torch.tensor([1.0, 2, 3, 4, 5], device=x.device, dtype=x.dtype)
            return self.two(torch.sigmoid(self.one(x * ramp)))

    model, inputs = Ramp().double(), draw(3, 5)
    state = analyse(model, inputs).state
    again = run_zeroed(state, model, inputs, np.ones(state.atoms.count, np.int64))
    assert gap(run(model, inputs), again) < 1e-12


# ---- hooks and refusals


def test_hooks_of_the_model_run_and_stay():
    model, inputs = make("mlp")
    seen: list[str] = []
    model[0].register_forward_hook(lambda *_: seen.append("after"))
    model[3].register_forward_pre_hook(lambda *_: seen.append("before"))
    model[3].register_full_backward_hook(lambda *_: None)
    snapshot = Snapshot(model)
    result = prune(model, inputs, ratio=0.3)
    assert seen
    assert snapshot.same()
    seen.clear()
    result.model(inputs)
    assert seen == ["after", "before"]


def test_a_hook_that_changes_an_output_is_part_of_the_run():
    model, inputs = make("mlp")
    model[0].register_forward_hook(lambda _, __, output: output.flip(1))
    assert [c.units for c in analyse(model, inputs).couplings.values()] == [7]


def test_inputs_of_the_wrong_shape_are_refused_with_the_line():
    model, _ = make("chain")
    with pytest.raises(
        TraceError, match=r"Chain does not accept inputs of shape \[2, 4, 7, 5\]: .*analysis_nets\.py:\d+"
    ):
        analyse(model, draw(2, 4, 7, 5))
    with pytest.raises(TraceError, match="give inputs of the shape it was made for"):
        analyse(model, (draw(2, 3, 7, 5), draw(1)))
    with pytest.raises(
        TraceError, match=r"Linear does not accept inputs of shape \[2, 7\]: .*shapes cannot be multiplied"
    ):
        analyse(nn.Linear(5, 3), torch.randn(2, 7))


def test_lazy_modules_are_refused():
    model = nn.Sequential(nn.LazyLinear(7), nn.ReLU(), nn.LazyLinear(3))
    with pytest.raises(TraceError, match=r"0 \(LazyLinear\) has no shape for weight yet"):
        analyse(model, torch.randn(2, 5))
    model(torch.randn(2, 5))
    assert [c.units for c in analyse(model, torch.randn(2, 5)).couplings.values()] == [7]


class Uncopyable(nn.Linear):
    def __deepcopy__(self, memo: dict[int, object]) -> nn.Module:
        raise RuntimeError("holds a file.\nAnd more.")


def test_a_model_that_cannot_be_copied_is_refused():
    with pytest.raises(TraceError, match=r"Uncopyable cannot be copied: holds a file"):
        skeleton(Uncopyable(5, 3))
    with pytest.raises(TraceError, match="holds a file"):
        analyse(Uncopyable(5, 3), torch.randn(2, 5))


def test_results_that_a_run_with_gradients_left_are_named():
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.cache = nn.Linear(3, 4), {}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.cache.setdefault(str(x.device), self.layer.weight.exp()).T

    model, x = nn.Sequential(Caching()), torch.randn(2, 3)
    model(x)
    with pytest.raises(TraceError, match=r"0 \(Caching\) keeps results of a run with gradients in cache .*: empty it"):
        analyse(model, x)
    model[0].cache.clear()
    with torch.no_grad():
        model(x)
    assert analyse(model, x).recording.calls


def test_a_run_that_breaks_off_says_where():
    model, inputs = make("mlp")
    broken = skeleton(model)
    broken[3] = nn.Linear(10, 7).to("meta").double()
    recording, path, error = rerun(broken, inputs, "shapes")
    assert path == "3"
    assert isinstance(error, RuntimeError)
    assert len(recording.calls) >= 3
    whole, path, error = rerun(skeleton(model), inputs, "shapes")
    assert (path, error) == ("", None)
    assert [c.target for c in whole.calls] == [c.target for c in record(model, inputs).calls]
