"""Score the cells of a model by the Fisher information of gates fixed at one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from morph.blocks import Cell
from morph.errors import ProbeError
from morph.inputs import Inputs, logits_in, run_on, samples_in
from morph.passes.probes import insert_probes, probes_of
from morph.tracing import Trace

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(outputs: Any, targets: Tensor) -> Tensor:
    """Cross-entropy of each sample: logits ``[N, K]``, alone or as ``logits`` of an output, and labels give ``[N]``.

    Raises:
        ProbeError: If the outputs are not logits of that shape, or a label is not one of the ``K`` classes.
    """
    logits = None if isinstance(outputs, tuple | list) else logits_in(outputs)
    if logits is None or logits.dim() != 2:
        got = type(outputs).__name__ if logits is None else list(logits.shape)
        raise ProbeError(
            f"the default loss needs logits of shape [N, classes], the model gives {got}; pass a loss of your own"
        )
    classes = logits.shape[1]
    if targets.dtype != torch.int64 or targets.shape != logits.shape[:1]:
        raise ProbeError(
            f"the default loss needs one int64 label per sample, got {targets.dtype} {list(targets.shape)}; pass a "
            f"loss of your own"
        )
    if int(targets.min()) < 0 or int(targets.max()) >= classes:
        raise ProbeError(
            f"labels run from {int(targets.min())} to {int(targets.max())}, the model has {classes} classes (0 to "
            f"{classes - 1})"
        )
    return F.cross_entropy(logits, targets, reduction="none")


@dataclass(frozen=True)
class FisherScores:
    """Fisher information of every channel of some cells.

    Attributes:
        channels: For each cell, ``1/2 mean_n g[n, c]**2``: float64 ``[C]``, in the unit of the loss.
        samples: How many samples the mean runs over.
    """

    channels: dict[str, Tensor]
    samples: int

    def cells(self) -> dict[str, float]:
        """The sum over channels for each cell (Whettam 2020, Eq. 3.1)."""
        return {name: float(values.sum()) for name, values in self.channels.items()}


class FisherProbe:
    """A traced model with probes behind some cells, ready to score them on one batch after another.

    Args:
        trace: The traced model; its parameters' ``requires_grad`` flags are put back after every use.
        cells: What to score.
        loss: Maps outputs and targets to **one value per sample**, shape ``[N]``: a mean would shrink every score by
            ``N**2``.
    """

    def __init__(self, trace: Trace, cells: Sequence[Cell], loss: Loss = cross_entropy) -> None:
        places = [(node, cell.channel_axis) for cell in cells for node in cell.nodes]
        self.module = insert_probes(trace.graph_module, places)
        self.probes = probes_of(self.module)
        self.cells, self.loss = cells, loss

    def scores(self, batches: Iterable[tuple[Inputs, Tensor]]) -> FisherScores:
        """Score each channel of each cell; see `fisher`."""
        totals: dict[str, Tensor] = {}
        samples = 0
        with _frozen(self.module):
            for inputs, targets in batches:
                for name, gradient in self._gradients(inputs, targets).items():
                    total = gradient.double().square().sum(0) / 2
                    totals[name] = totals[name] + total if name in totals else total
                samples += samples_in(inputs)
        if not samples:
            raise ProbeError("there is no batch to probe with")
        return FisherScores({name: (total / samples).cpu() for name, total in totals.items()}, samples)

    def _gradients(self, inputs: Inputs, targets: Tensor) -> dict[str, Tensor]:
        """The gradient ``g [N, C]`` of each cell's gates on one batch."""
        with torch.enable_grad():
            values = self.loss(run_on(self.module, inputs), targets)
            _check_loss(values, samples_in(inputs))
            values.sum().backward()
        found = {}
        for cell in self.cells:
            calls = [_gradient(self.probes[node].gradient, cell, samples_in(inputs)) for node in cell.nodes]
            found[cell.name] = torch.stack(calls).sum(0)
        return found


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Let no parameter of ``module`` ask for a gradient meanwhile."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def fisher(
    trace: Trace,
    cells: Sequence[Cell],
    batches: Iterable[tuple[Inputs, Tensor]],
    loss: Loss = cross_entropy,
) -> FisherScores:
    """Score each channel of each cell by the Fisher information of a gate fixed at one.

    For the activation ``A [N, C, *positions]`` at the end of a cell and its gradient,
    ``g[n, c] = sum over positions of A * dL_n/dA``, and the score of channel ``c`` is ``1/2 mean_n g[n, c]**2``: an
    estimate of the rise of the loss if the channel were removed (Theis et al. 2018; Whettam 2020, Eq. 2.6, where the
    activation factor is left unwritten). A cell that is called several times adds its terms before squaring. The
    weights are frozen during the probe: only activations get gradients. The graph runs in evaluation mode, so samples
    do not see each other and the score does not depend on how they are split into batches.

    Args:
        trace: The traced model; its parameters' ``requires_grad`` flags are put back afterwards.
        cells: What to score.
        batches: ``(inputs, targets)`` pairs. One batch is a usable probe; ranks settle with more.
        loss: As for `FisherProbe`.

    Raises:
        ProbeError: If ``loss`` does not give one finite value per sample, a cell receives no gradient, or there is no
            batch.
    """
    return FisherProbe(trace, cells, loss).scores(batches)


def _check_loss(values: Tensor, samples: int) -> None:
    """Refuse a loss that is not one finite value per sample."""
    if values.shape != (samples,):
        raise ProbeError(
            f"the loss must give one value per sample, shape [{samples}], got {list(values.shape)}; use "
            f"reduction='none'"
        )
    if not bool(torch.isfinite(values).all()):
        bad = int((~torch.isfinite(values)).nonzero()[0])
        raise ProbeError(
            f"the loss of sample {bad} of a probe batch is {values[bad].item()}; the images or the weights are not "
            f"finite"
        )
    if not values.requires_grad:
        raise ProbeError("the loss does not depend on any probed cell; choose others with --at")


def _gradient(gradient: Tensor | None, cell: Cell, samples: int) -> Tensor:
    """The probe's ``[N, C]``, or a refusal."""
    if gradient is None:
        raise ProbeError(
            f"{cell.name} receives no gradient (is it behind a detach, or unused?); choose other cells with --at"
        )
    if len(gradient) != samples:
        raise ProbeError(
            f"{cell.name} gives {len(gradient)} rows for {samples} samples, so its first axis is not the batch; "
            f"choose another place with --at"
        )
    return gradient
