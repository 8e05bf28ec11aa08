"""The demo: a teacher, a student by each method, and what tells them apart."""

from __future__ import annotations

import time
from dataclasses import replace

from bgkernels.training import models, ranks, report
from bgkernels.training.config import DemoConfig
from bgkernels.training.corpus import load_corpus
from bgkernels.training.distill import make_objective, train_student, train_teacher
from bgkernels.training.evaluate import own_cost
from bgkernels.training.excerpts import can_be_asked, excerpts
from bgkernels.training.files import write_json
from bgkernels.training.loop import History
from bgkernels.training.marks import examine_by_name
from bgkernels.training.materials import Materials, prepare
from bgkernels.training.models import CausalLM
from bgkernels.training.progress import Display, Silent
from bgkernels.training.recall import RecallingLM
from bgkernels.training.results import (
    CorpusFacts,
    DemoResult,
    StudentResult,
    TeacherFacts,
)


def run_demo(config: DemoConfig, display: Display | None = None) -> DemoResult:
    """Run the demo, or the rest of it: what ``config.output`` holds already is not done again.

    Leaves in ``config.output`` the checkpoints, the models in ``models/`` (loadable with
    ``from_pretrained``) and ``results.json``.

    Args:
        config: what to do.
        display: where to show progress; None: nowhere.

    Raises:
        TrainingError: a cause and its remedy; see :mod:`bgkernels.training.errors`.

    Example:
        >>> result = run_demo(DemoConfig.quick())  # doctest: +SKIP
        >>> result.students["entropy"].measures["kl"]["bridge"].mean  # doctest: +SKIP
    """
    display, started = display or Silent(), time.perf_counter()
    materials, facts = begin(config, display)
    for method in config.methods:  # a wrong option is found now, not after the teacher is trained
        make_objective(config, method, materials.student, materials.teacher, materials.second)
    if materials.teacher is None:
        teacher, history = train_teacher(config, materials, display)
    else:
        teacher, history = materials.teacher, History()
    if len(config.methods) > 1 and config.parallel == "ddp":
        teacher = RecallingLM.of(teacher)
    if config.schooling and config.student is None:
        materials = replace(materials, student=_schooled(config, materials, display))
    students = {m: train_student(config, materials, m, teacher, display) for m in config.methods}
    with display.working("scoring held-out files and the students' own text"):
        result = DemoResult(
            config=config,
            corpus=facts,
            teacher=_teacher_facts(config, materials, teacher, history),
            students=_examine(materials, teacher, students, config.data.task),
            passages=excerpts(
                materials, teacher, {"teacher": teacher, **{m: s for m, (s, _) in students.items()}}
            ),
            seconds=time.perf_counter() - started,
        )
    if ranks.first():
        write_json(config.output / "results.json", result.plain())
    folder = config.output / "models"
    if teacher.here:
        models.export(teacher, materials.teacher_tokenizer, folder / "teacher")
    for method, (student, _) in students.items():
        models.export(student, materials.tokenizer, folder / method)
    return result


def _examine(
    materials: Materials,
    teacher: CausalLM,
    students: dict[str, tuple[CausalLM, History]],
    task: str | None,
) -> dict[str, StudentResult]:
    """Measure every student on the same prompts, the teacher's text being sampled once."""
    exam = materials.exam
    teacher_text = exam.speak(teacher, min(teacher.vocab, materials.student.vocab))
    return {
        method: StudentResult(
            student.parameters,
            history,
            exam.read(student, teacher, teacher_text).measures(exam.config.threshold),
            examine_by_name(student, task).measures() if task else None,
        )
        for method, (student, history) in students.items()
    }


def begin(config: DemoConfig, display: Display) -> tuple[Materials, CorpusFacts]:
    """Read what a run is made of, and say what that is."""
    with display.working("reading and encoding the corpus"):
        corpus = load_corpus(config.data)
        materials = prepare(config, corpus)
    facts = CorpusFacts(
        origin=str(corpus.origin),
        digest=corpus.digest,
        files=(len(corpus.train), len(corpus.held_out)),
        tokens=materials.tokens,
        vocab=len(materials.tokenizer),
    )
    if materials.unusable:
        display.say(report.left_out(materials.unusable))
    display.say(facts.description)
    if materials.coverage:
        display.say(report.two_tokenizers(materials.coverage))
    return materials, facts


def _schooled(config: DemoConfig, materials: Materials, display: Display) -> CausalLM:
    """The student from which all start: one that has read the text for a while, without a teacher.

    One of the same configuration is found again.
    """
    assert config.schooling
    display.say("the student reads the text by itself first; all students start from there:")
    run = replace(config, output=config.output / "schooling", student_training=config.schooling)
    return train_student(run, materials, "hard", None, display)[0]


def _teacher_facts(
    config: DemoConfig, materials: Materials, teacher: CausalLM, history: History
) -> TeacherFacts:
    exam, task = materials.exam, config.data.task
    return TeacherFacts(
        name=config.teacher or "trained here",
        parameters=teacher.parameters,
        cross_entropy=own_cost(teacher, exam.files),
        curve_cross_entropy=own_cost(teacher, exam.few),
        history=history,
        marks=examine_by_name(teacher, task).measures() if task and can_be_asked(teacher) else None,
    )
