"""The recipe in a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bgkernels.training.errors import extra
from bgkernels.training.recipe.exam import error
from bgkernels.training.recipe.run import STAGES, RecipeResult

if TYPE_CHECKING:
    from rich.table import Table


def table(result: RecipeResult) -> Table:
    """Marks after each stage, with standard errors over the problems."""
    with extra():
        from rich.table import Table
    examined = result.config.examined
    notes = [f"{n:,.0f} {what}" for m in result.marks.values() for what, n in m.notes.items()]
    grid = Table(
        title=f"The recipe on {result.config.task}",
        caption=f"Share of {examined} held-out problems that are answered rightly, ± standard "
        "error; cross-entropy of right solutions in nats a token; seconds of the processor. "
        f"{', '.join(notes)}.",
        caption_justify="left",
    )
    for name in ("after", "parameters", "sampled", "greedy", "nats", "time"):
        grid.add_column(name, justify="left" if name == "after" else "right")
    for name, marks in result.marks.items():
        grid.add_row(
            STAGES[name].title,
            f"{marks.parameters:,}",
            *(f"{x:.1%} [dim]±{error(x, examined):.1%}[/]" for x in (marks.sampled, marks.greedy)),
            f"{marks.cross_entropy:.3f}",
            f"{marks.processor_seconds:.0f} s",
        )
    return grid
