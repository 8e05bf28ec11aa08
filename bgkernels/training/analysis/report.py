"""The table at the end of an analysis."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from bgkernels.training.analysis.run import Analysis
from bgkernels.training.errors import extra
from bgkernels.training.evaluate import Estimate

if TYPE_CHECKING:
    from rich.table import Table

ROWS = {
    "cross_entropy": "student's cross-entropy on files",
    "kl": "KL(teacher‖student) on files",
    "teacher_text_kl": "the same on the teacher's text",
    "own_text_kl": "the same on the student's text",
    "exposure_bias": "exposure bias: their difference",
}


def table(analysis: Analysis) -> Table:
    """Every measure by bridges and gardens, in nats a token, and ExAccErr in percent."""
    with extra():
        from rich.table import Table
    threshold = analysis.config.pair.evaluation.threshold
    grid = Table(
        title="Where the student is wrong",
        caption=f"± standard error over {analysis.prompts} prompts. Bridges: tokens where the "
        f"teacher's entropy is below {threshold:g}·log V. ExAccErr (Arora et al. 2022): by how "
        "much the errors on the student's own text exceed those on the teacher's, up to a length.",
        caption_justify="left",
    )
    for title in ("nats a token", "all", "bridges", "gardens"):
        grid.add_column(title, justify="left" if title == "nats a token" else "right")
    for name, title in ROWS.items():
        parts = analysis.measures[name]
        grid.add_row(title, *(_cell(x, "", 3) for x in parts.values()))
    grid.add_section()
    for length, parts in analysis.accumulation.items():
        cells = (_cell(x, " %", 0, 100) for x in parts.values())
        grid.add_row(f"ExAccErr, {length} tokens", *cells)
    return grid


def _cell(x: Estimate, unit: str, digits: int, factor: float = 1.0) -> str:
    if math.isnan(x.mean):
        return "–"
    mean, error = x.mean * factor, x.error * factor
    return f"{mean:.{digits}f}{unit} [dim]±{error:.{digits}f}[/]"
