"""Pictures of teaching: where networks look, how accuracy went, and what temperature and alpha give.

Source of the first: Whettam 2020, figures 5.1 and 5.2.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray
from torch import Tensor, nn

from morph.errors import PictureError
from morph.picture import save_figure
from morph.teaching.adapters import layout_of
from morph.teaching.feature_losses import attention_map
from morph.teaching.pairing import aspect_of, stage_taps
from morph.teaching.taps import tap
from morph.tracing import evaluation

Networks = Mapping[str, nn.Module | tuple[nn.Module, Sequence[str]]]
Runs = Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]

_MAP, _HEAT = "inferno", "Blues"
_CELL = 1.15  # inches of one map
_CURVE = 4.2  # inches of the height of curves


def attention_maps(model: nn.Module, taps: Sequence[str] | None, images: Tensor) -> dict[str, Tensor]:
    """Where a network looks: the attention map of each tap, ``[N, H, W]``, in evaluation mode.

    Args:
        model: Not touched; each module gets its training flag back.
        taps: Names as in `morph.tap`, of maps or of tokens that make a square; None for the last before each
            down-sampling.
        images: ``[N, C, H, W]`` as the model takes them.

    Raises:
        PictureError: If a tap gives no map.
        TapError, TraceError: As elsewhere.
    """
    names = [stage.name for stage in stage_taps(model, images[:1], 3)] if taps is None else list(taps)
    with evaluation(model), torch.no_grad():
        features = tap(model, names).features(images)
    found = {}
    for name, value in features.items():
        layout = layout_of(tuple(value.shape), aspect_of(images)) if value.dim() in (2, 3, 4) else None
        if layout is None or not layout.is_map:
            raise PictureError(f"the tap {name} gives no map but {tuple(value.shape)}; name taps that give maps")
        found[name] = attention_map(layout.as_map(value.float())).cpu()
    return found


def attention_picture(
    networks: Networks,
    images: Tensor,
    path: Path,
    *,
    title: str,
    captions: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    force: bool = False,
) -> None:
    """Draw the attention maps of several networks side by side: a block of rows for each image, a row for each tap.

    Each map has a scale of its own, from zero to its largest value, and a square for each of its positions.

    Args:
        networks: By the name that stands above its column, a network, or one with the names of its taps; teacher first.
        images: ``[N, C, H, W]`` as the networks take them.
        path: Where the picture shall stand; ``.svg``, ``.png`` or ``.pdf``.
        title: The line above it.
        captions: What stands beside each image, e.g. its class.
        mean: What was subtracted from each channel of pixels in 0..1; with it the images are shown as they were.
        std: What they were divided by then.
        force: Whether an existing file may be replaced.

    Raises:
        PictureError: If there is nothing to draw, a tap gives no map, or the suffix is unknown.
        OutputError: If the picture cannot be written.
        TapError, TraceError: As elsewhere.
    """
    if captions is not None and len(captions) != len(images):
        raise PictureError(f"{len(captions)} captions for {len(images)} images; give one for each")
    maps = {}
    for name, network in networks.items():
        model, taps = network if isinstance(network, tuple) else (network, None)
        maps[name] = attention_maps(model, taps, images)
    shown = _as_pixels(images, mean, std)
    count = len(images) if networks else 0
    save_figure(lambda: attention_figure(maps, shown, captions, title=title), path, count, "images", force=force)


def attention_figure(
    maps: Mapping[str, Mapping[str, Tensor]], pixels: NDArray[Any], captions: Sequence[str] | None, *, title: str
) -> Figure:
    """The figure of `attention_picture`, on a canvas of its own.

    Args:
        maps: Attention maps ``[N, H, W]`` by network and tap.
        pixels: The images ``[N, H, W, 3]``, in 0..1.
        captions: As there.
        title: As there.
    """
    rows = max(len(of) for of in maps.values())
    columns = 1 + len(maps)
    width, block = 0.5 + columns * _CELL, rows * (_CELL + 0.12) + 0.15
    titles = ["\n".join(textwrap.wrap(name, 18)) for name in maps]
    above = 0.4 + 0.13 * max(title_.count("\n") + 1 for title_ in titles)
    height = above + 0.1 + len(pixels) * block
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=9, parse_math=False, y=1 - 0.15 / height)
    size = _CELL - 0.1

    def place(column: int, top: float) -> Axes:
        left = 0.35 + column * _CELL
        axes = figure.add_axes((left / width, 1 - (top + size) / height, size / width, size / height))
        axes.set_xticks([])
        axes.set_yticks([])
        return axes

    for i, image in enumerate(pixels):
        top = above + i * block
        axes = place(0, top)
        axes.imshow(image, interpolation="nearest")
        axes.set_xlabel(captions[i] if captions else "", fontsize=7, labelpad=2, parse_math=False)
        for column, of in enumerate(maps.values(), 1):
            for row, (tapped, values) in enumerate(of.items()):
                axes = place(column, top + row * (_CELL + 0.12))
                axes.imshow(values[i].numpy(), cmap=_MAP, vmin=0, interpolation="nearest")
                if i == 0 and row == 0:
                    axes.set_title(titles[column - 1], fontsize=7.5, pad=3, parse_math=False)
                size_of = "x".join(map(str, values.shape[1:]))
                axes.set_xlabel(f"{tapped}  {size_of}", fontsize=5.5, labelpad=2, parse_math=False)
    return figure


def curves_picture(
    runs: Runs,
    path: Path,
    *,
    title: str,
    metric: str = "val_top1",
    lines: Mapping[str, float] | None = None,
    force: bool = False,
) -> None:
    """Draw how the accuracy of several students went.

    Args:
        runs: By the name of a student, the histories of its runs (one for each seed): rows with ``epoch`` and
            ``metric``. Of several runs the mean is drawn, and as a band the smallest and largest.
        path: Where the picture shall stand; ``.svg``, ``.png`` or ``.pdf``.
        title: The line above it.
        metric: A fraction that the rows have.
        lines: Levels to draw across, e.g. that of the teacher.
        force: Whether an existing file may be replaced.

    Raises:
        PictureError: If there is nothing to draw or the suffix is unknown.
        OutputError: If the picture cannot be written.
    """
    count = sum(metric in row for histories in runs.values() for history in histories for row in history)
    save_figure(
        lambda: curves_figure(runs, title=title, metric=metric, lines=lines or {}), path, count, "rounds", force=force
    )


def curves_figure(runs: Runs, *, title: str, metric: str, lines: Mapping[str, float]) -> Figure:
    """The figure of `curves_picture`, on a canvas of its own."""
    figure = Figure(figsize=(7.5, _CURVE))
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10, parse_math=False, y=0.97)
    axes = figure.add_axes((0.09, 0.12, 0.6, 0.77))
    colours = colormaps["tab10"].colors  # type: ignore[attr-defined]
    for i, (name, histories) in enumerate(runs.items()):
        by_epoch: dict[int, list[float]] = {}
        for history in histories:
            for row in history:
                if metric in row:
                    by_epoch.setdefault(row["epoch"], []).append(row[metric])
        epochs = sorted(by_epoch)
        values = [by_epoch[epoch] for epoch in epochs]
        label = name if len(histories) == 1 else f"{name}, {len(histories)} runs"
        colour = colours[i % len(colours)]
        axes.plot(epochs, [float(np.mean(v)) for v in values], color=colour, linewidth=1.3, label=label)
        if len(histories) > 1:
            axes.fill_between(
                epochs, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.18, lw=0
            )
    for i, (name, level) in enumerate(lines.items()):
        axes.axhline(level, color="#444444", linewidth=1, linestyle=("--", ":", "-.")[i % 3], label=name)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_xlabel("round through the data", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    legend = axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def grid_picture(
    values: NDArray[Any],
    temperatures: Sequence[float],
    alphas: Sequence[float],
    path: Path,
    *,
    title: str,
    baseline: float | None = None,
    force: bool = False,
) -> None:
    """Draw what each temperature and alpha gives, with the means of rows and columns.

    Source: tables 1 and 3 of the report on hint layers (2020).

    Args:
        values: Fractions ``[temperatures, alphas]``; not-a-number where there is none.
        temperatures: Of the rows.
        alphas: Of the columns.
        path: Where the picture shall stand; ``.svg``, ``.png`` or ``.pdf``.
        title: The line above it.
        baseline: Accuracy without a teacher; cells above it are printed bold.
        force: Whether an existing file may be replaced.

    Raises:
        PictureError: If the sizes do not agree, there is nothing to draw, or the suffix is unknown.
        OutputError: If the picture cannot be written.
    """
    table = np.asarray(values, float)
    if table.shape != (len(temperatures), len(alphas)):
        raise PictureError(
            f"a grid of {table.shape} for {len(temperatures)} temperatures and {len(alphas)} alphas; expected a row "
            "for each temperature and a column for each alpha"
        )
    save_figure(
        lambda: grid_figure(table, temperatures, alphas, title=title, baseline=baseline),
        path,
        int(np.isfinite(table).sum()),
        "values",
        force=force,
    )


def grid_figure(
    table: NDArray[Any],
    temperatures: Sequence[float],
    alphas: Sequence[float],
    *,
    title: str,
    baseline: float | None,
) -> Figure:
    """The figure of `grid_picture`, on a canvas of its own."""
    rows, columns = table.shape
    height = 1.5 + 0.36 * rows
    width = 2.0 + 0.85 * columns
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=9, parse_math=False, y=1 - 0.15 / height)
    bottom = 0.75 if baseline is not None else 0.55
    axes = figure.add_axes((0.6 / width, bottom / height, (width - 0.8) / width, 0.36 * (rows + 1) / height))
    low, high = np.nanmin(table), np.nanmax(table)
    whole = np.full((rows + 1, columns + 1), np.nan)
    whole[:rows, :columns] = table
    axes.imshow(whole, cmap=_HEAT, vmin=low - 0.3 * (high - low), vmax=high, aspect="auto")
    means = np.full_like(whole, np.nan)
    means[:rows, -1] = [_mean(row) for row in table]
    means[-1, :columns] = [_mean(column) for column in table.T]
    for (i, j), value in np.ndenumerate(np.where(np.isnan(whole), means, whole)):
        if np.isfinite(value):
            inside = i < rows and j < columns
            dark = inside and value > low + 0.6 * (high - low)
            bold = inside and baseline is not None and value > baseline
            axes.text(
                j,
                i,
                f"{100 * value:.2f}",
                ha="center",
                va="center",
                fontsize=7.5,
                color="white" if dark else "black" if inside else "#555555",
                weight="bold" if bold else "normal",
            )
    axes.set_yticks(range(rows + 1), [f"{t:g}" for t in temperatures] + ["mean"], fontsize=7.5)
    axes.set_xticks(range(columns + 1), [f"{a:g}" for a in alphas] + ["mean"], fontsize=7.5)
    axes.set_ylabel("temperature", fontsize=8)
    axes.set_xlabel("alpha", fontsize=8)
    if baseline is not None:
        note = f"top-1 in %; without a teacher {100 * baseline:.2f}, above it bold"
        figure.text(0.5, 0.1 / height, note, ha="center", fontsize=7)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def _mean(values: NDArray[Any]) -> float:
    """Of the finite ones; not-a-number if there are none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def _as_pixels(images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> NDArray[Any]:
    """``[N, H, W, 3]`` in 0..1; without statistics each image is stretched from its smallest to its largest value."""
    values = images.detach().float().cpu()
    if mean is not None and std is not None:
        values = values * torch.tensor(std).view(1, -1, 1, 1) + torch.tensor(mean).view(1, -1, 1, 1)
    else:
        low, high = values.amin((1, 2, 3), keepdim=True), values.amax((1, 2, 3), keepdim=True)
        values = (values - low) / (high - low).clamp_min(1e-12)
    values = values[:, :3] if values.shape[1] >= 3 else values[:, :1].expand(-1, 3, -1, -1)
    pixels: NDArray[Any] = values.clamp(0, 1).permute(0, 2, 3, 1).numpy()
    return pixels
