"""Torch-Pruning 1.6.1, used as its own README and examples use it.

`prune` with an empty `Recipe` is the README's quick start. `find_recipe` gives what its examples add by hand: heads of
attention layers, layers to leave whole, attributes to mend after the cut. What is removed is read off as it is cut
(`watch`), so that `zeroing.judge` can say whether the result is right.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning.pruner.function import BasePruningFunc

RATIO = 0.5

# What the examples leave whole (examples/torchvision_models), as far as a model has it.
_LEFT_WHOLE = {
    "detection": ("head", "rpn.head.cls_logits", "rpn.head.bbox_pred", "backbone.fpn", "roi_heads"),
    "optical_flow": ("corr_block", "update_block", "mask_predictor"),
}
_CLASSES = {"classification": 1000, "segmentation": 21, "video": 400, "detection": 91}


@dataclass
class Recipe:
    """What the examples find in a model before they prune it."""

    num_heads: dict[nn.Module, int] = field(default_factory=dict)
    left_whole: list[nn.Module] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether it differs from the plain use."""
        return bool(self.num_heads or self.left_whole or self.options)


@dataclass(frozen=True)
class Run:
    """Seconds of the two steps, and what stayed: tensor name -> axis -> positions."""

    build_seconds: float
    step_seconds: float
    kept: dict[str, dict[int, Tensor]]


def first_sample(inputs: Any) -> Any:
    """Its examples trace with a single sample; a list of images stays as it is."""
    if isinstance(inputs, dict):
        return {name: x[:1] for name, x in inputs.items()}
    if isinstance(inputs[0], list):
        return inputs[0]
    return inputs[0][:1] if len(inputs) == 1 else {f"image{i}": x[:1] for i, x in enumerate(inputs, 1)}


def classifiers(model: nn.Module, kind: str) -> list[nn.Module]:
    """Layers with as many outputs as there are classes; the README says not to prune the final classifier."""
    config = getattr(model, "config", None)
    sizes = {getattr(config, "num_labels", None), getattr(config, "vocab_size", None)} if config else set()
    sizes |= {getattr(model, "num_classes", None), _CLASSES.get(kind)}
    sizes = {size for size in sizes if isinstance(size, int) and size > 2}
    return [
        module
        for module in model.modules()
        if (isinstance(module, nn.Linear) and module.out_features in sizes)
        or (isinstance(module, nn.Conv2d) and module.out_channels in sizes)
    ]


def answer(output: Any) -> Any:
    """What the examples take from an output that has several parts; a cut may change the shape of the others."""
    if not isinstance(output, dict):
        return output
    main = [name for name in output if name == "out" or name.startswith("logits")]
    return [output[name] for name in main] if main else output


def find_recipe(model: nn.Module, kind: str) -> Recipe:
    """What the examples set for such a model."""
    recipe = Recipe()
    modules: list[Any] = list(model.modules())
    for module in modules:
        heads = getattr(module, "num_heads", None) or getattr(module, "num_attention_heads", None)
        if not isinstance(heads, int):
            config = getattr(module, "config", None)
            heads = getattr(config, "num_attention_heads", None) if hasattr(module, "q_proj") else None
        if not isinstance(heads, int):
            continue
        for name in ("qkv", "qkv_proj", "query", "key", "value", "q_proj", "k_proj", "v_proj"):
            layer = getattr(module, name, None)
            if isinstance(layer, nn.Linear):
                recipe.num_heads[layer] = heads
        rotary = getattr(getattr(module, "config", None), "num_key_value_heads", None)
        if rotary and hasattr(module, "k_proj"):  # examples/LLMs: whole heads, so that the rotation stays right
            recipe.num_heads[module.k_proj] = recipe.num_heads[module.v_proj] = rotary
            recipe.options = {"prune_num_heads": True, "prune_head_dims": False, "head_pruning_ratio": RATIO}
            recipe.options["round_to"] = 4
    paths = dict(model.named_modules())
    recipe.left_whole = [paths[path] for path in _LEFT_WHOLE.get(kind, ()) if path in paths]
    if type(model).__name__ == "VisionTransformer" and hasattr(model, "conv_proj"):  # torchvision's
        recipe.options["round_to"] = modules[0].encoder.layers[0].num_heads
    return recipe


def mend(model: nn.Module, recipe: Recipe) -> None:
    """Set the attributes that the examples set after the cut."""
    num_heads = recipe.num_heads
    modules: list[Any] = list(model.modules())
    for module in modules:
        for name, parts in (("qkv", 3), ("qkv_proj", 3), ("query", 1), ("q_proj", 1)):
            layer = getattr(module, name, None)
            if not isinstance(layer, nn.Linear) or layer not in num_heads:
                continue
            heads, width = num_heads[layer], layer.out_features // parts
            changes = {"num_heads": heads, "num_attention_heads": heads, "head_dim": width // heads}
            changes |= {"attention_head_size": width // heads, "all_head_size": width, "attn_dim": width}
            for attribute, value in changes.items():
                if isinstance(getattr(module, attribute, None), int):
                    setattr(module, attribute, value)
            if hasattr(module, "num_key_value_groups") and getattr(module, "k_proj", None) in num_heads:
                module.num_key_value_groups = heads // num_heads[module.k_proj]
    if recipe and hasattr(model, "hidden_dim") and hasattr(model, "conv_proj"):
        modules[0].hidden_dim = modules[0].conv_proj.out_channels


def build(model: nn.Module, inputs: Any, kind: str, recipe: Recipe) -> Any:
    """The pruner that removes half of the channels by group magnitude at its next step, in place.

    With an empty recipe this is the README's quick start, in which only the final classifier is left whole.
    """
    return tp.pruner.BasePruner(
        model,
        first_sample(inputs),
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=RATIO,
        ignored_layers=[*classifiers(model, kind), *recipe.left_whole],
        num_heads=recipe.num_heads,
        output_transform=answer,
        out_channel_groups={},
        in_channel_groups={},
        **recipe.options,
    )


def prune(model: nn.Module, inputs: Any, kind: str, recipe: Recipe) -> Run:
    """Remove half of the channels by `build`'s pruner; both steps are timed."""
    model.requires_grad_(True)
    with watch(model) as kept:
        start = time.perf_counter()
        pruner = build(model, inputs, kind, recipe)
        built = time.perf_counter()
        pruner.step()
        done = time.perf_counter()
    mend(model, recipe)
    return Run(built - start, done - built, kept)


@contextmanager
def watch(model: nn.Module) -> Iterator[dict[str, dict[int, Tensor]]]:
    """Follow every parameter that Torch-Pruning slices; the dictionary is filled when the block ends well.

    All its slicing of parameters goes through one method, which is wrapped here and put back afterwards.
    """
    followed: dict[int, tuple[nn.Parameter, dict[int, Tensor]]] = {}
    kept: dict[str, dict[int, Tensor]] = {}
    original = BasePruningFunc._prune_parameter_and_grad

    def slice_and_note(self: Any, weight: nn.Parameter, keep_idxs: Any, pruning_dim: int) -> nn.Parameter:
        new = original(self, weight, keep_idxs, pruning_dim)
        axis = pruning_dim % weight.dim()
        so_far = dict(followed.get(id(weight), (weight, {}))[1])
        before = so_far.get(axis, torch.arange(weight.shape[axis]))
        so_far[axis] = before[torch.as_tensor(keep_idxs, dtype=torch.long)]
        followed.setdefault(id(weight), (weight, {}))  # holds it, so that its id is not given again
        followed[id(new)] = (new, so_far)
        return new  # type: ignore[no-any-return]

    BasePruningFunc._prune_parameter_and_grad = slice_and_note
    try:
        yield kept
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if id(parameter) in followed and followed[id(parameter)][1]:
                kept[name] = followed[id(parameter)][1]
    finally:
        BasePruningFunc._prune_parameter_and_grad = original
