"""The demo in words and figures: its table, and tables as Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bgkernels.training.errors import extra
from bgkernels.training.evaluate import Estimate
from bgkernels.training.methods import find
from bgkernels.training.results import DemoResult
from bgkernels.vocabularies import Coverage

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Row:
    """A measure in the table.

    Args:
        name: its key in :data:`~bgkernels.training.evaluate.Measures`.
        title: what the reader sees.
        lower_is_better: mark the lowest value of each line.
    """

    name: str
    title: str
    lower_is_better: bool = True


SECTIONS = {
    "Held-out files": [
        Row("cross_entropy", "cross-entropy"),
        Row("kl", "KL(teacher‖student)"),
    ],
    "Teacher's continuations": [
        Row("teacher_text_kl", "KL(teacher‖student)"),
    ],
    "Student's continuations": [
        Row("own_text_kl", "KL(teacher‖student)"),
        Row("exposure_bias", "excess of that KL"),
        Row("excess_error", "the same, relative"),
        Row("own_text_teacher_nll", "teacher's surprise", lower_is_better=False),
    ],
}
"""The texts that are scored, and what is measured on each."""


MARKED = {
    "right": "right, sampled",
    "greedy": "right, greedy",
    "wrong_bridge": "first wrong at a bridge",
    "wrong_garden": "first wrong in a garden",
}
"""What the marks of a task's solutions say."""
BETTER_HIGH = ("right", "greedy")
"""Those of them of which more is better."""


def two_tokenizers(found: Coverage) -> str:
    """What student and teacher share, in a line."""
    return (
        f"two tokenizers: {found.student:.0%} of the student's tokens in the text are tokens of "
        f"the teacher, and {found.aligned:.0%} of its positions have a soft label"
    )


def left_out(unusable: Sequence[str]) -> str:
    """How many records were left out, and why the first of them were."""
    named = "; ".join(unusable[:3]) + ("; …" if len(unusable) > 3 else "")
    return f"{len(unusable)} records were left out: {named}"


def table(result: DemoResult) -> Table:
    """Every measure of every student, in nats a token, with standard errors over the prompts.

    What a task's solutions are worth comes first. The best value of a line is bold.
    """
    with extra():
        from rich.table import Table
    students = result.students.values()
    grid = Table(
        title="Students of one teacher, in nats per token",
        caption=result.caption,
        caption_justify="left",
    )
    grid.add_column("")
    for method in result.students:
        grid.add_column(find(method).title, justify="right")
    if marks := [student.marks for student in students if student.marks]:
        grid.add_row("[bold cyan]Solutions of test problems[/]")
        for name, title in MARKED.items():
            best = max(values[name] for values in marks) if name in BETTER_HIGH else None
            grid.add_row(f"  {title}", *(mark(f"{x[name]:.1%}", x[name] == best) for x in marks))
        grid.add_section()
    for section, rows in SECTIONS.items():
        shares = [student.measures[rows[0].name]["bridge"].share for student in students]
        grid.add_row(f"[bold cyan]{section}[/]")
        for row in rows:
            for part, label in (
                ("all", row.title),
                ("bridge", "  bridges"),
                ("garden", "  gardens"),
            ):
                estimates = [student.measures[row.name][part] for student in students]
                grid.add_row(f"  {label}", *_cells(estimates, row.lower_is_better))
        grid.add_row("  bridges : gardens", *(f"{x:.1%} : {1 - x:.1%}" for x in shares))
        grid.add_section()
    grid.add_row("Training time", *(f"{student.history.seconds:.0f} s" for student in students))
    return grid


def markdown(*parts: Table | str) -> str:
    """Tables and paragraphs as Markdown, for a page.

    Example:
        >>> from rich.table import Table
        >>> table = Table("a", "b", title="Letters")
        >>> table.add_row("[bold]1[/]", "2")
        >>> print(markdown(table))
        **Letters**
        <BLANKLINE>
        | a | b |
        |---|---|
        | 1 | 2 |
        <BLANKLINE>
    """
    with extra():
        from rich import box
        from rich.console import Console
    console = Console(width=1000, no_color=True, force_terminal=False)
    pieces = []
    for part in parts:
        if isinstance(part, str):
            pieces.append(f"{part}\n")
            continue
        bare = copy(part)
        bare.box, bare.title, bare.caption, bare.show_edge = box.MARKDOWN, None, None, True
        with console.capture() as captured:
            console.print(bare)
        rows = [line.rstrip() for line in captured.get().splitlines() if line.strip()]
        rules = [i for i, line in enumerate(rows) if not set(line) - set("|-: ")][1:]
        kept = [line for i, line in enumerate(rows) if i not in rules]
        pieces += [f"**{part.title}**\n", "\n".join(kept) + "\n"]
        pieces += [f"{part.caption}\n"] if part.caption else []
    return "\n".join(pieces)


def _cells(estimates: list[Estimate], lower_is_better: bool) -> list[str]:
    """Figures, of which the lowest is bold; a dash where no token was found."""
    best = min(x.mean for x in estimates) if lower_is_better else None
    return [mark(figure(x), x.mean == best) for x in estimates]


def figure(estimate: Estimate) -> str:
    """A mean and its standard error; a dash where no token was found."""
    if math.isnan(estimate.mean):
        return "–"
    return f"{estimate.mean:.3f} [dim]±{estimate.error:.3f}[/]"


def mark(text: str, best: bool) -> str:
    """Bold if it is the best."""
    return f"[bold]{text}[/]" if best else text
