"""The counts of one model, or of two side by side, as rows and as text. Draws nothing on a terminal."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from morph.counts import SECOND, Counts, ModuleCount

ABSENT = "-"


@dataclass(frozen=True)
class Row:
    """One module path, in one model or in both.

    Attributes:
        path: Path of the module; ``""`` is the whole model.
        one: Its counts in the first model, ``None`` if it is not there.
        other: Its counts in the other model, ``None`` if it is not there or there is no other model.
    """

    path: str
    one: ModuleCount | None
    other: ModuleCount | None = None

    @property
    def level(self) -> int:
        """How deep in the tree: 0 for the model, 1 for its children."""
        return self.path.count(".") + 1 if self.path else 0

    @property
    def type(self) -> str:
        """Name of the class, both names if they differ."""
        names = [module.type for module in (self.one, self.other) if module]
        return " / ".join(dict.fromkeys(names))


@dataclass(frozen=True)
class Report:
    """What to say about one model, or about two matched by module path.

    Attributes:
        one: Counts of the model.
        other: Counts of the model beside it.
        names: What the two models are called.
        depth: Levels of the module tree to show below the model; 0 shows all.
    """

    one: Counts
    other: Counts | None = None
    names: tuple[str, str] = ("model", "other")
    depth: int = 2

    @property
    def rows(self) -> list[Row]:
        """All modules down to ``depth``, parents first, those of the first model before those of the other alone."""
        left = self.one.by_module
        right = self.other.by_module if self.other else {}
        rows = [Row(path, left.get(path), right.get(path)) for path in _merged(left, right)]
        return [row for row in rows if not self.depth or row.level <= self.depth]

    @property
    def header(self) -> list[str]:
        """Names of the columns of `cells`."""
        if self.other is None:
            return ["module", "type", "params", "multiply-adds", "share"]
        return ["module", "params", "other", "ratio", "multiply-adds", "other", "ratio"]

    @property
    def cells(self) -> list[list[str]]:
        """The rows that count something, formatted: the module by the last part of its path, indented by its level."""
        return [self._cells(row) for row in self.rows if row.level == 0 or _counts_something(row)]

    def _cells(self, row: Row) -> list[str]:
        name = "  " * row.level + row.path.rpartition(".")[2] if row.path else "total"
        if self.other is None:
            assert row.one is not None, "every row comes from the only model"
            return [name, row.type, f"{row.one.params:,}", f"{row.one.macs:,}", _share(row.one.macs, self.one.macs)]
        params = [module.params if module else None for module in (row.one, row.other)]
        macs = [module.macs if module else None for module in (row.one, row.other)]
        return [name, *map(_number, params), _ratio_text(*params), *map(_number, macs), _ratio_text(*macs)]

    def notes(self) -> list[str]:
        """State the convention, and all that the table does not show, one sentence a line."""
        lines = ["1 multiply-add = 1, per sample; convolutions, linear layers, matrix products and attention only."]
        if self.other is not None:
            lines.append(f"ratio = other / first; first: {self.names[0]}; other: {self.names[1]}.")
        models = [(self.names[0], self.one)] + ([(self.names[1], self.other)] if self.other else [])
        for name, counts in models:
            lines += [f"{name}: {line}" if self.other else line[0].upper() + line[1:] for line in _about(counts)]
        hidden = len([row for row in self.rows if row.level and not _counts_something(row)])
        if hidden:
            lines.append(f"Not shown, because they have no parameters and no multiply-adds: {hidden} modules.")
        return lines

    def to_markdown(self) -> str:
        """A table in Markdown with the notes under it; the tree is indented with non-breaking spaces."""
        lines = ["| " + " | ".join(self.header) + " |"]
        left = 2 if self.other is None else 1
        lines.append("|" + "|".join([" :-- "] * left + [" --: "] * (len(self.header) - left)) + "|")
        for name, *values in self.cells:
            indented = name.replace("  ", "&nbsp;&nbsp;").replace("_", "\\_")
            lines.append("| " + " | ".join([indented, *values]) + " |")
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes())]) + "\n"

    def to_csv(self) -> str:
        """All rows as comma-separated values, numbers bare, empty where a model has no such module."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        pair = self.other is not None
        writer.writerow(
            ["path", "type", "params", "macs"]
            + (["other_params", "other_macs", "params_ratio", "macs_ratio"] if pair else [])
        )
        for row in self.rows:
            one, other = ((m.params, m.macs) if m else (None, None) for m in (row.one, row.other))
            ratios = [ratio(one[0], other[0]), ratio(one[1], other[1])]
            writer.writerow([row.path, row.type, *one, *([*other, *ratios] if pair else [])])
        return text.getvalue()

    def to_json(self) -> str:
        """Give the text of `document`."""
        return json.dumps(self.document(), indent=2) + "\n"

    def document(self) -> dict[str, object]:
        """Plain data for JSON: ``schema``, the counts of the model, its modules, and the same of the other model."""
        result: dict[str, object] = {"schema": 1, "depth": self.depth, **self._model(self.names[0], self.one)}
        if self.other is not None:
            result["other"] = self._model(self.names[1], self.other)
            result["params_ratio"] = ratio(self.one.params, self.other.params)
            result["macs_ratio"] = ratio(self.one.macs, self.other.macs)
        return result

    def _model(self, name: str, counts: Counts) -> dict[str, object]:
        return {
            "model": name,
            "input_shapes": [list(shape) for shape in counts.input_shapes],
            "params": counts.params,
            "trainable": counts.trainable,
            "buffers": counts.buffers,
            "macs": counts.macs,
            "counter": counts.counter,
            "second": counts.second,
            "difference": counts.difference,
            "elementwise": dict(counts.elementwise),
            "unsupported": dict(counts.unsupported),
            "uncalled": list(counts.uncalled),
            "modules": [
                {"path": row.path, "type": module.type, "params": module.params, "macs": module.macs}
                for row in Report(counts, depth=self.depth).rows
                if (module := row.one)
            ],
        }


def ratio(one: int | None, other: int | None) -> float | None:
    """``other / one``; ``None`` where one of them is missing or there is nothing to divide by."""
    return None if one is None or other is None or one == 0 else other / one


def _merged(left: Mapping[str, ModuleCount], right: Mapping[str, ModuleCount]) -> Iterator[str]:
    """Paths of both trees, parents first; the children of a path in the order of the left tree, then of the right."""
    children: dict[str, list[str]] = {}
    for path in dict.fromkeys([*left, *right]):
        if path:
            children.setdefault(path.rpartition(".")[0], []).append(path)
    stack = [""]
    while stack:
        path = stack.pop()
        yield path
        stack += reversed(children.get(path, []))


def _counts_something(row: Row) -> bool:
    return any(module is not None and (module.params or module.macs) for module in (row.one, row.other))


def _number(value: int | None) -> str:
    return ABSENT if value is None else f"{value:,}"


def _ratio_text(one: int | None, other: int | None) -> str:
    value = ratio(one, other)
    return ABSENT if value is None else f"{value:.3f}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else ABSENT


def _shapes(shapes: Sequence[Sequence[int]]) -> str:
    return ", ".join("x".join(map(str, shape)) or "one number" for shape in shapes)


def _about(counts: Counts) -> Iterator[str]:
    """What to know about the counts of one model, one sentence each."""
    agree = counts.difference or f"{SECOND} counts the same"
    yield f"input {_shapes(counts.input_shapes)}; counted by {counts.counter}; {agree}."
    yield f"{counts.params:,} parameters, {counts.trainable:,} of them trainable; {counts.buffers:,} values in buffers."
    if counts.elementwise:
        listed = ", ".join(f"{name} {n:,}" for name, n in counts.elementwise.items())
        yield f"not in the multiply-adds: {listed} operations."
    if counts.unsupported:
        names = sorted(name.removeprefix("aten::") for name in counts.unsupported)
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        yield f"not counted at all: {shown}."
    idle = [path for path in counts.uncalled if path.rpartition(".")[0] not in counts.uncalled]
    listed = ", ".join(f"{path} ({n:,} parameters)" for path in idle if (n := counts.by_module[path].params))
    if listed:
        yield f"not run in evaluation mode, though its parameters are counted: {listed}."
