"""The command `morph`: parser, dispatch and exit codes. Imports neither torch nor anything that imports it."""

from __future__ import annotations

import argparse
import importlib
import sys
from importlib.metadata import version
from typing import Any

COMMANDS = {
    "prune": "cut the least useful channels and heads out of a model",
    "expand": "grow a student into its teacher without changing what it computes",
    "prune-for-student": "search a teacher for the student that learns best from it, with channel gates",
    "search": "search for the family of random-graph students that learns best from a teacher",
    "train": "train a model on labelled images, without a teacher",
    "distill": "teach a student by a teacher, directly or through assistants",
    "evaluate": "measure top-1, top-5 and loss of models on labelled images",
    "substitute": "put cheap blocks in the place of convolutions, chosen by Fisher potential",
    "apply": "replay the record of a surgery on a model file",
    "report": "count parameters and multiply-adds, of one model or of two side by side",
    "draw": "draw the graph of a model, block by block",
    "attention": "draw where networks look, side by side",
    "convert": "write a model in another file format",
    "zoo": "list the models that are known by name",
}

EPILOG = """\
MODEL is a file (our own, a pickled module of known classes, a state_dict with --arch, an exported program) or a name:
  zoo:NAME (see `morph zoo`), torchvision:NAME, timm:NAME, or package.module:callable.

exit codes: 0 done; 1 a check failed, a limit was missed, or a run did (its loss is no number any more); 2 bad input;
  130 interrupted.
Results go to stdout, progress to stderr. NO_COLOR is respected."""


def build_parser() -> argparse.ArgumentParser:
    """Build the whole parser. Each command lives in the module of its name and adds its own arguments."""
    parser = argparse.ArgumentParser(
        prog="morph",
        description="Model surgery for PyTorch: trace, analyse, decide, cut, verify, report.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"morph {version('torch-morph')}")
    parser.add_argument(
        "--print-completion", choices=["bash", "zsh", "tcsh"], help="print a completion script for this shell"
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _module(name).add_arguments(command)
    return parser


def _module(command: str) -> Any:
    """The module of a command."""
    return importlib.import_module(f"morph.cli.{command.replace('-', '_')}")


def _out_of_memory(error: BaseException) -> bool:
    """Whether memory did not suffice; torch says so in words on a processor, by a class of its own elsewhere."""
    import torch

    said = "can't allocate memory" in str(error) or "not enough memory" in str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or said


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv  # for commands that start themselves in further processes
    if args.print_completion:
        import shtab

        sys.stdout.write(shtab.complete(parser, shell=args.print_completion) + "\n")
        return 0
    if args.command is None:
        parser.print_help()
        return 2
    from morph.cli import console
    from morph.errors import MorphError

    try:
        return int(_module(args.command).run(args))
    except MorphError as error:
        if getattr(args, "speaks", True):  # of several processes one does
            console.error(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        console.error("interrupted; nothing was written")
        return 130
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        console.error(f"out of memory: {said}; take fewer images or smaller batches, or free some memory")
        return 2
    except BrokenPipeError:
        sys.stderr.close()
        return 0


if __name__ == "__main__":
    sys.exit(main())
