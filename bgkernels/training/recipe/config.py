"""What a recipe is made of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from bgkernels.training.config import LossConfig, ModelShape, TrainConfig
from bgkernels.training.errors import OptionError
from bgkernels.training.pruning import Shape


@dataclass(frozen=True)
class RecipeConfig:
    """The six stages of Llama 3.2's recipe, on a task whose answers a program checks.

    Args:
        output: folder of checkpoints, results and the last model.
        task: a name in :data:`~bgkernels.training.tasks.TASKS`, with parameters after a colon.
        corpus: text that pre-training reads, a folder or a data file; None: the lessons. Other text
            needs models that the user names, since a task's own tokens have no other words.
        sequence_length: tokens of its sequences.
        teacher, second_teacher: Hugging Face models, by path or name; None: small Llamas of
            ``teacher_shape`` and ``second_shape``. Either learns the task for its ``steps``.
        student: how much is kept of the teacher.
        lessons: problems with solutions that all models learn from.
        batch_size: of these in a batch; a pair of answers counts as one.
        teaching, pretraining, finetuning, rejection, preference: of each stage that trains.
        samples: answers to a problem, at temperature 1; the best one is learnt.
        problems: that are answered so, in each of the last two stages.
        judge: who says which answers are best: ``"checker"``, or ``"likelihood"``, the teacher's
            for a token.
        beta: of DPO; larger values stay nearer to the model before it.
        hard_weight: of the chosen answers' cross-entropy beside DPO's loss.
        examined: problems of the test split that every model answers.
        loss: weight of the second teacher, and memory of the loss.
        fresh: discard the checkpoints in ``output``.
        device: ``"cpu"``, ``"cuda"``, or ``"auto"``.
        seed: of weights, problems, batches and samples.

    Raises:
        OptionError: a number is too small, the judge unknown, or the corpus without a teacher.
    """

    output: Path = Path("runs/recipe")
    task: str = "arithmetic:terms=3"
    corpus: Path | None = None
    sequence_length: int = 128
    teacher: str | None = None
    second_teacher: str | None = None
    teacher_shape: ModelShape = ModelShape(96, 3, 4)
    second_shape: ModelShape = ModelShape(64, 3, 4)
    student: Shape = Shape(2, 3, 160)
    lessons: int = 20_000
    batch_size: int = 64
    teaching: TrainConfig = TrainConfig(1000, 4e-3)
    pretraining: TrainConfig = TrainConfig(300, 3e-3)
    finetuning: TrainConfig = TrainConfig(150, 1e-3)
    rejection: TrainConfig = TrainConfig(60, 5e-4)
    preference: TrainConfig = TrainConfig(60, 5e-5)
    samples: int = 8
    problems: int = 768
    judge: str = "checker"
    beta: float = 0.5
    hard_weight: float = 0.2
    examined: int = 500
    loss: LossConfig = LossConfig()
    fresh: bool = False
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.judge not in ("checker", "likelihood"):
            raise OptionError(f"--judge must be checker or likelihood; got {self.judge!r}")
        least = {"lessons": 1, "batch_size": 1, "samples": 2, "problems": 1, "examined": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                option = f"--{name.replace('_', '-')}"
                raise OptionError(f"{option} must be at least {low}; got {getattr(self, name)}")
        if self.corpus and not self.teacher:
            raise OptionError(
                "--corpus needs --teacher, a model with a tokenizer for any text; the small models "
                "have the tokens of their task alone"
            )
        if not self.beta > 0 or not self.hard_weight >= 0:
            raise OptionError(
                "--beta must be positive, and --hard-weight 0 or more; "
                f"got {self.beta} and {self.hard_weight}"
            )

    @classmethod
    def quick(cls) -> RecipeConfig:
        """The same recipe in seconds: too small to learn anything, it runs every line."""
        brief = TrainConfig(6, 1e-2, validate_every=3, checkpoint_every=3)
        return replace(
            cls(),
            output=Path("runs/quick-recipe"),
            task="arithmetic:terms=2",
            teacher_shape=ModelShape(32, 2, 2),
            second_shape=ModelShape(16, 1, 2),
            student=Shape(1, 1, 32),
            lessons=24,
            batch_size=4,
            teaching=brief,
            pretraining=brief,
            finetuning=brief,
            rejection=brief,
            preference=brief,
            samples=4,
            problems=24,
            judge="likelihood",  # a model that knows nothing gives no right answers
            examined=8,
        )
