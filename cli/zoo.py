"""The command `morph zoo`: list the models that are known by name."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """List the models."""
    import torch

    from morph import zoo
    from morph.cli import console

    models = []
    with torch.device("meta"):  # shapes without values, so that counting costs next to nothing
        for name, entry in zoo.MODELS.items():
            params = sum(p.numel() for p in zoo.architecture(name).parameters())
            models.append({"name": name, "params": params, "input": list(entry.input_shape), "note": entry.note})
    if args.json:
        families = [{"name": f.form, "input": list(f.input_shape), "note": f.note} for f in zoo.FAMILIES]
        console.document({"schema": 1, "models": models, "families": families})
        return 0
    rows = [
        [f"zoo:{model['name']}", str(model["note"]), f"{model['params']:,}", "x".join(map(str, entry.input_shape))]
        for model, entry in zip(models, zoo.MODELS.values(), strict=True)
    ]
    console.table("Models known by name (10 classes)", ["name", "note", "params", "input"], rows, left=2)
    console.line("\nAny other numbers may stand in these names:")
    for family in zoo.FAMILIES:
        console.line(f"  zoo:{family.form}  ({family.note})")
    return 0
