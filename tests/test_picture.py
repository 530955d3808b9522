from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from morph.errors import OutputError, PictureError
from morph.picture import CellRow, expansion_figure, expansion_picture

ROWS = [
    CellRow("cells.0", 3.1e-3, 16, 2, 1_234),
    CellRow("cells.1", 2.7e-5, 16, 16, 0),
    CellRow("cells.2", 0.0, None, None, 0),
    CellRow("cells.3", None, 1, 1, 0),
    CellRow("odd $x_{$ & <b> \"'", 5.0e-4, 64, 1, 98_765),
]


def texts_of(path: Path) -> str:
    return " ".join("".join(element.itertext()) for element in ET.parse(path).iter() if element.tag.endswith("text"))


@pytest.mark.parametrize(
    ("suffix", "magic"), [(".svg", b"<?xml"), (".png", b"\x89PNG\r\n\x1a\n"), (".pdf", b"%PDF"), (".PNG", b"\x89PNG")]
)
def test_files_have_the_format_of_their_suffix(tmp_path: Path, suffix: str, magic: bytes) -> None:
    path = tmp_path / f"picture{suffix}"
    expansion_picture(ROWS, path, title="a title")
    assert path.read_bytes().startswith(magic)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_svg_shows_every_name_and_number(tmp_path: Path) -> None:
    path = tmp_path / "picture.svg"
    expansion_picture(ROWS, path, title="costs $5 & <more>")
    shown = texts_of(path)
    for expected in [
        *(row.name for row in ROWS),
        "costs $5 & <more>",
        "1,234",
        "98,765",
        "not scored",
        "no grouped convolution",
        "99,999 in all",
    ]:
        assert expected in shown
    assert "cells.9" not in shown


def test_the_same_rows_give_the_same_file(tmp_path: Path) -> None:
    one, two, other = (tmp_path / f"{name}.svg" for name in ("one", "two", "other"))
    expansion_picture(ROWS[:2], one, title="t")
    expansion_picture(ROWS[:2], two, title="t")
    expansion_picture(ROWS[:1], other, title="t")
    assert one.read_bytes() == two.read_bytes()
    assert one.read_bytes() != other.read_bytes()


@pytest.mark.parametrize(
    ("row", "can_grow", "colour"),
    [
        (CellRow("grown", 1.0, 16, 8, 10), True, "#2b7a3f"),
        (CellRow("kept", 1.0, 16, 16, 0), True, "#3f6fa8"),
        (CellRow("one group", 1.0, 1, 1, 0), False, "#a3a3a3"),
        (CellRow("no groups", 1.0, None, None, 0), False, "#a3a3a3"),
        (CellRow("mixed groups, the largest is left", 1.0, 16, 16, 7), True, "#2b7a3f"),
    ],
)
def test_cells_that_cannot_grow_are_grey(row: CellRow, can_grow: bool, colour: str) -> None:
    assert row.can_grow is can_grow
    assert row.colour == colour
    label = expansion_figure([row], title="t").axes[0].get_yticklabels()[0]
    assert label.get_color() == ("black" if can_grow else "#a3a3a3")


def points(figure: Figure, panel: int) -> set[tuple[float, float]]:
    return {(round(float(x), 9), float(y)) for marks in figure.axes[panel].collections for x, y in marks.get_offsets()}


def test_dots_stand_at_the_scores_and_groups() -> None:
    figure = expansion_figure(ROWS, title="t")
    scores, groups, added = figure.axes
    assert (3.1e-3, 0.0) in points(figure, 0)
    assert (5.0e-4, 4.0) in points(figure, 0)
    assert points(figure, 1) == {(16, 0), (2, 0), (16, 1), (1, 3), (64, 4), (1, 4)}
    arrows = [a for a in groups.texts if getattr(a, "arrow_patch", None) is not None]
    assert {(a.xyann, a.xy) for a in arrows} == {((16, 0), (2, 0)), ((64, 4), (1, 4))}
    assert [bar.get_width() for bar in added.patches] == [row.params_added for row in ROWS]
    bottom, top = scores.get_ylim()
    assert bottom > top  # the first cell is uppermost


@pytest.mark.parametrize(
    ("scores", "scale"),
    [
        ((1e-5, 1e-2), "log"),
        ((0.0, 1e-5, 1e-2), "log"),
        ((1.0, 2.0), "linear"),
        ((0.0, 0.0), "linear"),
        ((None, None), "linear"),
        ((float("nan"), float("inf"), 2.0), "linear"),
    ],
)
def test_scores_that_span_decades_have_a_logarithmic_axis(scores: tuple[float | None, ...], scale: str) -> None:
    rows = [CellRow(f"c{i}", score, 2, 1, 3) for i, score in enumerate(scores)]
    axes = expansion_figure(rows, title="t").axes[0]
    assert axes.get_xscale() == scale
    low, high = axes.get_xlim()
    assert all(low <= max(s, low) <= high for s in scores if s is not None and s < float("inf"))


def test_the_users_settings_of_matplotlib_are_left_alone(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    expansion_picture(ROWS[:1], tmp_path / "p.svg", title="t")
    assert dict(matplotlib.rcParams) == before


def test_other_suffixes_and_no_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PictureError, match=r"p\.jpg: the suffix does not say a format; end the name in \.svg, \.png"):
        expansion_picture(ROWS, tmp_path / "p.jpg", title="t")
    with pytest.raises(PictureError, match=r"p\.svg: there are no cells to draw; give at least one row"):
        expansion_picture([], tmp_path / "p.svg", title="t")
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.png"
    path.write_text("old")
    with pytest.raises(OutputError, match=r"exists already; give another name, or --force"):
        expansion_picture(ROWS[:1], path, title="t")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FigureCanvasAgg, "print_png", full)
    with pytest.raises(OutputError, match=r"not written: No space left on device"):
        expansion_picture(ROWS[:1], path, title="t", force=True)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["p.png"]
    monkeypatch.undo()
    expansion_picture(ROWS[:1], path, title="t", force=True)
    assert path.read_bytes().startswith(b"\x89PNG")
