"""Draw the graph of a model, block by block, through Graphviz."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import networkx as nx
from torch import Tensor, nn

from morph.atomic import atomic_path
from morph.block_graph import block_graph
from morph.blocks import Cell
from morph.dot import to_dot
from morph.errors import PictureError
from morph.tracing import Trace, trace

__all__ = ["FORMATS", "block_graph", "draw", "picture_format", "render"]

FORMATS = {".svg": "svg", ".png": "png", ".pdf": "pdf", ".dot": "dot"}


def draw(
    model: nn.Module | Trace,
    path: Path,
    *,
    inputs: Tensor | tuple[Tensor, ...] | None = None,
    cells: Sequence[Cell] | None = None,
    values: Mapping[str, float] | None = None,
    value_name: str = "value",
    notes: Mapping[str, str] | None = None,
    force: bool = False,
) -> None:
    """Draw a model, one box for each block or cell, coloured by value.

    Args:
        model: The model, or its trace.
        path: Where the picture shall stand; ``.svg``, ``.png``, ``.pdf`` or ``.dot`` (which needs no Graphviz).
        inputs: One batch of example inputs; needed unless ``model`` is a trace.
        cells: The blocks, see `block_graph`.
        values: A number for each cell, by cell name; the colour of its box, from light (least) to dark (greatest).
        value_name: What ``values`` are, e.g. ``Fisher score``.
        notes: What was done to each cell, by cell name. Without ``values`` those cells are coloured.
        force: Whether an existing file may be replaced.

    Raises:
        PictureError: If the suffix is unknown, ``inputs`` are missing, or Graphviz is missing or fails.
        TraceError: If the model cannot be traced.
        OutputError: If the picture cannot be written.
    """
    picture_format(path)
    if not isinstance(model, Trace):
        if inputs is None:
            raise PictureError(f"{type(model).__name__} cannot be drawn without inputs; give inputs=, one batch")
        model = trace(model, inputs)
    render(block_graph(model, cells, values=values, notes=notes), path, value_name=value_name, force=force)


def picture_format(path: Path) -> str:
    """Return the format that the suffix of ``path`` stands for.

    Raises:
        PictureError: If it stands for none, or its format needs Graphviz and that is not installed.
    """
    form = FORMATS.get(path.suffix.lower())
    if form is None:
        raise PictureError(f"{path}: the suffix does not say a format; end the name in {', '.join(FORMATS)}")
    if form != "dot" and shutil.which("dot") is None:
        raise PictureError(
            f"{path}: no program 'dot' on the PATH; install Graphviz (apt install graphviz, brew install graphviz or "
            "conda install graphviz), or write a .dot file, which needs no program"
        )
    return form


def render(graph: nx.DiGraph[str], path: Path, *, value_name: str = "value", force: bool = False) -> None:
    """Write a graph of `block_graph` as a picture; arguments and errors as `draw`."""
    form = picture_format(path)
    text = to_dot(graph, value_name)
    with atomic_path(path, force=force) as temporary:
        if form == "dot":
            temporary.write_text(text, encoding="utf-8")
        else:
            temporary.write_bytes(_graphviz(text, form, path))


def _graphviz(text: str, form: str, path: Path) -> bytes:
    resolution = ["-Gdpi=144"] if form == "png" else []
    done = subprocess.run(["dot", f"-T{form}", *resolution], input=text.encode(), capture_output=True, check=False)
    if done.returncode != 0 or not done.stdout:
        said = " ".join(done.stderr.decode(errors="replace").split()) or f"exit status {done.returncode}"
        raise PictureError(f"{path}: Graphviz failed: {said}; write a .dot file instead")
    return done.stdout
