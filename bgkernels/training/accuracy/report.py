"""The tables of a comparison: students, and what is claimed of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from bgkernels.training.accuracy.run import Result
from bgkernels.training.claims import Finding, Interval, Measured
from bgkernels.training.errors import extra
from bgkernels.training.methods import find

if TYPE_CHECKING:
    from rich.table import Table

SHOWN = {
    "right": ("right", 100),
    "greedy": ("greedy", 100),
    "passed": ("pass@{samples}", 100),
    "wrong_bridge": ("wrong at a bridge", 100),
    "wrong_garden": ("in a garden", 100),
    "slip": ("first wrong token", 1),
    "bias_all": ("EB", 1000),
    "bias_bridge": ("EB, bridges", 1000),
    "bias_garden": ("EB, gardens", 1000),
    "wording": ("wording", 1),
}
"""Measure → title and factor of its column."""

COLOURS = {"holds": "green", "fails": "red", "open": "yellow"}


def table(result: Result) -> Table:
    """A row for each method in each setting: means over the seeds, and half of the interval."""
    with extra():
        from rich.table import Table
    grid = Table(title=_title(result), caption=_caption(result), caption_justify="left")
    grid.add_column("method")
    for title, _ in SHOWN.values():
        grid.add_column(title.format(samples=result.config.samples), justify="right")
    for title in ("rate", "seconds", "writing"):
        grid.add_column(title, justify="right")
    for setting, rates in result.rates.items():
        grid.add_row(f"[bold cyan]{setting}[/]")
        measured = result.measured(setting)
        best = max(float(x["right"].mean()) for x in measured.values())
        for method, rate in rates.items():
            values = measured[method]
            cells = [_cell(values[name], factor) for name, (_, factor) in SHOWN.items()]
            if float(values["right"].mean()) == best:
                cells[0] = f"[bold]{cells[0]}[/]"
            seconds = [f"{x:.1f}" for x in result.costs[setting][method]]
            grid.add_row(f"  {find(method).title}", *cells, f"{rate:g}", *seconds)
        grid.add_section()
    return grid


def _cell(values: Measured | torch.Tensor, factor: float) -> str:
    assert isinstance(values, torch.Tensor)
    known = values[~values.isnan()]
    if not len(known):
        return "–"
    found = Interval.of(known * factor)
    digits = 2 if factor == 1 else 1
    half = (found.high - found.low) / 2
    return f"{found.mean:.{digits}f} [dim]±{half:.{digits}f}[/]"


def _title(result: Result) -> str:
    return f"Students of one teacher on {result.config.task}, {result.config.seeds} seeds"


def _caption(result: Result) -> str:
    config, teacher = result.config, result.teacher
    return (
        f"right: share of {config.problems} × {config.samples} solutions sampled at temperature "
        "1 that are right, in %; greedy: the same of greedy solutions; pass@n: share of problems "
        "with a right solution among all samples. wrong at a bridge, in a garden: share of sampled "
        "solutions whose first wrong token is there, in %; first wrong token: its position. EB: "
        "exposure bias, thousandths of a nat per token. wording: entropy of the choices in "
        "gardens, nats. rate: the learning rate that was best on the validation split. seconds: "
        "CPU time of a training; writing: the part of it in which text was written. ± is half the "
        f"95 % bootstrap interval over seeds. The teacher: {teacher['right']:.1%} right, "
        f"{teacher['greedy']:.1%} greedy, wording {teacher['wording']:.3f}."
    )


def findings(result: Result) -> Table:
    """Each claim in each setting: paired difference, share of seeds, verdict."""
    with extra():
        from rich.table import Table
    grid = Table(
        title="What is claimed, and what was found",
        caption="Differences are paired by seed (shares as numbers from 0 to 1, otherwise nats) "
        "and positive if the claim is true; the interval has 95 %. seeds: those whose difference "
        "is positive. A claim holds or fails if the interval excludes 0, or its margin if it names "
        "one; otherwise it is open. With so few seeds, such intervals are too narrow.",
        caption_justify="left",
    )
    grid.add_column("claim")
    for setting in result.rates:
        grid.add_column(setting, justify="right")
        grid.add_column("seeds", justify="right")
        grid.add_column("verdict")
    every = result.findings()
    for claim in dict.fromkeys(f.claim for f in every):
        by_setting = {f.group: f for f in every if f.claim == claim}
        cells = [x for setting in result.rates for x in _found(by_setting.get(setting), result)]
        grid.add_row(claim.text, *cells)
    return grid


def _found(finding: Finding | None, result: Result) -> tuple[str, str, str]:
    if finding is None:
        return "–", "", ""
    d, seeds = finding.difference, result.config.seeds
    return (
        f"{d.mean:+.3f} [dim]({d.low:+.3f} to {d.high:+.3f})[/]",
        f"{round(finding.wins * seeds)}/{seeds}",
        f"[{COLOURS[finding.verdict]}]{finding.verdict}[/]",
    )


def costs(result: Result) -> str:
    """What the hybrids and on-policy training cost beside soft labels, where all were trained."""
    lines = []
    for setting, measured in result.costs.items():
        if "soft" not in measured:
            continue
        soft = measured["soft"][0]
        ratios = [
            f"{find(method).title} {seconds / soft:.1f} ×"
            for method, (seconds, _) in measured.items()
            if method != "soft"
        ]
        lines.append(f"CPU time of training relative to soft-only, {setting}: {', '.join(ratios)}.")
    return "\n\n".join(lines)
