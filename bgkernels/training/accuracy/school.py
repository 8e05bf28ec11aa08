"""A teacher and what its students learn from, of one setting and seed."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from bgkernels.training.accuracy.config import AccuracyConfig, Setting
from bgkernels.training.config import DemoConfig
from bgkernels.training.corpus import Corpus, load_corpus
from bgkernels.training.distill import train_student, train_teacher
from bgkernels.training.loop import History
from bgkernels.training.machine import one_thread
from bgkernels.training.marks import write_solutions
from bgkernels.training.materials import Materials, prepare
from bgkernels.training.methods import find
from bgkernels.training.models import CausalLM
from bgkernels.training.progress import Display, Silent
from bgkernels.training.recall import RecallingLM
from bgkernels.training.tasks import Exercise, parse

TIMED = 20
"""Steps that a method is timed on."""


@dataclass
class School:
    """Texts of one setting: the task's solutions, and the teacher's own.

    Args:
        config: of the comparison.
        setting: of the students.
        teacher: whom they imitate.
    """

    config: AccuracyConfig
    setting: Setting
    teacher: CausalLM

    @cached_property
    def corpus(self) -> Corpus:
        """Problems with the task's solutions."""
        return load_corpus(self.config.of_student(self.setting, 1.0, 0).data)

    @cached_property
    def dictated(self) -> tuple[Corpus, float]:
        """The same problems as the teacher solves them, and the processor seconds it took."""
        task, started = parse(self.config.task), time.process_time()
        problems = [x.problem for x in self.corpus.train if isinstance(x, Exercise)]
        texts = write_solutions(self.teacher, task, problems)
        solved = (Exercise(task, p, text) for p, (text,) in zip(problems, texts, strict=True))
        return replace(self.corpus, train=tuple(solved)), time.process_time() - started


@dataclass
class Class:
    """Students of one setting and seed: they start from one student and see the same batches.

    Args:
        school: of the setting.
        seed: of weights, batches, and what they write themselves.
    """

    school: School
    seed: int

    def __post_init__(self) -> None:
        self.teacher = RecallingLM.of(self.school.teacher)

    def configured(self, rate: float) -> DemoConfig:
        """The run of a student."""
        return self.school.config.of_student(self.school.setting, rate, self.seed)

    @cached_property
    def start(self) -> CausalLM:
        """The student before it is distilled."""
        config = self.school.config.of_schooling(self.school.setting, self.seed)
        materials = prepare(config, load_corpus(config.data))
        with one_thread():
            return train_student(config, materials, "hard", None, Silent())[0]

    @cached_property
    def materials(self) -> Materials:
        """Batches of the task's solutions."""
        return self._prepared(self.school.corpus)

    @cached_property
    def dictated(self) -> Materials:
        """Batches of the teacher's."""
        return self._prepared(self.school.dictated[0])

    def _prepared(self, corpus: Corpus) -> Materials:
        return replace(prepare(self.configured(1.0), corpus), student=self.start)

    @cached_property
    def teacher_text(self) -> torch.Tensor:
        """The held-out windows as the teacher goes on."""
        return self.materials.exam.speak(self.teacher, self.teacher.vocab)

    def teach(
        self, method: str, rate: float, display: Display | None = None
    ) -> tuple[CausalLM, History]:
        """A student by a method; one that learns the teacher's texts has them read to it once."""
        return self._teach(self.configured(rate), method, self.teacher, display or Silent())

    def _teach(
        self, config: DemoConfig, method: str, teacher: CausalLM, display: Display
    ) -> tuple[CausalLM, History]:
        with one_thread():
            if find(method).written_by_teacher:
                return train_student(config, self.dictated, "hard", teacher, display)
            return train_student(config, self.materials, method, teacher, display)

    def cost(self, method: str) -> tuple[float, float]:
        """Processor seconds of a student's training, and of them those in which text was written.

        They are those of a few steps, times their number: nothing is recalled from other students.
        """
        config = self.configured(1e-3)
        steps = config.student_training.steps
        few = replace(config.student_training, steps=min(TIMED, steps), validate_every=10**6)
        dictated = find(method).written_by_teacher
        shared = self.school.dictated[1] if dictated else 0.0
        assert self.dictated if dictated else self.materials  # made before the clock is started
        started = time.process_time()
        _, history = self._teach(
            replace(config, student_training=few), method, self.school.teacher, Silent()
        )
        factor = steps / few.steps
        seconds = time.process_time() - started
        return factor * seconds + shared, factor * history.writing + shared


def appoint(config: AccuracyConfig, display: Display) -> CausalLM:
    """The teacher, trained on the task's own solutions, or the one that was trained before."""
    with display.working("posing problems"):
        run = config.of_teacher()
        materials = prepare(run, load_corpus(run.data))
    with one_thread():
        teacher, _ = train_teacher(run, materials, display)
    return teacher
