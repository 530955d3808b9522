"""Give a teacher and a student the heads for multi-channel labels: `put_label_head` and `put_voting_head`."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.dropout import _DropoutNd

from morph.copying import own_copy
from morph.counts import count
from morph.cut import apply_plan
from morph.errors import HeadError, TraceError
from morph.head_search import FoundHead, find_heads
from morph.inputs import Inputs, arguments_of, plain, run_on
from morph.interpreter import Interpreter
from morph.label_heads import MultiChannelHead, head_of, padding_for
from morph.plan import Check, Edit, Plan, PutLabelHead, PutVotingHead, Record, UseGraph
from morph.removal import compare
from morph.surgery import Result, environment, sizes
from morph.tracing import Trace, trace, try_inputs
from morph.verify import require
from morph.zeroing import doubled, in_float64

LIMIT = 1e-10
NAME = "label_head"
# What may lie between the feature map and the classifier; all of it goes away with the classifier.
_MODULES = (
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.AvgPool2d,
    nn.MaxPool2d,
    nn.Flatten,
    nn.Identity,
    _DropoutNd,
)
_CALLS = {
    "adaptive_avg_pool2d",
    "adaptive_max_pool2d",
    "amax",
    "avg_pool2d",
    "contiguous",
    "dropout",
    "flatten",
    "max_pool2d",
    "mean",
    "reshape",
    "squeeze",
    "view",
}


def put_label_head(
    model: nn.Module, inputs: Inputs, *, channels: int = 16, kernel: int = 6, stride: int = 2, seed: int = 0
) -> Result:
    """Put a `morph.label_heads.MultiChannelHead` on the last feature map of a classifier, where its head was.

    Everything up to the map keeps its weights; pooling, flattening and dropout between the map and the head go away
    with it. A model whose pooling is a module, or whose head is a convolution, keeps its class; any other goes on as
    its traced graph. The output is ``[N, classes]`` as before: the votes of each class, between 0 and ``channels``.

    Args:
        model: A classifier of images; not touched.
        inputs: One batch of two samples or more, of the size that it will be used with: a tensor, a tuple of arguments
            or a mapping of named ones.
        channels: Channels of each class.
        kernel: Side of the filters.
        stride: Their stride.
        seed: Of the fresh weights.

    Returns:
        The new model and its record. Its outputs were compared with the votes that the feature map of the model before
        gives, in float64.

    Raises:
        HeadError: There is no classifier or no feature map right before it, or the map does not allow so many channels;
            says why.
        TraceError: The model does not accept ``inputs`` or cannot be traced.
        CheckFailedError: The outputs are something else.
    """
    try_inputs(own_copy(model), *arguments_of(inputs))
    _check_seed(seed)
    head = find_heads(model, inputs)[0]
    traced = trace(model, inputs)
    path = _path_to_map(traced, head)
    size = traced.shapes[path[-1].name]
    padding_for((size[2], size[3]), channels, kernel, stride)
    options = {"channels": channels, "kernel": kernel, "stride": stride, "seed": seed}
    wanted = _Wanted(traced, path[-1].name)
    ways = _ways(traced, path, head, options)
    for edits in ways:
        try:
            changed = apply_plan(model, Plan(edits))
            checks = (compare("votes", wanted.votes(changed), changed, inputs, LIMIT),)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:  # code that wants another shape
            if edits is ways[-1]:
                raise HeadError(f"{type(model).__name__} does not run with the new head: {error}") from error
            continue
        if not checks[0].passed and edits is not ways[-1]:
            continue
        require(checks)
        facts = {"map": list(size[1:]), "form": "traced graph" if len(edits) > 1 else "the model's own class"}
        return _result("put_label_head", model, changed, inputs, Plan(edits), options, checks, facts)
    raise AssertionError("there is always a last way")


def put_voting_head(model: nn.Module, inputs: Inputs, *, channels: int = 16, seed: int = 0) -> Result:
    """Put a `morph.label_heads.VotingHead` in the place of a linear classifier.

    Args:
        model: A classifier; not touched.
        inputs: One batch of two samples or more: a tensor, a tuple of arguments or a mapping of named ones.
        channels: Channels of each class.
        seed: Of the fresh weights.

    Returns:
        The new model, of the same class, and its record.

    Raises:
        HeadError: There is no classifier, it is no linear layer, or something follows it; says why.
        TraceError: The model does not accept ``inputs``.
    """
    try_inputs(own_copy(model), *arguments_of(inputs))
    _check_seed(seed)
    if channels < 1:
        raise HeadError(f"{channels} channels; give 1 or more")
    head = find_heads(model, inputs)[0]
    if len(head.shape) != 2:
        raise HeadError(f"the classifier {head.path} is a convolution; a voting head takes the place of a linear layer")
    plan = Plan((PutVotingHead(head.path, head.shape, channels, seed),))
    changed = apply_plan(model, plan)
    captured: list[Tensor] = []
    twin = copy.deepcopy(changed).double().eval()
    head_of(twin).register_forward_hook(lambda module, args, output: captured.append(output))
    with torch.no_grad(), in_float64():
        run_on(twin, doubled(plain(inputs)))
    checks = (compare("votes", captured, changed, inputs, LIMIT),)
    if not checks[0].passed:
        raise HeadError(
            f"the output of {type(model).__name__} is not that of its classifier {head.path} alone, so its votes would "
            "not be the output; give a model that ends in its classifier"
        )
    options = {"channels": channels, "seed": seed}
    return _result("put_voting_head", model, changed, inputs, plan, options, checks, {})


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise HeadError(f"a seed of {seed}; give 0 or more")


def _result(
    command: str,
    model: nn.Module,
    changed: nn.Module,
    inputs: Inputs,
    plan: Plan,
    options: dict[str, int],
    checks: tuple[Check, ...],
    facts: dict[str, Any],
) -> Result:
    """The new model with its record."""
    head = head_of(changed)
    record = Record(
        command=command,
        options=dict(options),
        plan=plan,
        before=sizes(count(model, inputs)),
        after=sizes(count(changed, inputs)),
        checks=checks,
        details={
            **facts,
            "classes": head.num_classes,
            "outputs": head.num_classes * head.channels,
            "head_params": sum(p.numel() for p in head.parameters()),
            "verified": "outputs against the votes of the new head, float64, evaluation mode",
        },
        environment={**environment(model, inputs), "seed": options["seed"]},
    )
    return Result(changed, record)


def _path_to_map(traced: Trace, head: FoundHead) -> list[fx.Node]:
    """The nodes from the classifier back to the feature map: the last tensor that has positions.

    Raises:
        HeadError: If there is none, or something with weights lies between.
    """
    calls = traced.outputs.get(head.path, ())
    if len(calls) != 1:
        raise HeadError(f"the classifier {head.path} is called {len(calls)} times; a label head needs one call")
    path = [traced.node(calls[0])]
    while True:
        sources = path[-1].all_input_nodes
        if not sources:
            raise HeadError(f"the classifier {head.path} does not read a feature map [N, C, H, W]")
        source = sources[0]
        path.append(source)
        shape = traced.shapes.get(source.name, ())
        if len(shape) == 4 and shape[2] * shape[3] > 1:
            return path
        if source.op == "placeholder" or not _may_go(traced, source):
            what = str(source.target) if source.op == "call_module" else source.name
            raise HeadError(
                f"between the last feature map and the classifier {head.path} lies {what}, which would be lost; a "
                "label head needs a feature map that is only pooled, flattened or dropped out before the classifier"
            )


def _may_go(traced: Trace, node: fx.Node) -> bool:
    """Whether nothing that was learned is lost with a node."""
    if node.op == "call_module":
        return isinstance(traced.graph_module.get_submodule(str(node.target)), _MODULES)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op in ("call_function", "call_method") and name in _CALLS


def _ways(traced: Trace, path: list[fx.Node], head: FoundHead, options: dict[str, int]) -> list[tuple[Edit, ...]]:
    """Plans to be tried in order: one that keeps the model's class, where there may be one, and the traced graph."""
    classifier, source = path[0], path[-1]
    sizes_ = traced.shapes[source.name][1:]
    calls = {name: len(nodes) for name, nodes in traced.outputs.items()}
    common: dict[str, Any] = {"head": head.path, "shape": head.shape, "sizes": sizes_, **options}
    ways: list[tuple[Edit, ...]] = []
    if len(path) == 2:  # a convolution on the map
        ways.append((PutLabelHead(module=head.path, removed=(), source="", node="", **common),))
    elif path[-2].op == "call_module" and calls.get(str(path[-2].target)) == 1 and not any(map(_drops, path)):
        between = [node for node in path[1:-2] if node.op == "call_module"]
        dropouts = [n for n in between if isinstance(traced.graph_module.get_submodule(str(n.target)), _DropoutNd)]
        removed = (head.path, *(str(node.target) for node in dropouts))
        if all(calls.get(name) == 1 for name in removed):
            place = str(path[-2].target)
            ways.append((PutLabelHead(module=place, removed=removed, source="", node="", **common),))
    if len(path) > 2:
        inside = PutLabelHead(module=NAME, removed=(), source=source.name, node=classifier.name, **common)
        ways.append((UseGraph("symbolic"), inside))
    return ways


def _drops(node: fx.Node) -> bool:
    """Whether a node drops activations without a module, so that only a graph can do without it."""
    return node.op == "call_function" and "dropout" in getattr(node.target, "__name__", "")


class _Wanted:
    """What the votes must be: computed from the feature map of the model before, without the head's own code."""

    def __init__(self, traced: Trace, node: str) -> None:
        graph = copy.deepcopy(traced.graph_module).double().eval()
        kept: list[Tensor] = []

        class Run(Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                result = super().run_node(n)
                if n.name == node:
                    kept.append(result.clone())
                return result

        with torch.no_grad(), in_float64():
            Run(graph).run(*doubled(traced.inputs))
        self.map = kept[0]

    def votes(self, changed: nn.Module) -> list[Tensor]:
        """``[N, classes]``, summed over the windows one after another."""
        head = head_of(changed)
        if not isinstance(head, MultiChannelHead):
            raise TraceError("the new model has no label head")
        weight, bias = head.score.weight.detach().double(), head.score.bias
        assert bias is not None
        windows = F.unfold(F.pad(self.map, head.pad.padding), weight.shape[2:], stride=head.score.stride)
        scores = weight.flatten(1) @ windows + bias.detach().double()[:, None]
        return [torch.sigmoid(scores).sum(2)]
