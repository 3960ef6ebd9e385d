"""A stream as a picture: the matrix as a heat map, and what was kept of each task as curves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.continual import Matrix
from orchestrator.stream_report import StreamReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = ("svg", "png")
_MOST_CELLS = 400  # of more, the numbers would be too small to read


class CannotDraw(ValueError):
    """There is nothing to draw, or no file format to draw it in."""


class MissingMatplotlib(ImportError):
    """Drawing needs matplotlib, an optional extra of weft."""


def plot(found: StreamReport, path: Path) -> None:
    """Write a picture of a stream: a heat map and curves for each way of asking.

    The bytes of an SVG follow from what was measured.

    Args:
        found: the stream and its matrices.
        path: where to, an ``.svg`` or a ``.png``.

    Raises:
        CannotDraw: if nothing was measured, or the file is to be of another kind.
        MissingMatplotlib: if it is not installed.
    """
    kind = path.suffix.removeprefix(".").lower()
    if kind not in FORMATS:
        raise CannotDraw(f"a plot is written as {' or '.join(FORMATS)}, got {path.name!r}")
    drawn = {told: scores for told, (scores, _) in found.matrices.items() if scores.tasks}
    if not drawn or not any(v is not None for m in drawn.values() for r in m.rows for v in r):
        raise CannotDraw(
            f"nothing of stream {found.stream.name!r} was measured; give its tasks evaluate, "
            "held-back data, and run it again"
        )
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingMatplotlib(
            "drawing needs matplotlib, which is not installed; run: pip install 'weft[plots]'"
        ) from error
    with rc_context({"svg.hashsalt": "weft", "svg.fonttype": "none", "font.size": 9}):
        width = max(len(m.tasks) for m in drawn.values())
        height = max(len(m.rows) for m in drawn.values())
        size = (6.0 + 0.55 * width, len(drawn) * (1.6 + 0.38 * height))
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(len(drawn), 2, squeeze=False)
        for (told, scores), (left, right) in zip(drawn.items(), panels, strict=True):
            heat = _heat_map(left, scores)
            left.set_title(f"{found.stream.name}: {found.stream.metric}, {told}", fontsize=9)
            figure.colorbar(heat, ax=left, shrink=0.8)
            _curves(right, scores, found.stream.metric)
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(path, format=kind, dpi=150, metadata=metadata)


def _heat_map(axes: Axes, scores: Matrix) -> Any:
    """Draw R[i, j], a row a version; what was not measured is left white."""
    values = [[float("nan") if v is None else v for v in row] for row in scores.rows]
    bounds = {} if scores.lower_is_better else {"vmin": 0.0, "vmax": 1.0}
    colours = "viridis_r" if scores.lower_is_better else "viridis"
    image = axes.imshow(values, aspect="auto", cmap=colours, **bounds)
    axes.set_xticks(range(len(scores.tasks)), scores.tasks, rotation=30, ha="right")
    axes.set_yticks(range(len(scores.rows)), [str(after) for after in scores.after])
    axes.set_xlabel("tested on")
    axes.set_ylabel("tasks learned")
    if len(scores.tasks) * len(scores.rows) <= _MOST_CELLS:
        for i, row in enumerate(scores.rows):
            for j, value in enumerate(row):
                if value is not None:
                    dark = image.norm(value) < 0.6
                    colour = "white" if dark else "black"
                    axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour)
    return image


def _curves(axes: Axes, scores: Matrix, metric: str) -> None:
    """Draw each task's score over the stream, and the mean of those learned so far."""
    for j, task in enumerate(scores.tasks, 1):
        points = [(i, v) for i in scores.after if (v := scores.at(i, j)) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", ms=3, lw=1, label=task)
    means = []
    for i in scores.after:
        known = [v for j in range(1, i + 1) if (v := scores.at(i, j)) is not None]
        if known:
            means.append((i, sum(known) / len(known)))
    if means:
        axes.plot(*zip(*means, strict=True), color="black", lw=2, label="mean of those learned")
    axes.set_xticks(list(scores.after))
    axes.set_xlabel("tasks learned")
    axes.set_ylabel(metric)
    axes.grid(color="#dddddd", lw=0.6)
    axes.set_axisbelow(True)
    axes.legend(fontsize=7, frameon=False)
