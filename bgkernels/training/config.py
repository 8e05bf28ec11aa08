"""What a run is made of: frozen values that can be compared, printed and stored."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bgkernels.training.tasks.vocabulary import STOP

PRETRAINED_RATE = 1e-4
"""Learning rate of a student that has learnt something already; random weights take far more."""


@dataclass(frozen=True)
class ModelShape:
    """A small Llama.

    Args:
        hidden: width; the MLP is 8/3 as wide, in multiples of 32.
        layers: number of blocks.
        heads: attention heads.
    """

    hidden: int
    layers: int
    heads: int


@dataclass(frozen=True)
class DataConfig:
    """Text, tokens and batches.

    Args:
        corpus: a folder of text, or a data file of records; None: the sources of the interpreter's
            standard library.
        vocab: size of the byte-level BPE that is trained where no model brings its own tokenizer.
        sequence_length: tokens of a training sequence.
        batch_size: sequences of a batch.
        held_out: share of the files kept for validation.
        max_bytes: use only about so much text; None: all of it.
        skip_unusable: leave out records that cannot be used, and name them; else they are errors.
        task: in place of a corpus, a task as :func:`bgkernels.training.tasks.parse` reads it; the
            run's configuration is to be :func:`~bgkernels.training.tasks.fitted` to it.
        texts: problems of the task to learn from.
    """

    corpus: Path | None = None
    vocab: int = 4096
    sequence_length: int = 128
    batch_size: int = 4
    held_out: float = 0.05
    max_bytes: int | None = None
    skip_unusable: bool = False
    task: str | None = None
    texts: int = 8192

    @property
    def stop(self) -> int | None:
        """The token that ends a text that a model writes: a task's end; None: texts go on."""
        return None if self.task is None else STOP


@dataclass(frozen=True)
class TrainConfig:
    """How one model is trained: AdamW, linear warm-up, cosine decay, clipped gradients.

    Args:
        steps: optimiser steps.
        learning_rate: at the end of the warm-up.
        warmup: share of the steps.
        final_rate: share of the learning rate that is left at the last step.
        weight_decay: of matrices; gains and biases are not decayed.
        clip: largest norm of the gradient.
        validate_every, checkpoint_every: steps between two; both also happen at the end.
        accumulate: batches of a step, under one normaliser.
        bf16: run the bodies of the models in bfloat16 (autocast); weights stay as they are.
        gradient_checkpointing: compute activations again in backward instead of keeping them.
        compile: ``torch.compile`` the student's body.
    """

    steps: int
    learning_rate: float
    warmup: float = 0.1
    final_rate: float = 0.05
    weight_decay: float = 0.1
    clip: float = 1.0
    validate_every: int = 50
    checkpoint_every: int = 200
    accumulate: int = 1
    bf16: bool = False
    gradient_checkpointing: bool = False
    compile: bool = False


def given(share: float, length: int) -> int:
    """Tokens of the prompt of a sequence, for this share of the sequence: at least one."""
    return max(1, int(share * length))


@dataclass(frozen=True)
class LossConfig:
    """What the students share in their loss; the method is what tells them apart.

    Args:
        divergence: a name in ``bg.divergences``, for methods that do not bring their own.
        temperature: of the divergence, likewise.
        memory_budget: bytes of temporaries of the loss; None: the library's default.
        prompt: share of a sequence that is given where a model writes the rest of it.
        second_weight: of the second of two teachers; the first one's is the rest of 1.
    """

    divergence: str = "forward_kl"
    temperature: float = 1.0
    memory_budget: int | None = None
    prompt: float = 0.25
    second_weight: float = 0.5


@dataclass(frozen=True)
class EvalConfig:
    """How the students are compared.

    Args:
        windows: held-out sequences; the first part of each is the prompt.
        prompt: share of a sequence that is given; the rest is scored, or sampled and scored.
        curve_windows: at most how many of them the validation curves use.
        threshold: a token is at a bridge where the teacher's ``H / log V`` is below this.
    """

    windows: int = 160
    prompt: float = 0.25
    curve_windows: int = 64
    threshold: float = 0.25

    def given(self, length: int) -> int:
        """Tokens of the prompt of a sequence."""
        return given(self.prompt, length)


@dataclass(frozen=True)
class DemoConfig:
    """The whole demo: a teacher, a student by each method, and their comparison.

    Args:
        methods: names in :data:`~bgkernels.training.methods.METHODS`.
        output: folder of checkpoints, table, figure and trained models.
        teacher, student: a Hugging Face model, by path or name; None: a small Llama of
            ``teacher_shape`` or ``student_shape``, trained from nothing.
        schooling: of a student that has random weights, how it reads the text by itself before it
            is distilled into; None: not at all.
        teacher_url: of the servers that run the teacher, of which only head and tokenizer are read
            here; None: it is loaded.
        generate_with: of servers that write the text of the teacher or the student, whichever they
            serve; None: both write here.
        second_teacher: a Hugging Face model likewise, for the methods that have two teachers.
        lora: rank of the adapters that are trained in place of the student's weights; None: the
            weights themselves.
        fresh: discard the students' checkpoints in ``output``.
        tensorboard: keep the log of each run for TensorBoard too, beside its checkpoints.
        parallel: how several processes have a model: each all of it (``"ddp"``) or its share of the
            parameters (``"fsdp"``).
        device: ``"cpu"``, ``"cuda"``, or ``"auto"``: a GPU if there is one.
        seed: of weights, batches and samples.
    """

    output: Path = Path("runs/demo")
    methods: tuple[str, ...] = ("hard", "soft", "entropy")
    data: DataConfig = DataConfig()
    teacher: str | None = None
    student: str | None = None
    teacher_url: str | None = None
    generate_with: str | None = None
    second_teacher: str | None = None
    teacher_shape: ModelShape = ModelShape(192, 4, 6)
    student_shape: ModelShape = ModelShape(64, 2, 2)
    teacher_training: TrainConfig = TrainConfig(
        1200, 5e-3, validate_every=100, checkpoint_every=200
    )
    student_training: TrainConfig = TrainConfig(1000, 5e-3)
    schooling: TrainConfig | None = None
    loss: LossConfig = LossConfig()
    evaluation: EvalConfig = EvalConfig()
    lora: int | None = None
    fresh: bool = False
    tensorboard: bool = False
    parallel: str = "ddp"
    device: str = "auto"
    seed: int = 0

    @classmethod
    def quick(cls) -> DemoConfig:
        """The same demo in seconds: too small to learn much, large enough to run every line."""
        small = cls(
            data=DataConfig(vocab=512, sequence_length=32, batch_size=4, max_bytes=200_000),
            teacher_shape=ModelShape(32, 1, 1),
            student_shape=ModelShape(32, 1, 1),
            teacher_training=TrainConfig(20, 1e-2, validate_every=5, checkpoint_every=10),
            student_training=TrainConfig(20, 1e-2, validate_every=5, checkpoint_every=10),
            evaluation=EvalConfig(windows=8, curve_windows=8),
        )
        return replace(small, output=Path("runs/quick"))


def plain(config: Any) -> dict[str, Any]:
    """A configuration as nested values that JSON understands."""
    return asdict(config, dict_factory=_plain_dict)


def _plain_dict(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in items}
