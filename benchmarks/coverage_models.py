"""The models of `coverage.py`: all of torchvision, each timm family, twenty architectures of Hugging Face.

A model is built from its configuration alone, with random weights, in evaluation mode, and with inputs as small as it
takes. Nothing is downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Inputs = tuple[Any, ...] | dict[str, Tensor]
Built = tuple[nn.Module, Inputs]

TIMM_CHOICE = Path(__file__).with_name("coverage_timm.json")
HUGGINGFACE = Path(__file__).with_name("coverage_huggingface.json")
KINDS = (
    "classification",
    "segmentation",
    "detection",
    "video",
    "optical_flow",
    "timm",
    "huggingface",
    "huggingface, more",
    "huggingface, third",
)


@dataclass(frozen=True)
class Entry:
    """One model of the benchmark: ``library/name``, its kind (one of `KINDS`), and how to build it."""

    name: str
    kind: str
    build: Callable[[], Built]


def all_entries() -> list[Entry]:
    """Every model, in the order of `KINDS` and then by name."""
    entries = [*torchvision_entries(), *timm_entries(), *huggingface_entries()]
    return sorted(entries, key=lambda entry: (KINDS.index(entry.kind), entry.name))


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw what is constant at the start, in place: statistics and affine of norms, biases, scales of layers.

    A fresh norm (mean 0, variance 1, weight 1, bias 0) and a zero bias hide a wrong cut completely; matrices of tiny
    entries, as transformers start from, nearly so. They are scaled up to keep the size of what they act on.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    with torch.no_grad():
        for name, tensor in model.named_buffers():
            if name.endswith("running_var"):
                uniform(tensor, 0.5, 1.5)
            elif name.endswith("running_mean"):
                uniform(tensor, -0.3, 0.3)
        for tensor in model.parameters():
            if not tensor.is_floating_point() or not tensor.numel():
                continue
            value = float(tensor.flatten()[0])
            if bool((tensor != value).any()):
                if tensor.dim() == 2 and float(tensor.std()) < tensor.shape[1] ** -0.5:
                    tensor.mul_(tensor.shape[1] ** -0.5 / tensor.std())
            elif abs(value) < 1e-3:  # a bias, an embedding, or a layer scale that starts near nothing
                uniform(tensor, -0.1, 0.1) if value == 0 else uniform(tensor, 0.1, 0.3)
            else:
                uniform(tensor, 0.5 * value, 1.5 * value)
    return model


# torchvision

_SIZES = {"inception_v3": 96, "maxvit_t": 224, "ssd300_vgg16": 300, "ssdlite320_mobilenet_v3_large": 320}
_AT_224 = ("vit_", "swin")
_FRAMES = {"mvit": (16, 224), "s3d": (16, 224), "swin3d": (8, 112)}
_VIDEO = ("mvit", "s3d", "swin3d", "r3d", "mc3", "r2plus1d")


def torchvision_entries() -> list[Entry]:
    """Every model that torchvision lists, but for the quantised ones."""
    from torchvision.models import get_model_builder, list_models

    entries = []
    for name in list_models():
        home = get_model_builder(name).__module__.split(".")[2]
        if home == "quantization":
            continue
        kind = home if home in KINDS else "classification"
        entries.append(Entry(f"torchvision/{name}", kind, partial(_torchvision, name, kind)))
    return entries


def _torchvision(name: str, kind: str) -> Built:
    """Build one model of torchvision."""
    from torchvision.models import get_model

    options: dict[str, Any] = {"weights": None}
    if kind in ("segmentation", "detection"):
        options["weights_backbone"] = None
    if kind == "detection":  # so that random weights find something
        prefix = "box_" if "rcnn" in name else ""
        options |= {f"{prefix}score_thresh": -1.0, f"{prefix}detections_per_img": 5}
        options |= {} if name.startswith("ssd") else {"min_size": 128, "max_size": 160}
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False  # the slow truncated normal; drawn below all the same
    model = randomise(get_model(name, **options).eval())
    if kind == "detection":
        side = _SIZES.get(name, 128)
        return model, ([torch.rand(3, side, side), torch.rand(3, side, side)],)
    if kind == "optical_flow":
        return model, (torch.rand(2, 3, 128, 128), torch.rand(2, 3, 128, 128))
    if kind == "video":
        frames, side = next((size for prefix, size in _FRAMES.items() if name.startswith(prefix)), (8, 64))
        return model, (torch.randn(2, 3, frames, side, side),)
    side = _SIZES.get(name, 224 if name.startswith(_AT_224) else 64)
    return model, (torch.randn(2, 3, side, side),)


# timm


def timm_entries() -> list[Entry]:
    """The models named in ``coverage_timm.json``, which ``coverage_models.py`` writes when run."""
    families: dict[str, list[str]] = json.loads(TIMM_CHOICE.read_text())["families"]
    return [Entry(f"timm/{name}", "timm", partial(_timm, name)) for names in families.values() for name in names]


def _timm(name: str) -> Built:
    """Build one model of timm at its own input size."""
    import timm

    model = timm.create_model(name, pretrained=False).eval()
    return randomise(model), (torch.randn(2, *_timm_size(model)),)


def _timm_size(model: Any) -> tuple[int, ...]:
    """Channels, height and width that a model of timm is made for."""
    return tuple(model.default_cfg["input_size"])


def choose_timm(sizes: Iterable[tuple[str, str, int, int]], most: int) -> dict[str, list[str]]:
    """Choose from ``(module, model, parameters, input side)``: the smallest model of each module, then of other stems.

    Models that take at most 256 pixels come before others. A stem is the name up to its first digit or underscore:
    modules that hold several architectures (ByobNet, MetaFormer) give the smallest model of a second stem, then of a
    third, until there are ``most`` in all. The toy models whose names begin with ``test_`` are left out.
    """
    ranked = sorted(sizes, key=lambda row: (row[3] > 256, row[2], row[1]))
    families: dict[str, list[str]] = {}
    turns = []
    for module, name, parameters, side in ranked:
        family = families.setdefault(module, [])
        if name.startswith("test_") or stem(name) in map(stem, family):
            continue
        family.append(name)
        if len(family) == 1 or side <= 256:
            turns.append((len(family), parameters, module, name))
    chosen = {name for *_, name in sorted(turns)[:most]}
    return {module: [name for name in names if name in chosen] for module, names in sorted(families.items())}


def stem(name: str) -> str:
    """The letters that a model's name begins with."""
    return "".join(c if c.isalpha() else " " for c in name).split()[0]


def write_timm_choice(most: int = 135) -> None:
    """Size every model of timm on the meta device and write the choice; takes minutes."""
    import timm
    from timm.models import _registry

    sizes = []
    for name in timm.list_models():
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False)
        side = max(_timm_size(model)[1:])
        sizes.append((_registry._model_to_module[name], name, sum(p.numel() for p in model.parameters()), side))
    choice = {"timm": timm.__version__, "families": choose_timm(sizes, most)}
    TIMM_CHOICE.write_text(json.dumps(choice, indent=1) + "\n")


# Hugging Face

_STAGES = {"embedding_size": 16, "hidden_sizes": [32, 48, 64, 96], "depths": [1, 1, 1, 1]}


def huggingface_entries() -> list[Entry]:
    """The architectures of ``coverage_huggingface.json``, each from a small configuration.

    By name: class, its configuration's class, what differs from that configuration, kind of input.
    """
    table: dict[str, dict[str, Any]] = json.loads(HUGGINGFACE.read_text())
    return [
        Entry(f"huggingface/{name}", kind, partial(_huggingface, *model))
        for kind, models in table.items()
        for name, model in models.items()
    ]


def _huggingface(class_name: str, config_name: str, changes: dict[str, Any], form: str) -> Built:
    """Build one model of transformers."""
    import transformers

    if config_name == "DetrConfig":
        backbone = getattr(transformers, "ResNetConfig")(**_STAGES, out_features=["stage4"])  # noqa: B009
        changes = {**changes, "backbone_config": backbone, "use_timm_backbone": False, "use_pretrained_backbone": False}
        changes |= {"backbone": None}
    model = getattr(transformers, class_name)(getattr(transformers, config_name)(**changes))
    return randomise(model.float().eval()), _huggingface_inputs(form)


def _huggingface_inputs(form: str) -> dict[str, Tensor]:
    """Inputs by keyword; two samples of different content, no padding."""
    ids = torch.randint(3, 200, (2, 13))
    tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    answer = {"decoder_input_ids": torch.randint(3, 200, (2, 11))}
    image = {"pixel_values": torch.randn(2, 3, 64, 64)}
    forms = {
        "ids": {"input_ids": ids},
        "tokens": tokens,
        "tokens to tokens": tokens | answer,
        "image": image,
        "image and tokens": image | tokens,
        "sound": {"input_values": torch.randn(2, 3200)},
        "spectrum to tokens": {"input_features": torch.randn(2, 80, 32), **answer},
        "filters": {"input_features": torch.randn(2, 20, 32)},
        "filters to tokens": {"input_features": torch.randn(2, 40, 80), **answer},
        "spectrogram": {"input_values": torch.randn(2, 64, 32)},
        "two frames": {"pixel_values": torch.randn(2, 2, 3, 64, 64)},
        "video": {"pixel_values": torch.randn(2, 4, 3, 64, 64)},
        "series": {"past_values": torch.randn(2, 32, 2)},
    }
    return forms[form]


if __name__ == "__main__":
    write_timm_choice()
