"""The plot of a quality benchmark: accuracy by method, a panel a cell."""

from __future__ import annotations

from pathlib import Path

from _quality_report import Measured
from _quality_results import Kind, summaries

_LOOKS: dict[Kind, tuple[str, str, str, float]] = {
    "steps": ("o", "#1f4e79", "#1f4e79", 0.12),
    "bytes": ("D", "white", "#c55a11", -0.12),
}
"""By what is held equal: marker, its fill and edge, and how far above the method's line it is."""
_COLUMNS = 3


def draw(found: Measured, path: Path) -> None:
    """Write an SVG whose bytes follow from what was found, with bars of one standard deviation.

    Raises:
        SystemExit: if there is nothing to draw, or nothing to draw it with.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("matplotlib is not installed here; pip install 'weft[plots]'") from None
    made = {kind: summaries(found.results, kind) for kind in found.kinds}
    cells = [cell for cell in found.plan.cells if any(key[0] == cell for key in made["steps"])]
    if not cells:
        raise SystemExit("there is no result to draw yet; run the benchmark without --report")
    known = {method for _, method in made["steps"]}
    methods = [m.name for m in reversed(found.plan.methods) if m.name in known]
    rows = -(-len(cells) // _COLUMNS)
    columns = min(len(cells), _COLUMNS)
    with rc_context({"svg.hashsalt": "weft", "svg.fonttype": "none", "font.size": 9}):
        size = (1.6 + 2.6 * columns, 0.8 + (0.5 + 0.3 * len(methods)) * rows)
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
        for empty in panels[len(cells) :]:
            empty.set_visible(False)
        for axes, cell in zip(panels, cells, strict=False):
            for kind in found.kinds:
                marker, fill, edge, above = _LOOKS[kind]
                points = [
                    (100 * one.mean, place + above, 100 * (one.spread or 0.0))
                    for place, method in enumerate(methods)
                    if (one := made[kind].get((cell, method))) is not None
                ]
                values, places, spreads = zip(*points, strict=True) if points else ((), (), ())
                axes.errorbar(
                    values,
                    places,
                    xerr=spreads,
                    fmt=marker,
                    mfc=fill,
                    mec=edge,
                    ecolor=edge,
                    ms=5,
                    label=f"equal {kind}",
                )
            axes.set_title(cell.title, fontsize=9)
            axes.set_yticks(range(len(methods)), methods)
            axes.grid(axis="x", color="#dddddd", lw=0.6)
            axes.set_axisbelow(True)
        figure.supxlabel("accuracy, %", fontsize=9)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None})
