"""What a network costs: parameters, multiply-adds, memory for each sample in training, and latency."""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from morph.counts import count
from morph.search_checkpoint import random_states, set_random_states

_WARM, _ROUNDS = 3, 15
_FEWER, _MORE = 2, 4  # samples of the batches whose memory is compared


@dataclass(frozen=True)
class Measures:
    """What a network costs.

    Attributes:
        params: Number of parameters.
        macs: Multiply-adds of one sample (1 multiply-add = 1).
        memory: Bytes that a training step keeps for each further sample between forward and backward.
        latency: Seconds of the forward pass of one sample in evaluation mode, the median of fifteen.
    """

    params: int
    macs: int
    memory: int
    latency: float


def measure(model: nn.Module, input_shape: tuple[int, ...], device: torch.device | None = None) -> Measures:
    """Measure a copy of ``model``; the model itself and the global random states stay as they are.

    Args:
        model: Maps ``[N, *input_shape]`` to outputs.
        input_shape: Of one sample.
        device: Where latency is measured; by default where the model is.
    """
    home = next((p.device for p in model.parameters()), torch.device("cpu"))
    copied = copy.deepcopy(model).to(device or home)
    counts = count(model, torch.zeros(1, *input_shape, device=home))
    states = random_states()
    try:
        x = torch.randn(_MORE, *input_shape, device=device or home)
        memory = (_kept(copied, x) - _kept(copied, x[:_FEWER].clone())) // (_MORE - _FEWER)
        return Measures(counts.params, counts.macs, memory, _latency(copied.eval(), x[:1]))
    finally:
        set_random_states(states)


def _kept(model: nn.Module, x: Tensor) -> int:
    """Bytes of all tensors that a forward pass in training mode keeps for the backward pass, each storage once."""
    seen: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    for parameter in model.parameters():
        parameter.requires_grad_()
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.train()(x)
    del output
    return sum(seen.values())


@torch.no_grad()
def _latency(model: nn.Module, x: Tensor) -> float:
    """Seconds of one forward pass."""
    times = []
    for number in range(_WARM + _ROUNDS):
        begun = time.perf_counter()
        model(x)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        if number >= _WARM:
            times.append(time.perf_counter() - begun)
    return statistics.median(times)
