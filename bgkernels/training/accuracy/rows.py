"""A row of the comparison: one student, trained and marked."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bgkernels.training.accuracy.school import Class
from bgkernels.training.files import digest, write_json
from bgkernels.training.marks import examine, finite
from bgkernels.training.progress import Display
from bgkernels.training.tasks import parse
from bgkernels.training.tracing import TracedLM


@dataclass(frozen=True)
class Row:
    """A student.

    Args:
        setting, method, rate, seed: whose.
        validation: share of right answers on the validation split, sampled.
        measures: of :meth:`~bgkernels.training.marks.Marks.measures` on the test split, and of
            exposure bias; None where a mean is over nothing.
        seconds: of the processor, for training, a teacher that remembers texts.
        weights: identifies the student's.
    """

    setting: str
    method: str
    rate: float
    seed: int
    validation: float
    measures: dict[str, float | None]
    seconds: float
    weights: str

    @property
    def numbers(self) -> dict[str, Any]:
        """What another run of the row gives again, to the last digit."""
        return {key: value for key, value in asdict(self).items() if key != "seconds"}


def find_row(pupils: Class, method: str, rate: float, display: Display) -> Row:
    """The row of a student: from its file, or else by training it."""
    path, identity = _file(pupils, method, rate)
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept.pop("identity") == identity:
            return Row(**kept)
    row = make_row(pupils, method, rate, display)
    write_json(path, asdict(row) | {"identity": identity})
    return row


def find_cost(pupils: Class, method: str) -> tuple[float, float]:
    """What a method costs (:meth:`Class.cost`): from its file, or else by timing it."""
    path, identity = _file(pupils, method, 0.0)
    path = path.parent.with_name("costs") / path.name
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["identity"] == identity:
            return kept["seconds"], kept["writing"]
    seconds, writing = pupils.cost(method)
    write_json(path, {"seconds": seconds, "writing": writing, "identity": identity})
    return seconds, writing


def _file(pupils: Class, method: str, rate: float) -> tuple[Path, str]:
    """Where a row is kept, and what tells it from those of other configurations."""
    school = pupils.school
    config, setting = school.config, school.setting
    name = f"{setting.name}-{method}-{rate:g}-{pupils.seed}.json"
    runs = (
        config.of_schooling(setting, pupils.seed),
        config.of_student(setting, rate, pupils.seed),
    )
    made = [repr(replace(run, output=Path())) for run in runs]
    made += [f"{config.problems} problems, {config.samples} samples", school.teacher.digest]
    return config.output / "rows" / name, digest(part.encode() for part in made)


def make_row(pupils: Class, method: str, rate: float, display: Display) -> Row:
    """Train a student and mark it."""
    school = pupils.school
    config, task = school.config, parse(school.config.task)
    started = time.process_time()
    student = TracedLM.of(pupils.teach(method, rate, display)[0])
    seconds = time.process_time() - started
    shutil.rmtree(pupils.configured(rate).output, ignore_errors=True)
    student.freeze()
    chosen_by, reported = (
        task.problems("validation", config.problems, seed=0),
        task.problems("test", config.problems, seed=0),
    )
    validation = examine(student, task, chosen_by, samples=2).measures()["right"]
    measures = examine(student, task, reported, samples=config.samples).measures()
    exam = pupils.materials.exam
    biases = exam.read(student, pupils.teacher, pupils.teacher_text).measures(exam.config.threshold)
    for part in ("all", "bridge", "garden"):
        measures[f"bias_{part}"] = biases["exposure_bias"][part].mean
        measures[f"taught_loss_{part}"] = biases["teacher_text_kl"][part].mean
    return Row(
        school.setting.name,
        method,
        rate,
        pupils.seed,
        validation,
        finite(measures),
        seconds,
        student.digest,
    )
