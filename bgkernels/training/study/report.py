"""The tables at the end of the study."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bgkernels.training.claims import Interval
from bgkernels.training.errors import extra
from bgkernels.training.study.claims import HYBRID
from bgkernels.training.study.lesson import STUDIED
from bgkernels.training.study.measures import MEASURES
from bgkernels.training.study.run import StudyResult

if TYPE_CHECKING:
    from rich.table import Table

SHOWN = ("taught_loss", "own_loss", "bias", "error_bridge", "error_garden", "broken")
COLOURS = {"holds": "green", "fails": "red", "open": "yellow"}


def table(result: StudyResult) -> Table:
    """Every method at every size: means over the seeds, and half the width of the interval.

    The lowest value of each size is bold.
    """
    with extra():
        from rich.table import Table
    grid = Table(title=_title(result), caption=_caption(result), caption_justify="left")
    grid.add_column("method")
    for name in SHOWN:
        grid.add_column(MEASURES[name], justify="right")
    grid.add_column("time", justify="right")
    for hidden, methods in result.measured.items():
        grid.add_row(f"[bold cyan]{hidden} hidden units[/]")
        found = {m: {n: Interval.of(v[n]) for n in SHOWN} for m, v in methods.items()}
        for method, values in found.items():
            best = {n: min(x[n].mean for x in found.values()) for n in SHOWN}
            cells = [_cell(values[n], values[n].mean == best[n]) for n in SHOWN]
            seconds = f"{result.seconds[hidden][method]:.0f} s"
            grid.add_row(f"  {STUDIED[method].title}", *cells, seconds)
        grid.add_section()
    return grid


def _title(result: StudyResult) -> str:
    return f"Students of one teacher, {result.config.seeds} seeds by each method"


def _caption(result: StudyResult) -> str:
    return (
        "L_T: KL(teacher‖student) on the teacher's texts; L_θ: on the student's own texts; EB = "
        "L_θ − L_T: exposure bias; all in nats per token. κ-weighted error: |π_θ − π_T| weighted "
        "by |κ|, the later cost of each token, in nats per text. P(broken): share of the student's "
        "own texts that break. time: CPU time of a training. ± is half the 95 % bootstrap interval "
        "over seeds. All measures are computed exactly, none is sampled."
    )


def _cell(value: Interval, best: bool) -> str:
    text = f"{value.mean:.3f} [dim]±{(value.high - value.low) / 2:.3f}[/]"
    return f"[bold]{text}[/]" if best else text


def findings(result: StudyResult) -> Table:
    """Each claim at each size: paired difference, share of seeds, verdict."""
    with extra():
        from rich.table import Table
    grid = Table(
        title="What is claimed, and what was found",
        caption=f"The hybrid is the {STUDIED[HYBRID].title} one. Differences are paired by seed "
        "and positive if the claim is true; the interval has 95 %. seeds: those whose difference "
        "is positive. A claim holds or fails if the interval excludes 0; otherwise it is open.",
        caption_justify="left",
    )
    grid.add_column("claim")
    for hidden in result.measured:
        grid.add_column(f"{hidden} units", justify="right")
        grid.add_column("seeds", justify="right")
        grid.add_column("verdict")
    claims = dict.fromkeys(f.claim for f in result.findings)
    for claim in claims:
        row = []
        for f in (f for f in result.findings if f.claim == claim):
            d = f.difference
            wins = f"{round(f.wins * result.config.seeds)}/{result.config.seeds}"
            row += [f"{d.mean:+.4f} [dim]({d.low:+.4f} to {d.high:+.4f})[/]", wins]
            row += [f"[{COLOURS[f.verdict]}]{f.verdict}[/]"]
        grid.add_row(claim.text, *row)
    return grid


def summary(result: StudyResult) -> str:
    """The identity, and what on-policy training costs here."""
    return (
        f"The identity EB = Σ d_θ Σ (π_θ − π_T) κ holds to {result.identity:.1e} nats per text. "
        f"On-policy students took {result.on_policy_cost:.1f} × the CPU time of soft-only ones. "
        f"The study took {result.duration:.0f} s."
    )
