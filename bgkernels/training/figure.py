"""The picture of the demo, and the sheet and colours that all pictures share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bgkernels.training.errors import extra
from bgkernels.training.files import write_atomically
from bgkernels.training.methods import METHODS, find
from bgkernels.training.passage import paint
from bgkernels.training.results import DemoResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {"hard": "#d55e00", "soft": "#0072b2", "entropy": "#009e73"}
"""Of the demo's methods; apart for every kind of colour vision."""

PARTS = {"all": "#333333", "bridge": "#762a83", "garden": "#1b7837"}
"""Of kinds of tokens."""

TAUGHT, OWN = "#92c5de", "#0571b0"
"""Of texts that were given, and of those that the student wrote."""

STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "grid.color": "#e8e8e8",
    "legend.frameon": False,
    "font.size": 10,
}


@contextmanager
def picture(path: Path, size: tuple[float, float], title: str) -> Iterator[Figure]:
    """A figure to draw on, written as a PNG in the end; needs no display.

    Args:
        path: of the file.
        size: width and height, inches.
        title: above everything.
    """
    with extra():
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(title, fontsize=13)
        yield figure
        write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=130))


def draw(result: DemoResult, path: Path) -> None:
    """Write the picture of a few methods as a PNG."""
    with picture(path, (11, 11.4), result.title) as figure:
        axes = figure.subplot_mosaic(
            [["loss", "divergence"], ["parts", "excess"], ["passage", "passage"]],
            height_ratios=[1, 1, 0.9],
            gridspec_kw={"hspace": 0.06, "wspace": 0.06},
        )
        teacher = result.teacher.curve_cross_entropy
        axes["loss"].axhline(teacher, color="#555555", ls="--", label="teacher")
        _curves(axes["loss"], result, "cross_entropy")
        axes["loss"].set_title("Cross-entropy on held-out files")
        axes["loss"].legend(loc="upper right")
        _curves(axes["divergence"], result, "kl")
        axes["divergence"].set_title("KL(teacher‖student) on held-out files")
        _bars(axes["parts"], result, {"kl": "held-out files", "own_text_kl": "own text"})
        axes["parts"].set_title("KL(teacher‖student), by kind of token")
        _bars(axes["excess"], result, {"exposure_bias": "own − teacher's text"})
        axes["excess"].set_title("Exposure bias: excess KL on the student's own text")
        paint(axes["passage"], result.passages[0], result.config.evaluation.threshold)


def _color(method: str) -> Any:
    """The method's colour, or one by its place in the list of all."""
    from matplotlib import colormaps

    others = colormaps["tab20"](range(20))
    return COLORS.get(method, tuple(others[list(METHODS).index(method.split("+")[0]) % 20]))


def _curves(axes: Axes, result: DemoResult, name: str) -> None:
    """A validation curve of each student, without the steep beginning."""
    tops = []
    for method, student in result.students.items():
        curve = student.history.curve
        steps, values = [p["step"] for p in curve], [p[name] for p in curve]
        axes.plot(steps, values, ".-", color=_color(method), label=find(method).title, lw=1.8)
        tops.append(values[len(values) // 5])
    axes.set_ylim(0 if name == "kl" else None, max(tops))
    axes.set_xlabel("step")
    axes.set_ylabel("nats per token")


def _bars(axes: Axes, result: DemoResult, measures: dict[str, str]) -> None:
    """Groups for bridges and gardens on each text; in a group, a bar for each student."""
    groups = [
        (f"{where}s\n{text}", name, where)
        for where in ("bridge", "garden")
        for name, text in measures.items()
    ]
    width = 0.8 / len(result.students)
    for i, (method, student) in enumerate(result.students.items()):
        estimates = [student.measures[name][where] for _, name, where in groups]
        axes.bar(
            [x + (i - (len(result.students) - 1) / 2) * width for x in range(len(groups))],
            [e.mean for e in estimates],
            width * 0.92,
            yerr=[e.error for e in estimates],
            color=_color(method),
            error_kw={"elinewidth": 1, "ecolor": "#333333"},
        )
    axes.set_xticks(range(len(groups)), [label for label, *_ in groups])
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.axhline(0, color="#333333", lw=0.8)
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("nats per token ± standard error")
