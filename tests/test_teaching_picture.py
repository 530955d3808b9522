"""Pictures of teaching: what is in them, and that the same rows give the same file."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from morph.errors import OutputError, PictureError, TapError
from morph.teaching_picture import (
    attention_figure,
    attention_maps,
    attention_picture,
    curves_figure,
    curves_picture,
    grid_figure,
    grid_picture,
)
from morph.zoo import build

# Table 1 of the report on hint layers: temperatures 2, 4 .. 14 by alphas.
PAPER = np.array(
    [
        [69.71, 69.66, 70.80, 69.66],
        [69.56, 69.51, 69.81, 69.86],
        [70.13, 70.32, 70.61, 69.60],
        [70.53, 68.97, 70.08, 68.39],
        [70.47, 69.17, 70.27, 70.20],
        [70.11, 71.10, 69.92, 71.09],
        [70.07, 69.97, 69.00, 69.09],
    ]
)
TEMPERATURES, ALPHAS = [2, 4, 6, 8, 10, 12, 14], [0.3, 0.5, 0.7, 0.9]


def test_attention_maps_against_numpy():
    torch.manual_seed(0)
    model, x = build("wrn-10-1").train(), torch.randn(3, 3, 32, 32)
    flags = [module.training for module in model.modules()]
    maps = attention_maps(model, ["groups.0", "groups.1"], x)
    assert flags == [module.training for module in model.modules()]
    seen = []
    handle = model.groups[0].register_forward_hook(lambda m, a, out: seen.append(out))
    model.eval()(x)
    handle.remove()
    squares = (seen[0].detach().numpy() ** 2).mean(1)
    expected = squares / np.sqrt((squares**2).sum((1, 2), keepdims=True))
    np.testing.assert_allclose(maps["groups.0"].numpy(), expected, rtol=1e-5, atol=1e-7)
    assert maps["groups.1"].shape == (3, 16, 16)
    assert list(attention_maps(model, None, x)) == ["groups.0", "groups.1", "relu"]


def test_attention_pictures(tmp_path):
    torch.manual_seed(0)
    networks = {"teacher": build("wrn-16-2"), "student $x": (build("darts-10"), ["cells.2", "cells.9"])}
    x = torch.randn(2, 3, 32, 32)
    maps = {
        "teacher": attention_maps(networks["teacher"], None, x),
        "student": attention_maps(*networks["student $x"], x),
    }
    figure = attention_figure(maps, np.zeros((2, 32, 32, 3)), ["cat", "dog"], title="both")
    images = [axes for axes in figure.axes if axes.images]
    assert len(images) == 2 * (1 + 3 + 2)
    labels = [axes.get_xlabel() for axes in images]
    assert labels.count("cells.9  8x8") == 2
    assert {"cat", "dog"} <= set(labels)
    first = next(axes for axes in images if axes.get_xlabel() == "groups.0  32x32")
    np.testing.assert_array_equal(first.images[0].get_array(), maps["teacher"]["groups.0"][0].numpy())
    options = {"title": "both", "captions": ["cat", "dog"], "mean": [0.5] * 3, "std": [0.25] * 3}
    for name in ("a.svg", "b.svg"):
        attention_picture(networks, x, tmp_path / name, **options)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    with pytest.raises(OutputError, match=r"a\.svg"):
        attention_picture(networks, x, tmp_path / "a.svg", **options)


def test_attention_pictures_that_cannot_be(tmp_path):
    x = torch.randn(2, 3, 32, 32)
    with pytest.raises(PictureError, match="the tap classifier gives no map"):
        attention_picture({"a": (build("wrn-10-1"), ["classifier"])}, x, tmp_path / "a.svg", title="")
    with pytest.raises(PictureError, match="1 captions for 2 images"):
        attention_picture({"a": build("wrn-10-1")}, x, tmp_path / "a.svg", title="", captions=["cat"])
    with pytest.raises(PictureError, match="no images"):
        attention_picture({}, x, tmp_path / "a.svg", title="")
    with pytest.raises(TapError, match="nearest"):
        attention_picture({"a": (nn.Sequential(nn.Conv2d(3, 4, 3)), ["b"])}, x, tmp_path / "a.svg", title="")
    assert not list(tmp_path.iterdir())


def test_curves(tmp_path):
    runs = {
        "alone": [[{"epoch": 1, "val_top1": 0.2}, {"epoch": 2, "val_top1": 0.4}]],
        "taught": [
            [{"epoch": 1, "val_top1": 0.3, "top1": 0.1}, {"epoch": 2, "top1": 0.1}],
            [{"epoch": 1, "val_top1": 0.5}, {"epoch": 2, "val_top1": 0.6}],
        ],
    }
    axes = curves_figure(runs, title="two", metric="val_top1", lines={"teacher": 0.9}).axes[0]
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    np.testing.assert_allclose(lines["taught, 2 runs"], [0.4, 0.6])
    np.testing.assert_allclose(lines["alone"], [0.2, 0.4])
    np.testing.assert_allclose(lines["teacher"], [0.9, 0.9])
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (0.3, 0.6)
    curves_picture(runs, tmp_path / "a.png", title="two")
    assert (tmp_path / "a.png").stat().st_size > 1000
    with pytest.raises(PictureError, match="no rounds"):
        curves_picture(runs, tmp_path / "b.png", title="two", metric="val_top5")


def test_the_grid_of_the_report(tmp_path):
    axes = grid_figure(PAPER / 100, TEMPERATURES, ALPHAS, title="", baseline=0.699).axes[0]
    texts = {text.get_position(): text for text in axes.texts}
    assert len(texts) == 28 + 7 + 4
    rows = [texts[4, i].get_text() for i in range(7)]
    assert rows == ["69.96", "69.69", "70.16", "69.49", "70.03", "70.56", "69.53"]  # printed: 69.35 for the last
    assert [texts[j, 7].get_text() for j in range(4)] == ["70.08", "69.81", "70.07", "69.70"]
    bold = {position for position, text in texts.items() if text.get_weight() == "bold"}
    assert bold == {(j, i) for i, j in zip(*np.nonzero(PAPER > 69.9), strict=True)}
    holes = PAPER / 100
    holes[0, :] = np.nan
    texts = grid_figure(holes, TEMPERATURES, ALPHAS, title="", baseline=None).axes[0].texts
    assert len(texts) == 24 + 6 + 4
    grid_picture(holes, TEMPERATURES, ALPHAS, tmp_path / "grid.svg", title="accuracy")
    assert "accuracy" in (tmp_path / "grid.svg").read_text()


def test_grids_that_cannot_be(tmp_path):
    with pytest.raises(PictureError, match=r"a grid of \(7, 4\) for 6 temperatures"):
        grid_picture(PAPER, TEMPERATURES[1:], ALPHAS, tmp_path / "a.svg", title="")
    with pytest.raises(PictureError, match="no values"):
        grid_picture(PAPER * np.nan, TEMPERATURES, ALPHAS, tmp_path / "a.svg", title="")
    with pytest.raises(PictureError, match="suffix"):
        grid_picture(PAPER, TEMPERATURES, ALPHAS, tmp_path / "a.gif", title="")
