"""The picture of the study: a row for each size of student."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bgkernels.training.claims import Interval, Measured
from bgkernels.training.figure import OWN, PARTS, TAUGHT, picture
from bgkernels.training.study.lesson import STUDIED
from bgkernels.training.study.run import StudyResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PARTED = {"bias_bridge": PARTS["bridge"], "bias_garden": PARTS["garden"]}
LABELS = {
    "taught_loss": "on the teacher's texts",
    "own_loss": "on its own texts",
    "bias_bridge": "from bridges",
    "bias_garden": "from gardens",
}


def draw(result: StudyResult, path: Path) -> None:
    """Write the picture as a PNG."""
    rows, title = len(result.measured), "Bridges and gardens in a world that is known exactly"
    with picture(path, (15, 1 + 4.2 * rows), title) as figure:
        grid = figure.subplots(rows, 3, squeeze=False, width_ratios=[1, 0.8, 1.1])
        for axes, (hidden, methods) in zip(grid, result.measured.items(), strict=True):
            axes[0].set_ylabel(f"{hidden} hidden units", fontsize=12, fontweight="bold")
            _bars(axes[0], methods, {"taught_loss": TAUGHT, "own_loss": OWN})
            _bars(axes[1], methods, PARTED)
            _plane(axes[2], methods)
            axes[1].set_yticklabels([])
        for cell in grid[0][:2]:
            cell.legend(loc="lower right", fontsize=8)
        titles = ("Loss KL(teacher‖student)", "Exposure bias", "κ-weighted error, nats a text")
        for cell, title in zip(grid[0], titles, strict=True):
            cell.set_title(title)


def _bars(axes: Axes, methods: dict[str, Measured], measures: dict[str, str]) -> None:
    """Horizontal bars with intervals, one group a method, in nats a token."""
    height = 0.8 / len(measures)
    for i, (name, colour) in enumerate(measures.items()):
        found = [Interval.of(measured[name]) for measured in methods.values()]
        means = [x.mean for x in found]
        axes.barh(
            [y + (i - (len(measures) - 1) / 2) * height for y in range(len(methods))],
            means,
            height * 0.9,
            xerr=[[x.mean - x.low for x in found], [x.high - x.mean for x in found]],
            color=colour,
            label=LABELS[name],
            error_kw={"elinewidth": 1, "ecolor": "#333333"},
        )
    axes.set_yticks(range(len(methods)), [STUDIED[method].title for method in methods], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color="#333333", lw=0.8)
    axes.set_xlabel("nats a token")


def _plane(axes: Axes, methods: dict[str, Measured]) -> None:
    """Every method by its error at bridges and in gardens: the lower left is best."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    for method, measured in methods.items():
        x, y = (Interval.of(measured[f"error_{kind}"]) for kind in ("bridge", "garden"))
        axes.errorbar(
            x.mean,
            y.mean,
            xerr=[[x.mean - x.low], [x.high - x.mean]],
            yerr=[[y.mean - y.low], [y.high - y.mean]],
            fmt="o",
            color="#333333",
            ms=4,
            elinewidth=0.8,
        )
        axes.annotate(
            method, (x.mean, y.mean), xytext=(4, 3), textcoords="offset points", fontsize=8
        )
    axes.set(xscale="log", yscale="log", xlabel="at bridges", ylabel="in gardens")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(NullFormatter())
