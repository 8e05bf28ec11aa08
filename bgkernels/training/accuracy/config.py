"""What a comparison of accuracies is made of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from bgkernels.training.config import (
    DataConfig,
    DemoConfig,
    EvalConfig,
    ModelShape,
    TrainConfig,
)
from bgkernels.training.tasks import fitted

METHODS = (
    "hard", "argmax", "sequence", "soft", "soft-t2", "static+argmax",
    "confidence", "confidence+argmax", "confidence+reverse+argmax",
    "threshold", "threshold+argmax", "threshold+argmax+t2", "threshold+reverse+argmax",
    "entropy+argmax", "reverse-kl", "on-policy", "gkd", "minillm",
)  # fmt: skip
"""Names of :func:`bgkernels.training.methods.find`, in the order of the table."""

FEW = (
    "hard", "soft", "soft-t2", "static+argmax", "confidence+argmax", "confidence+reverse+argmax",
    "threshold+argmax", "threshold+reverse+argmax",
)  # fmt: skip
"""Those that most claims are about."""

FEWEST = ("hard", "soft", "soft-t2", "confidence+argmax", "threshold+argmax")
"""Those that the first claims are about."""


@dataclass(frozen=True)
class Setting:
    """Students of one size, and how much they have to learn from.

    Args:
        name: for tables and files.
        shape: of the students.
        texts: problems with one solution each, from which batches are drawn.
        methods: by which they learn.
    """

    name: str
    shape: ModelShape
    texts: int
    methods: tuple[str, ...] = FEW


KNOBS = {
    "arithmetic": "arithmetic:terms=5,digits=1,operations=+-,largest=99",
    "programs": "programs:steps=2",
}
"""Tasks of a difficulty that small models can learn in minutes, by name."""

TEACHER = ModelShape(96, 3, 4)
LESSONS = TrainConfig(1000, 4e-3, validate_every=100, checkpoint_every=100)
SMALL, LARGE = ModelShape(48, 2, 4), ModelShape(64, 2, 4)
SCHOOLING = TrainConfig(450, 8e-3, validate_every=450, checkpoint_every=450)
SCARCE, PLENTIFUL = 512, 8192
SETTINGS = (
    Setting("small-plentiful", SMALL, PLENTIFUL, METHODS),
    Setting("small-scarce", SMALL, SCARCE),
    Setting("large-plentiful", LARGE, PLENTIFUL, FEWEST),
    Setting("large-scarce", LARGE, SCARCE, FEWEST),
)


@dataclass(frozen=True)
class AccuracyConfig:
    """A task, a teacher, and students by many methods.

    Args:
        output: folder of ``accuracy.json``, ``accuracy.md``, and what can be resumed.
        task: as :func:`bgkernels.training.tasks.parse` reads it.
        teacher_shape, teacher_training, teacher_texts: of the teacher, which learns from the
            task's own solutions.
        settings: of the students.
        seeds: students by each method and setting; each has its own weights and batches.
        schooling, schooling_texts: of the student before it is distilled: what it has read of the
            task's solutions, so that it writes well and calculates badly.
        rates: learning rates; each method takes the best one on the validation split.
        steps: of each student.
        batch: texts of a step.
        problems: of the validation split, and as many of the test split.
        samples: solutions of each.
        windows: texts that exposure bias is measured on.
    """

    output: Path = Path("runs/arithmetic")
    task: str = KNOBS["arithmetic"]
    teacher_shape: ModelShape = TEACHER
    teacher_training: TrainConfig = LESSONS
    teacher_texts: int = PLENTIFUL
    settings: tuple[Setting, ...] = SETTINGS
    seeds: int = 5
    schooling: TrainConfig = SCHOOLING
    schooling_texts: int = PLENTIFUL
    rates: tuple[float, ...] = (4e-3, 8e-3, 1.6e-2, 3.2e-2)
    steps: int = 200
    batch: int = 32
    problems: int = 128
    samples: int = 8
    windows: int = 64

    @classmethod
    def of(cls, task: str, quick: bool = False) -> AccuracyConfig:
        """The comparison on a task; one without parameters is made easy enough for small models.

        Args:
            task: as :func:`bgkernels.training.tasks.parse` reads it.
            quick: minutes instead of an hour: one setting, two seeds, one rate.
        """
        name = task.partition(":")[0]
        base = cls.quick() if quick else cls()
        if name == "programs" and not quick:  # soon written well: less to read, fewer methods
            small, scarce, large, _ = SETTINGS
            few = replace(small, methods=FEW), replace(scarce, methods=FEWEST), large
            lesson = TrainConfig(250, 8e-3, validate_every=250, checkpoint_every=250)
            base = replace(base, settings=few, schooling=lesson, steps=150)
        folder = Path("runs", f"{'quick-' * quick}{name}")
        return replace(base, task=KNOBS.get(task, task), output=folder)

    @classmethod
    def quick(cls) -> AccuracyConfig:
        """Minutes instead of an hour: one setting, two seeds; its numbers mean little."""
        return replace(
            cls(),
            teacher_shape=ModelShape(64, 2, 4),
            teacher_training=TrainConfig(400, 6e-3, validate_every=100, checkpoint_every=100),
            teacher_texts=4096,
            settings=(Setting("small", SMALL, 1024, FEW),),
            seeds=2,
            schooling_texts=4096,
            rates=(1.6e-2,),
            steps=100,
            problems=32,
            windows=16,
        )

    def of_teacher(self) -> DemoConfig:
        """The run that trains the teacher."""
        return fitted(
            DemoConfig(
                output=self.output,
                data=DataConfig(task=self.task, texts=self.teacher_texts, batch_size=64),
                teacher_shape=self.teacher_shape,
                teacher_training=self.teacher_training,
                device="cpu",
            )
        )

    def of_schooling(self, setting: Setting, seed: int) -> DemoConfig:
        """The run that makes the student which is distilled into."""
        return self._of_student(setting, self.schooling, self.schooling_texts, seed)

    def of_student(self, setting: Setting, rate: float, seed: int) -> DemoConfig:
        """The run that distils into it by some method."""
        steps = self.steps
        training = TrainConfig(steps, rate, validate_every=steps, checkpoint_every=steps)
        return self._of_student(setting, training, setting.texts, seed)

    def _of_student(
        self, setting: Setting, training: TrainConfig, texts: int, seed: int
    ) -> DemoConfig:
        return fitted(
            DemoConfig(
                output=self.output / "training" / setting.name,
                data=DataConfig(task=self.task, texts=texts, batch_size=self.batch),
                student_shape=setting.shape,
                student_training=training,
                evaluation=EvalConfig(windows=self.windows, curve_windows=16),
                fresh=True,
                device="cpu",
                seed=seed,
            )
        )
