"""The page of a run, from what is in its folder: no model is loaded and nothing is computed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bgkernels.training.errors import OptionError
from bgkernels.training.files import write_text
from bgkernels.training.log import Log
from bgkernels.training.maps import TokenMap, Voice
from bgkernels.training.methods import find
from bgkernels.training.page.charts import Chart, Line
from bgkernels.training.page.content import Page, render
from bgkernels.training.page.tables import answers, compared, differences, distances

CURVES = {
    "cross_entropy": "Cross-entropy on held-out text",
    "kl": "KL(teacher‖student) on held-out text",
}
"""What `log.jsonl` has of validations."""


def write_report(folder: Path) -> Path:
    """Write ``report.html`` of a run into its folder.

    Args:
        folder: of the run.

    Returns:
        The path of the report.

    Raises:
        OptionError: the folder is not that of a run.
    """
    path = folder / "report.html"
    write_text(path, render(of_run(folder)))
    return path


def of_run(folder: Path) -> Page:
    """Read the page of a run of any command; one that was stopped has only curves.

    Args:
        folder: of the run.

    Raises:
        OptionError: the folder is not that of a run.
    """
    readers = {
        "results.json": of_results,
        "analysis.json": of_analysis,
        "accuracy.json": of_accuracy,
    }
    for name, reader in readers.items():
        if (folder / name).exists():
            try:
                return reader(json.loads((folder / name).read_text(encoding="utf-8")), folder)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise OptionError(
                    f"{folder / name} is not as this version writes it ({error!r}); run the "
                    "command that made it again, which goes on where it ended"
                ) from error
    names = {p.name.removeprefix("student-"): p for p in sorted(folder.glob("student-*"))}
    titles = {name: find(name).title for name in names}
    if not (charts := curves(folder, titles, {})):
        raise OptionError(
            f"RUN must be the folder of a run, with {', '.join(readers)} or log.jsonl of a "
            f"student; {folder} has none of them"
        )
    return Page(f"{folder.name}, not finished", names=titles, charts=charts)


def of_results(found: dict[str, Any], folder: Path) -> Page:
    """The page of ``results.json``: of `demo`, `distill`, `compare` and `train`."""
    students, teacher = found["students"], found.get("teacher")
    names = {"teacher": "teacher"} if teacher else {}
    names |= {method: student["title"] for method, student in students.items()}
    level = {"teacher": teacher["curve_cross_entropy"]} if teacher else {}
    titles = {method: names[method] for method in students}
    marks = {"teacher": teacher["marks"]} if teacher and teacher.get("marks") else {}
    marks |= {m: student["marks"] for m, student in students.items() if student["marks"]}
    return Page(
        title=found["title"],
        lead=(
            f"{found['data']}.",
            "This is one run with one seed: another seed may put the methods in another order.",
        ),
        names=names,
        tables=(*answers(marks), *distances(students, found["caption"])),
        charts=curves(folder, titles, level),
        passages=tuple(passages(found["passages"])),
        threshold=found["config"]["evaluation"]["threshold"],
        configuration=found["config"],
    )


def of_analysis(found: dict[str, Any], folder: Path) -> Page:
    """The page of ``analysis.json``, of `analyze`."""
    pair = found["config"]["pair"]
    return Page(
        title="Where the student is wrong",
        lead=(f"The student {pair['student']} beside its teacher {pair['teacher']}.",),
        names={"teacher": "teacher", "student": "student"},
        tables=(differences(found["measures"]),),
        passages=tuple(passages(found["passages"])),
        threshold=pair["evaluation"]["threshold"],
        configuration=found["config"],
    )


def of_accuracy(found: dict[str, Any], folder: Path) -> Page:
    """The page of ``accuracy.json``, of `compare --task`."""
    chosen = [
        row for row in found["rows"] if found["rates"][row["setting"]][row["method"]] == row["rate"]
    ]
    methods = dict.fromkeys(row["method"] for row in chosen)
    return Page(
        title=f"Students of one teacher on {found['config']['task']}",
        lead=("What is claimed and what was found is in accuracy.md of the same folder.",),
        names={"teacher": "teacher", **{method: find(method).title for method in methods}},
        tables=tuple(
            compared(f"Right answers, {setting}", chosen, setting, found["teacher"])
            for setting in found["rates"]
        ),
        configuration=found["config"],
    )


def passages(found: list[dict[str, Any]]) -> Iterator[TokenMap]:
    """Token maps of JSON."""
    for values in found:
        voices = {
            name: Voice(tuple(tuple((t, p) for t, p in x) for x in v["best"]), tuple(v["ahead"]))
            for name, v in values["voices"].items()
        }
        yield TokenMap(**values | {"voices": voices})


def curves(
    folder: Path, titles: Mapping[str, str], levels: Mapping[str, float]
) -> tuple[Chart, ...]:
    """What was validated while students learnt, and while a teacher that was trained here did.

    Args:
        folder: of the run.
        titles: of the students, by method.
        levels: by name, the cross-entropy of what does not learn.
    """
    charts = []
    for measure, title in CURVES.items():
        lines = [
            Line(method, points)
            for method in titles
            if (points := curve(folder / f"student-{method}", measure))
        ]
        level = levels if measure == "cross_entropy" else {}
        if lines:
            charts.append(Chart(title, "nats a token", tuple(lines), level, measure == "kl"))
    teachers = sorted(folder.glob("teacher-*/log.jsonl"), key=lambda path: path.stat().st_mtime)
    if teachers and (points := curve(teachers[-1].parent, "cross_entropy")):
        line = Line("teacher", points)
        charts.append(Chart("Cross-entropy of the teacher", "nats a token", (line,)))
    return tuple(charts)


def curve(folder: Path, measure: str) -> tuple[tuple[float, float], ...]:
    """A validation curve of one training."""
    records = Log(folder / "log.jsonl").read()
    return tuple((r["step"], r[measure]) for r in records if measure in r)
