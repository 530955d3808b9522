"""The picture of a search."""

from __future__ import annotations

import numpy as np
import pytest

from morph.errors import PictureError
from morph.search_picture import drop_maps, search_figure, search_picture
from morph.student_picture import StudentRow, students_figure, students_picture


def dense(blocks=2, layers=4):
    rows = []
    for block in range(blocks):
        sources = [f"stages.{2 * block - 1}.2" if block else "stem"]
        for layer in range(layers):
            name = f"stages.{2 * block}.{layer}"
            for i, source in enumerate(sources):
                row = {"layer": f"{name}.conv1", "source": source, "kind": "connection", "gates": 12}
                rows.append(row | {"closed": (5 * layer + 3 * i + block) % 13})
            bottleneck = {"layer": f"{name}.conv2", "source": f"{name}.conv1", "kind": "producer", "gates": 48}
            rows.append(bottleneck | {"closed": 12 * layer})
            sources.append(f"{name}.conv2")
        for source in sources:
            row = {"layer": f"stages.{2 * block + 1}.2", "source": source, "kind": "connection", "gates": 12}
            rows.append(row | {"closed": 0})
    return rows


HISTORY = [{"step": 10 * i, "gates_open": 100 - i * i, "gates_total": 100, "macs": 5000 - 40 * i * i} for i in range(9)]


def test_maps_hold_the_share_of_each_connection():
    maps = drop_maps(dense())
    assert list(maps) == ["stages.0", "stages.2"]
    found = maps["stages.2"]
    assert found.shape == (4, 4)
    for layer in range(4):
        for source in range(4):
            wanted = (5 * layer + 3 * source + 1) % 13 / 12 if source <= layer else np.nan
            assert np.array_equal(found[source, layer], wanted, equal_nan=True)


def test_nets_without_dense_blocks_have_bars_alone():
    rows = [
        {"layer": f"layer1.{i}.conv2", "source": f"layer1.{i}.conv1", "kind": "producer", "gates": 8, "closed": i}
        for i in range(5)
    ]
    assert drop_maps(rows) == {}
    figure = search_figure(rows, HISTORY, title="net")
    assert [bar.get_height() for bar in figure.axes[0].patches] == [i / 8 for i in range(5)]


def test_the_course_is_drawn():
    figure = search_figure(dense(), HISTORY, title="net")
    lines = [line.get_ydata() for axes in figure.axes for line in axes.get_lines()]
    assert [list(y) for y in lines] == [[r["gates_open"] for r in HISTORY], [r["macs"] for r in HISTORY]]


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_the_same_rows_give_the_same_file(tmp_path, suffix):
    for name in ("one", "two"):
        search_picture(dense(), HISTORY, (tmp_path / name).with_suffix(suffix), title="$net$")
    one, two = ((tmp_path / name).with_suffix(suffix).read_bytes() for name in ("one", "two"))
    assert one == two


def test_refusals(tmp_path):
    with pytest.raises(PictureError, match="no gates"):
        search_picture([], [], tmp_path / "a.svg", title="")


def test_students_stand_at_their_sizes_and_errors(tmp_path):
    rows = [
        StudentRow("ours", 700_000, 90_000_000, 5.5, 4.7),
        StudentRow("DenseNet(50,12)", 218_470, 88_488_954, 6.5, None),
    ]
    figure = students_figure(rows, title="students")
    for axes, sizes in zip(figure.axes, ([r.params for r in rows], [r.macs for r in rows]), strict=True):
        marks = {(line.get_xdata()[0], line.get_ydata()[0], line.get_marker()) for line in axes.get_lines()}
        wanted = {(sizes[0], 5.5, "o"), (sizes[0], 4.7, "x"), (sizes[1], 6.5, "o")}
        assert wanted == {mark for mark in marks if mark[2] != "None"}
    students_picture(rows, tmp_path / "students.svg", title="students")
    with pytest.raises(PictureError, match="no students"):
        students_picture([], tmp_path / "none.svg", title="")
