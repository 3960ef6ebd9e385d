"""The plots of quality benchmarks: accuracy by method, a panel a cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from _quality_report import Measured
from _quality_results import Summary, summaries

_LOOKS: tuple[tuple[str, str, str, float], ...] = (
    ("o", "#1f4e79", "#1f4e79", 0.12),
    ("D", "white", "#c55a11", -0.12),
)
"""Of the first and second series: marker, its fill and edge, and how far above the line it is."""
_COLUMNS = 3


@dataclass(frozen=True, slots=True)
class Panel:
    """A cell: what it is called, and two series of scores at most, by method."""

    title: str
    series: Mapping[str, Mapping[str, Summary]]


def draw(found: Measured, path: Path) -> None:
    """Write an SVG whose bytes follow from what was found, with bars of one standard deviation.

    Raises:
        SystemExit: if there is nothing to draw, or nothing to draw it with.
    """
    made = {f"equal {kind}": summaries(found.results, kind) for kind in found.kinds}
    panels = []
    for cell in found.plan.cells:
        own = {
            name: {method: one for (place, method), one in scores.items() if place == cell}
            for name, scores in made.items()
        }
        if any(own.values()):
            panels.append(Panel(cell.title, own))
    draw_panels(panels, [method.name for method in found.plan.methods], path)


def draw_panels(panels: Sequence[Panel], order: Sequence[str], path: Path) -> None:
    """Write panels as an SVG, with bars of one standard deviation.

    Args:
        panels: what to draw.
        order: the methods from top to bottom; those without a score are left out.
        path: where to.

    Raises:
        SystemExit: if there is nothing to draw, or nothing to draw it with.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("matplotlib is not installed here; pip install 'weft[plots]'") from None
    if not panels:
        raise SystemExit("there is no result to draw yet; run the benchmark without --report")
    known = {method for panel in panels for one in panel.series.values() for method in one}
    methods = [method for method in reversed(order) if method in known]
    rows = -(-len(panels) // _COLUMNS)
    columns = min(len(panels), _COLUMNS)
    with rc_context({"svg.hashsalt": "weft", "svg.fonttype": "none", "font.size": 9}):
        size = (1.6 + 2.6 * columns, 0.8 + (0.5 + 0.3 * len(methods)) * rows)
        figure = Figure(figsize=size, layout="constrained")
        places = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
        for empty in places[len(panels) :]:
            empty.set_visible(False)
        for axes, panel in zip(places, panels, strict=False):
            for (name, scores), look in zip(panel.series.items(), _LOOKS, strict=False):
                marker, fill, edge, above = look
                points = [
                    (100 * one.mean, place + above, 100 * (one.spread or 0.0))
                    for place, method in enumerate(methods)
                    if (one := scores.get(method)) is not None
                ]
                values, heights, spreads = zip(*points, strict=True) if points else ((), (), ())
                axes.errorbar(
                    values,
                    heights,
                    xerr=spreads,
                    fmt=marker,
                    mfc=fill,
                    mec=edge,
                    ecolor=edge,
                    ms=5,
                    label=name,
                )
            axes.set_title(panel.title, fontsize=9)
            axes.set_yticks(range(len(methods)), methods)
            axes.grid(axis="x", color="#dddddd", lw=0.6)
            axes.set_axisbelow(True)
        figure.supxlabel("accuracy, %", fontsize=9)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None})
