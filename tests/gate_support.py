"""Nets with gates, random closings, and slow second implementations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torchvision
from analysis_nets import NETS, make
from models import randomise
from torch import Tensor, nn

from morph.gating import Gated
from morph.passes.gates import gates_of
from morph.zoo import build

V = torchvision.models


class SmallResNet(V.ResNet):
    """A torchvision ResNet with an eighth of the channels."""

    def __init__(self) -> None:
        super().__init__(V.resnet.BasicBlock, [1, 2, 1, 1], num_classes=7)
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(64, 7)

    def _make_layer(self, block: Any, planes: int, *args: Any, **kwargs: Any) -> nn.Sequential:
        self.inplanes = min(self.inplanes, planes // 8) if planes == 64 else self.inplanes
        return super()._make_layer(block, planes // 8, *args, **kwargs)


_BLOCKS = [[1, 8, 1, 1], [3, 12, 2, 2], [3, 16, 1, 1]]
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "densenet": (lambda: build("densenet-bc-16-3"), (2, 3, 32, 32)),
    "wrn": (lambda: build("wrn-10-1"), (2, 3, 32, 32)),
    "darts": (lambda: build("darts-3x4"), (2, 3, 32, 32)),
    "resnet": (SmallResNet, (2, 3, 33, 33)),
    "mobilenet": (lambda: V.MobileNetV2(7, inverted_residual_setting=_BLOCKS), (2, 3, 32, 32)),
    "vit": (lambda: V.VisionTransformer(16, 8, 2, 3, 33, 47, num_classes=7), (2, 3, 16, 16)),
}


def made(name: str) -> tuple[nn.Module, Any]:
    """A float64 model with random weights and statistics, and inputs that it accepts."""
    if name in NETS:
        return make(name)
    build_, shape = MODELS[name]
    torch.manual_seed(3)
    model = randomise(build_(), 3).double().eval()
    return model, torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def shut(gated: Gated, share: float, seed: int, spread: float = 0.5) -> dict[str, Tensor]:
    """Draw the gates around one, close a share of them, and give the closed ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for gate in gates_of(gated.model).values():
            draw = torch.rand(gate.weight.shape, generator=generator, dtype=torch.float64)
            gate.weight.copy_(1 + spread * (draw - 0.5))
            gate.weight[torch.rand(gate.weight.shape, generator=generator) < share] = 0
    return gated.closed()


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Floating-point outputs, as a list."""
    with torch.no_grad():
        found = (
            model(**inputs)
            if isinstance(inputs, dict)
            else model(*inputs)
            if isinstance(inputs, tuple)
            else model(inputs)
        )
    items = found if isinstance(found, tuple | list) else list(found.values()) if isinstance(found, dict) else [found]
    return [t for t in items if t.is_floating_point()]


def hooked(model: nn.Module, values: dict[str, tuple[Tensor, int]], inputs: Any) -> list[Tensor]:
    """Outputs of a plain model whose readers see their input times ``values``: a second implementation of gates."""
    handles = []
    for path, (factor, axis) in values.items():

        def multiply(module: nn.Module, args: tuple[Tensor, ...], factor: Tensor = factor, axis: int = axis) -> Any:
            shape = [-1 if a == axis % args[0].dim() else 1 for a in range(args[0].dim())]
            return (args[0] * factor.reshape(shape), *args[1:])

        handles.append(model.get_submodule(path).register_forward_pre_hook(multiply))
    try:
        return outputs(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
