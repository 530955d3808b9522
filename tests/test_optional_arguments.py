"""Arguments that may be None: a tracer takes them for given, so that a graph of a model without them is another."""

from __future__ import annotations

import pytest
import torch
from analysis_support import gap, run
from gate_support import outputs, shut
from models import randomise
from torch import Tensor, nn

import morph
from morph.errors import MorphError


class Optional(nn.Module):
    """Does more where it is given a scale, and looks at nothing else of it; ``unused`` it never looks at."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.first, self.last = kind, nn.Linear(7, 13), nn.Linear(13, 5)

    def forward(self, x: Tensor, scale: Tensor | None = None, unused: Tensor | None = None) -> Tensor:
        x = torch.relu(self.first(x))
        y = x.view(-1)
        y *= 2  # which a graph must do in place
        if self.kind == "asked for" and scale is not None:
            x = x * 3 - 1
        return self.last(x)


@pytest.mark.parametrize("kind", ["asked for", "never"])
@pytest.mark.parametrize("given", [True, False])
def test_a_graph_does_what_the_code_does_with_these_inputs_or_is_refused(kind, given):
    model, x = randomise(Optional(kind).double()).eval(), torch.randn(3, 7, dtype=torch.float64)
    inputs = (x, torch.ones(3)) if given else x
    if kind == "asked for" and not given:
        for refused in (morph.prune, morph.widen):
            with pytest.raises(MorphError, match="does something else where scale, unused is None"):
                refused(model, inputs, ratio=0.5 if refused is morph.prune else 2.0, form="graph", verify=False)
    else:
        wide = morph.widen(model, inputs, ratio=1.5, form="graph", verify=False)
        assert gap(run(model, inputs), run(wide.model, inputs)) < 1e-12
    gated = morph.gate(model, inputs)
    assert gap(outputs(model, inputs), outputs(gated.model, inputs)) < 1e-12
    shut(gated, 0.5, 1)
    assert gap(outputs(gated.model, inputs), outputs(gated.remove().model, inputs)) < 1e-12


@pytest.mark.parametrize("kind", ["asked for", "never"])
def test_an_opened_network_asks_for_what_its_code_asked_for(kind, tmp_path):
    model, x, scale = randomise(Optional(kind)).eval(), torch.randn(3, 7), torch.ones(3)
    morph.save_model(model, tmp_path / "model.pt")
    opened = morph.open_model(tmp_path / "model.pt").model
    assert torch.equal(opened(x, scale), model(x, scale))
    assert torch.equal(opened(x, scale=scale), model(x, scale))
    if kind == "never":
        assert torch.equal(opened(x), model(x))
    else:
        with pytest.raises(RuntimeError, match="scale"):
            opened(x)
