"""The comparison: rates are chosen on the validation split, students marked on the test split."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bgkernels.training.accuracy.claims import CLAIMS
from bgkernels.training.accuracy.config import AccuracyConfig, Setting
from bgkernels.training.accuracy.rows import Row, find_cost, find_row
from bgkernels.training.accuracy.school import Class, School, appoint
from bgkernels.training.claims import Finding, Measured, judge
from bgkernels.training.config import plain
from bgkernels.training.machine import machine, one_thread
from bgkernels.training.marks import examine
from bgkernels.training.methods import find
from bgkernels.training.progress import Display, Silent
from bgkernels.training.tasks import parse


@dataclass(frozen=True)
class Result:
    """Everything that was found.

    Args:
        config: what was asked.
        teacher: measures of the teacher's marks.
        rows: all students, those at rates that were not chosen among them.
        rates: setting → method → the rate that was chosen.
        costs: setting → method → processor seconds of training, and of writing among them.
        duration: seconds of this invocation.
    """

    config: AccuracyConfig
    teacher: dict[str, float]
    rows: tuple[Row, ...]
    rates: dict[str, dict[str, float]]
    costs: dict[str, dict[str, tuple[float, float]]]
    duration: float

    def chosen(self, setting: str, method: str) -> list[Row]:
        """The students at the chosen rate, by seed."""
        rate = self.rates[setting][method]
        mine = (r for r in self.rows if (r.setting, r.method, r.rate) == (setting, method, rate))
        return sorted(mine, key=lambda row: row.seed)

    def measured(self, setting: str) -> dict[str, Measured]:
        """Method → measure → its value for each seed."""
        return {method: _columns(self.chosen(setting, method)) for method in self.rates[setting]}

    def findings(self) -> list[Finding]:
        """Every claim in every setting that has its methods."""
        found = []
        for setting in self.rates:
            measured = self.measured(setting)
            for claim in CLAIMS:
                if {claim.better, claim.worse} <= measured.keys():
                    found.append(judge(claim, setting, measured))
        return found

    def plain(self) -> dict[str, Any]:
        """Values for JSON."""
        return {
            "machine": machine(),
            "config": plain(self.config),
            "teacher": self.teacher,
            "rates": self.rates,
            "costs": self.costs,
            "findings": [asdict(f) | {"verdict": f.verdict} for f in self.findings()],
            "duration": self.duration,
            "rows": [asdict(row) for row in self.rows],
        }


def _columns(rows: list[Row]) -> Measured:
    """One value a seed of each measure; NaN where a mean is over nothing."""
    names = rows[0].measures
    return {name: torch.tensor([_number(row.measures[name]) for row in rows]) for name in names}


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def run_accuracy(config: AccuracyConfig, display: Display | None = None) -> Result:
    """Train a teacher and students by many methods, and mark them.

    A run that was stopped goes on with the row that it was at; rows that are in
    ``config.output`` are not made again.

    Args:
        config: what to do.
        display: where to show progress; None: nowhere.

    Raises:
        TrainingError: a cause and its remedy; see :mod:`bgkernels.training.errors`.
    """
    display, started = display or Silent(), time.perf_counter()
    for setting in config.settings:
        for method in setting.methods:  # a wrong name is found before the teacher is trained
            find(method)
    teacher = appoint(config, display)
    task = parse(config.task)
    problems = task.problems("test", config.problems, seed=0)
    with display.working("marking the teacher"), one_thread():
        marks = examine(teacher, task, problems, samples=config.samples).measures()
    rows: list[Row] = []
    rates: dict[str, dict[str, float]] = {}
    costs: dict[str, dict[str, tuple[float, float]]] = {}
    for setting in config.settings:
        school = School(config, setting, teacher)
        first = Class(school, seed=0)
        tried = list(_tried(first, display))
        rows += tried
        rates[setting.name] = _best(tried, setting)
        for seed in range(1, config.seeds):
            rows += _taught(Class(school, seed), rates[setting.name], display)
        with display.working(f"{setting.name}: timing"):
            costs[setting.name] = {m: find_cost(first, m) for m in setting.methods}
    duration = time.perf_counter() - started
    return Result(config, marks, tuple(rows), rates, costs, duration)


def _tried(pupils: Class, display: Display) -> Iterator[Row]:
    """Students of the first seed, at every rate."""
    school = pupils.school
    for method in school.setting.methods:
        for rate in school.config.rates:
            yield _shown(find_row(pupils, method, rate, Silent()), display)


def _best(rows: list[Row], setting: Setting) -> dict[str, float]:
    """Of each method the rate with the most right answers on the validation split."""
    return {
        method: max((r for r in rows if r.method == method), key=lambda r: r.validation).rate
        for method in setting.methods
    }


def _taught(pupils: Class, rates: dict[str, float], display: Display) -> Iterator[Row]:
    """Students of another seed, at the chosen rates."""
    for method, rate in rates.items():
        yield _shown(find_row(pupils, method, rate, Silent()), display)


def _shown(row: Row, display: Display) -> Row:
    title = find(row.method).title
    display.say(
        f"{row.setting}, seed {row.seed}: {title} at {row.rate:g}: "
        f"{row.measures['right']:.1%} right, {row.validation:.1%} on the validation split"
    )
    return row
