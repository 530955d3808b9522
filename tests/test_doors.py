"""What may import what, and what is public."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import morph

ROOT = Path(morph.__file__).parent
ORDER = [
    "errors",
    "atomic",
    "inputs",
    "in_place",
    "optional_arguments",
    "unfused",
    "attention",
    "label_heads",
    "window_attention",
    "module_edits",
    "interpreter",
    "zoo",
    "files",
    "images",
    "augmentation",
    "cifar",
    "sources",
    "sample",
    "data",
    "copying",
    "tracing",
    "blocks",
    "passes",
    "couplings",
    "garbage",
    "random_edits",
    "graph_edits",
    "plan",
    "shaking",
    "scores",
    "twins",
    "trials",
    "residuals",
    "renaming",
    "count_rules",
    "counts",
    "policies",
    "batches",
    "depth_policies",
    "configurations",
    "analysis",
    "norm_counts",
    "graphs",
    "rerouting",
    "resizing",
    "heads",
    "recurrent",
    "tensor_edits",
    "lineages",
    "shards",
    "checkpoints",
    "noise",
    "cut",
    "zeroing",
    "verify",
    "fitting",
    "graph_fitting",
    "carriers",
    "removal",
    "model_config",
    "rule_checks",
    "copies",
    "unit_slices",
    "unit_gradients",
    "unit_scores",
    "selection",
    "surgery",
    "head_search",
    "head_swapping",
    "label_surgery",
    "labels",
    "states",
    "pruning",
    "baselines",
    "readers",
    "weight_readers",
    "branches",
    "gate_borders",
    "gate_sites",
    "weight_sites",
    "liveness",
    "gate_latency",
    "gate_weights",
    "gate_removal",
    "gate_trials",
    "gating",
    "widening",
    "deepening",
    "depth_scaling",
    "expansion",
    "gains",
    "mixing",
    "substitution",
    "apg",
    "attaching",
    "search_losses",
    "search_budget",
    "search_options",
    "search_schedule",
    "search_checkpoint",
    "search_progress",
    "divergence",
    "search_loop",
    "search_data",
    "search_space",
    "student_search",
    "teaching",
    "training",
    "report",
    "picture",
    "search_picture",
    "training_picture",
    "student_picture",
    "teaching_picture",
    "block_graph",
    "dot",
    "drawing",
    "family",
]


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, at its top or inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def upward(path: Path, text_of: str) -> list[str]:
    """Imports by a file of ``text_of`` of what stands below it."""
    place = ORDER.index(text_of)
    homes = {name.split(".")[1] for name in imports(path) if name.startswith("morph.")}
    return sorted(home for home in homes if home in ORDER and ORDER.index(home) > place)


@pytest.mark.parametrize(
    "path", [p for p in ROOT.rglob("*.py") if p.name != "__init__.py" or p.parent != ROOT], ids=str
)
def test_imports_run_one_way_and_the_library_neither_prints_nor_parses(path):
    home = path.relative_to(ROOT).parts[0].removesuffix(".py")
    names = imports(path)
    assert not {n for n in names if n.split(".")[0] in ("rich", "argparse") or n.startswith("morph.cli")}
    if home in ORDER:
        assert upward(path, home) == []


def test_the_order_can_be_broken(tmp_path):
    file = tmp_path / "errors.py"
    file.write_text("def f():\n    from morph.expansion import expand\n")
    assert upward(file, "errors") == ["expansion"]


def test_importing_the_package_costs_nothing():
    heavy = "[m for m in ('torch', 'torchvision', 'numpy') if m in sys.modules]"
    script = f"import sys, morph; print({heavy}, sorted(morph.__all__))"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert out.startswith("[] ['APG', 'Analysis', 'Coupling', ")


def test_every_public_name_is_there_and_stays_what_it_is():
    """A submodule of the same name would take the place of a function once it is imported."""
    for name in morph.__all__:
        assert callable(getattr(morph, name)), name
    importlib.import_module("morph.surgery")

    for name in morph.__all__:
        assert callable(getattr(morph, name)), name
    assert not set(morph.__all__) & {p.stem for p in ROOT.iterdir()}
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        morph.nothing  # noqa: B018


def test_python_files_are_rooms_with_one_job():
    sizes = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in ROOT.rglob("*.py")}
    assert max(sizes.values()) <= 350, max(sizes, key=sizes.get)
