"""The tables of a page, from the values of a run's JSON files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from bgkernels.training.analysis.report import ROWS
from bgkernels.training.comparison import COMPARED
from bgkernels.training.marks import PROBLEMS
from bgkernels.training.page.content import Cell, Table
from bgkernels.training.report import MARKED

MISSING = Cell("–")


def answers(marks: Mapping[str, Mapping[str, float]]) -> Iterator[Table]:
    """Who solves the problems of a task; nothing without a task.

    Args:
        marks: by model, of :meth:`bgkernels.training.marks.Marks.measures`.
    """
    students = [values for name, values in marks.items() if name != "teacher"]
    if not students:
        return
    best = {name: max(values[name] for values in students) for name in ("right", "greedy")}
    yield Table(
        "Right answers",
        tuple(MARKED.values()),
        {
            model: tuple(
                Cell(
                    f"{100 * values[name]:.1f} %",
                    share=values[name],
                    best=model != "teacher" and values[name] == best.get(name),
                )
                for name in MARKED
            )
            for model, values in marks.items()
        },
        f"Of {PROBLEMS} test problems that nobody was taught. Sampled: eight solutions of each at "
        "temperature 1, of which this share is right; greedy: one, always the most probable token. "
        "The last two columns are the sampled solutions whose first wrong token is a bridge (one "
        "token is right there) or in a garden (several are).",
    )


def distances(students: Mapping[str, Mapping[str, Any]], caption: str) -> Iterator[Table]:
    """How far each student is from the teacher; nothing without a teacher.

    Args:
        students: by method, as ``results.json`` has them.
        caption: how to read it.
    """
    measured = {method: s["measures"] for method, s in students.items() if s["measures"]}
    if not measured:
        return
    lowest = [
        min(m[name][part]["mean"] or math.inf for m in measured.values())
        for name, part, _ in COMPARED
    ]
    yield Table(
        "Distance from the teacher, in nats a token",
        (*(title for *_, title in COMPARED), "training"),
        {
            method: (
                *(
                    estimated(measures[name][part], low)
                    for (name, part, _), low in zip(COMPARED, lowest, strict=True)
                ),
                Cell(f"{students[method]['history']['seconds']:.0f} s"),
            )
            for method, measures in measured.items()
        },
        caption,
    )


def differences(measures: Mapping[str, Mapping[str, Any]]) -> Table:
    """Every measure of an analysis, by kind of token."""
    return Table(
        "Nats a token",
        ("all", "bridges", "gardens"),
        {
            title: tuple(estimated(part) for part in measures[name].values())
            for name, title in ROWS.items()
        },
        "± standard error over prompts. Bridges: tokens where the teacher's entropy is low.",
    )


def compared(
    title: str, rows: list[dict[str, Any]], setting: str, teacher: Mapping[str, float]
) -> Table:
    """Right answers of the students of a setting, on the mean over seeds.

    Args:
        title: of the table.
        rows: students at the rates that were chosen, of all settings.
        setting: whose students are shown.
        teacher: its marks.
    """
    by_method: dict[str, list[Mapping[str, float]]] = {"teacher": [teacher]}
    for row in rows:
        if row["setting"] == setting:
            by_method.setdefault(row["method"], []).append(row["measures"])
    return Table(
        title,
        tuple(MARKED.values()),
        {
            method: tuple(_spread([x[name] for x in found]) for name in MARKED)
            for method, found in by_method.items()
        },
        "Means over seeds, and the least and the most of them.",
    )


def _spread(values: list[float]) -> Cell:
    mean = sum(values) / len(values)
    note = f"{100 * min(values):.0f} to {100 * max(values):.0f}" if len(values) > 1 else ""
    return Cell(f"{100 * mean:.1f} %", note, mean)


def estimated(value: Mapping[str, float | None], lowest: float | None = None) -> Cell:
    """A mean and its standard error; a dash where no token was found."""
    mean, error = value["mean"], value["error"]
    if mean is None or error is None:
        return MISSING
    return Cell(f"{mean:.3f}", f"±{error:.3f}", best=mean == lowest)
