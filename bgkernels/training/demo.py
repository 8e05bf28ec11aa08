"""The demo: a teacher, a student by each method, and what tells them apart."""

from __future__ import annotations

import time

from bgkernels.training import models, ranks, report
from bgkernels.training.config import DemoConfig
from bgkernels.training.corpus import Corpus, load_corpus
from bgkernels.training.distill import make_objective, train_student, train_teacher
from bgkernels.training.evaluate import own_cost, score
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
    Passage,
    StudentResult,
    TeacherFacts,
)
from bgkernels.training.tokens import Batch


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
    with display.working("reading and encoding the corpus"):
        corpus = load_corpus(config.data)
        materials = prepare(config, corpus)
    for method in config.methods:  # a wrong option is found now, not after the teacher is trained
        make_objective(config, method, materials.student, materials.teacher, materials.second)
    facts = corpus_facts(corpus, materials)
    if materials.unusable:
        display.say(report.left_out(materials.unusable))
    display.say(report.describe(facts))
    if materials.coverage:
        display.say(report.two_tokenizers(materials.coverage))
    if materials.teacher is None:
        teacher, history = train_teacher(config, materials, display)
    else:
        teacher, history = materials.teacher, History()
    if len(config.methods) > 1 and config.parallel == "ddp":
        teacher = RecallingLM.of(teacher)
    students = {m: train_student(config, materials, m, teacher, display) for m in config.methods}
    with display.working("scoring held-out files and the students' own text"):
        result = DemoResult(
            config=config,
            corpus=facts,
            teacher=_teacher_facts(config, materials, teacher, history),
            students=_examine(materials, teacher, students, config.data.task),
            passage=_passage(materials, next(iter(students.values()))[0], teacher),
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


def corpus_facts(corpus: Corpus, materials: Materials) -> CorpusFacts:
    """Size and origin of a corpus."""
    return CorpusFacts(
        origin=str(corpus.origin),
        digest=corpus.digest,
        files=(len(corpus.train), len(corpus.held_out)),
        tokens=materials.tokens,
        vocab=len(materials.tokenizer),
    )


def _teacher_facts(
    config: DemoConfig, materials: Materials, teacher: CausalLM, history: History
) -> TeacherFacts:
    exam = materials.exam
    return TeacherFacts(
        name=config.teacher or "trained here",
        parameters=teacher.parameters,
        cross_entropy=own_cost(teacher, exam.files),
        curve_cross_entropy=own_cost(teacher, exam.few),
        history=history,
    )


def _passage(materials: Materials, student: CausalLM, teacher: CausalLM) -> Passage:
    """The held-out window whose share of bridges is the median one."""
    exam, tokenizer = materials.exam, materials.tokenizer
    tokens = score(student, teacher, Batch.of(exam.windows))
    ambiguity = tokens.ambiguity.where(tokens.soft, exam.config.threshold)  # white in the picture
    share = (ambiguity < exam.config.threshold).float().mean(-1)
    index = int(share.argsort()[len(share) // 2])
    text = [str(tokenizer.decode([token])) for token in exam.windows[index, 1:].tolist()]
    return Passage(tuple(text), tuple(ambiguity[index].tolist()))
