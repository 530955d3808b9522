"""The command `morph convert`: write a model in another file format."""

from __future__ import annotations

import argparse
from pathlib import Path

from morph.cli.model_arguments import add_model, input_shape_from, open_from

FORMATS = ("morph", "module", "state-dict", "safetensors", "torch-export", "onnx")
SUFFIXES = {".safetensors": "safetensors", ".pt2": "torch-export", ".onnx": "onnx"}

EPILOG = """\
formats:
  morph         our own file, opened without running code from it
  module        a pickle of the whole module
  state-dict    the tensors alone, by torch.save
  safetensors   the tensors alone, by safetensors
  torch-export  the program in evaluation mode, for any batch size
  onnx          the same as ONNX, one file (needs onnx and onnxscript)

The new file is opened again and compared with the model before it takes its name."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.epilog = EPILOG
    add_model(parser)
    known = ", ".join(f"{suffix} is {name}" for suffix, name in SUFFIXES.items())
    parser.add_argument("--to", choices=FORMATS, help=f"format (default: by the suffix of --out: {known})")
    parser.add_argument("--out", type=Path, metavar="FILE", required=True, help="the new file")
    parser.add_argument("--opset", type=int, metavar="N", help="ONNX operator set (default: the exporter's)")
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")


def run(args: argparse.Namespace) -> int:
    """Convert the model."""
    from morph.atomic import check_writable
    from morph.cli import console
    from morph.errors import OutputError

    to = args.to or SUFFIXES.get(args.out.suffix.lower())
    if to is None:
        raise OutputError(f"{args.out}: the suffix does not say the format; give --to, one of {', '.join(FORMATS)}")
    check_writable(args.out, force=args.force)

    from morph.files.convert import convert

    opened = open_from(args)
    shape = input_shape_from(args, opened) if to in ("torch-export", "onnx") else args.input or opened.input_shape
    done = convert(opened.model, args.out, to, input_shape=shape, opset=args.opset, force=args.force)
    if args.json:
        console.document(
            {
                "schema": 1,
                "written": [str(done.path)],
                "format": done.format,
                "bytes": done.bytes,
                "checked": list(done.checked),
                "max_difference": done.max_difference,
            }
        )
        return 0
    for check in done.checked:
        console.line(f"check: {check}")
    if done.max_difference is not None:
        console.line(f"max |difference| of the outputs: {done.max_difference:.2e}")
    console.line(f"written: {done.path} ({done.format}, {done.bytes:,} bytes)")
    return 0
