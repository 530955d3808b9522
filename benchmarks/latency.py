"""Real speed after cutting: latency over latency before, beside multiply-adds over multiply-adds before.

    python benchmarks/latency.py                             # writes results/latency_*.json
    python benchmarks/latency.py --only mobilenet_v2 --rounds 3 --size 64 --no-save

Each model is cut to half its multiply-adds, by magnitude, with widths of any size and with widths rounded to multiples
of 8, 16 and 32. The model before and its cuts run in turn on the same batch; ratios are to the model before in the same
round, and their median, smallest and largest over the rounds are told.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
from collections.abc import Callable

import torch
from machine import in_turn, save
from torch import Tensor, nn
from torchvision.models import get_model

import morph
from morph.errors import MorphError

MODELS = ("resnet50", "mobilenet_v2", "vit_b_16", "swin_t")
MULTIPLES = (1, 8, 16, 32)
BATCHES = (1, 8)


def cuts(model: nn.Module, sample: Tensor, share: float, multiples: tuple[int, ...]) -> dict[str, morph.Result | str]:
    """The model cut to a share of its multiply-adds, for each multiple; or the reason why not."""
    before = morph.prune(model, sample, ratio=0, verify=False).record.before["macs"]
    found: dict[str, morph.Result | str] = {}
    for multiple in multiples:
        name = f"multiple of {multiple}"
        try:
            found[name] = morph.prune(
                model, sample, target_macs=before * share, normalise="macs", multiple=multiple, verify=False
            )
        except MorphError as error:
            found[name] = str(error)
    return found


def run_on(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """One pass without gradients, until it is done."""
    model.eval()

    def work() -> None:
        with torch.inference_mode():
            model(x)
        if x.is_cuda:
            torch.cuda.synchronize()

    return work


def measure(name: str, args: argparse.Namespace) -> dict[str, object]:
    """Cut one model and time it beside its cuts."""
    torch.manual_seed(0)
    model = get_model(name, weights=None).eval()
    results = cuts(model, torch.randn(2, 3, args.size, args.size), args.share, MULTIPLES)
    models = {"before": model.to(args.device)}
    told: dict[str, object] = {"refused": {cut: text for cut, text in results.items() if isinstance(text, str)}}
    for cut, result in results.items():
        if not isinstance(result, str):
            models[cut] = result.model.to(args.device)
            sizes = {key: result.record.after[key] / result.record.before[key] for key in ("macs", "params")}
            told[cut] = {"macs_ratio": sizes["macs"], "params_ratio": sizes["params"]}
            told[cut] |= {"form": result.record.details["form"], "left": len(result.record.details["left"])}
    for batch in BATCHES:
        x = torch.randn(batch, 3, args.size, args.size, device=args.device)
        timed = in_turn({cut: run_on(one, x) for cut, one in models.items()}, args.rounds)
        told[f"batch of {batch}"] = timed
    return told


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", default="*", help="models whose name fits this pattern")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--share", type=float, default=0.5, help="of the multiply-adds to keep")
    parser.add_argument("--size", type=int, default=224, help="side of the images")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    found = {}
    for name in MODELS:
        if fnmatch.fnmatchcase(name, args.only):
            found[name] = measure(name, args)
            print(name, json.dumps(found[name]), flush=True)
    if not args.no_save:
        setup = {"rounds": args.rounds, "share": args.share, "size": args.size, "device": args.device}
        print(save("latency", {"models": found, **setup}))


if __name__ == "__main__":
    main()
