"""Many methods beside each other: the table and the picture of ``bgkernels compare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bgkernels.training.errors import extra
from bgkernels.training.figure import OWN, PARTS, TAUGHT, picture
from bgkernels.training.methods import find
from bgkernels.training.report import figure, mark
from bgkernels.training.results import DemoResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

COMPARED = (
    ("cross_entropy", "all", "cross-entropy"),
    ("kl", "all", "KL"),
    ("kl", "bridge", "KL, bridges"),
    ("kl", "garden", "KL, gardens"),
    ("own_text_kl", "all", "KL, own text"),
    ("exposure_bias", "all", "exposure bias"),
)
"""Measure, part and title of the columns of :func:`table`."""


def table(result: DemoResult) -> Table:
    """A row for each method: the table of ``bgkernels compare``. The lowest of a column is bold."""
    with extra():
        from rich.table import Table
    grid = Table(
        title="Students of one teacher by method, in nats per token",
        caption=f"{result.caption} {cost(result)}".strip(),
        caption_justify="left",
    )
    for name in ("method", *(name for *_, name in COMPARED), "time"):
        grid.add_column(name, justify="left" if name == "method" else "right")
    found = {
        m: [s.measures[n][part] for n, part, _ in COMPARED] for m, s in result.students.items()
    }
    best = [min(x.mean for x in column) for column in zip(*found.values(), strict=True)]
    for method, row in found.items():
        cells = [mark(figure(x), x.mean == low) for x, low in zip(row, best, strict=True)]
        seconds = result.students[method].history.seconds
        grid.add_row(find(method).title, *cells, f"{seconds:.0f} s")
    return grid


def cost(result: DemoResult) -> str:
    """How long the students that wrote text themselves were trained, against soft labels alone."""
    seconds = {m: s.history.seconds for m, s in result.students.items()}
    writers = [m for m in seconds if find(m).written_by_student]
    if "soft" not in seconds or not writers:
        return ""
    ratios = (f"{find(m).title} {seconds[m] / seconds['soft']:.1f} ×" for m in writers)
    return f"Against soft-only, {', '.join(ratios)} the time of training."


PANELS = {
    "KL(teacher‖student)": {
        "on held-out files": ("kl", "all", TAUGHT),
        "on its own text": ("own_text_kl", "all", OWN),
    },
    "The same, by kind of token": {
        "bridges": ("kl", "bridge", PARTS["bridge"]),
        "gardens": ("kl", "garden", PARTS["garden"]),
    },
    "Exposure bias": {"own − teacher's text": ("exposure_bias", "all", OWN)},
}
"""Measure, part and colour of what is drawn, by panel and label."""


def draw(result: DemoResult, path: Path) -> None:
    """Write the picture as a PNG: a line for each method."""
    methods = list(result.students)
    with picture(path, (14, 1.6 + 0.3 * len(methods)), result.title) as figure:
        panels = figure.subplots(1, len(PANELS), sharey=True)
        for axes, (name, measures) in zip(panels, PANELS.items(), strict=True):
            for label, (measure, part, colour) in measures.items():
                _dots(axes, result, measure, part, label, colour)
            axes.set(title=name, xlabel="nats per token ± standard error")
            if all(measure != "exposure_bias" for measure, *_ in measures.values()):
                axes.set_xscale("log")  # a divergence is positive, and some are far off
            axes.legend(loc="best", fontsize=8)
        panels[0].set_yticks(range(len(methods)), [find(m).title for m in methods])
        panels[0].invert_yaxis()


def _dots(axes: Axes, result: DemoResult, measure: str, part: str, label: str, colour: str) -> None:
    found = [student.measures[measure][part] for student in result.students.values()]
    axes.errorbar(
        [x.mean for x in found],
        range(len(found)),
        xerr=[x.error for x in found],
        fmt="o",
        ms=5,
        elinewidth=1,
        color=colour,
        label=label,
    )
