"""What a study is made of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class WorldConfig:
    """The synthetic language; see :class:`~bgkernels.training.study.world.World`.

    Args:
        steps: tokens of a text.
        vocab: tokens of the language.
        bridges, gardens: steps of each kind, spread evenly; the other steps are plain.
        bridge_choices: tokens that keep a bridge.
        garden_choices: good continuations in a garden; even.
        slip: probability with which the teacher says just anything.
        forgiving: whether a wrong token is put right on plain steps and in gardens.
        seed: seed of the meanings of the tokens.

    Raises:
        ValueError: the language cannot be built of these numbers.
    """

    steps: int = 36
    vocab: int = 64
    bridges: int = 5
    gardens: int = 4
    bridge_choices: int = 4
    garden_choices: int = 8
    slip: float = 1e-4
    forgiving: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.bridges + self.gardens > self.steps:
            raise ValueError(
                f"`steps` must hold {self.bridges} bridges and {self.gardens} gardens; "
                f"got {self.steps}"
            )
        if self.garden_choices % 2 or not 2 <= self.garden_choices <= self.vocab:
            raise ValueError(
                f"`garden_choices` must be even and between 2 and vocab = {self.vocab}; "
                f"got {self.garden_choices}"
            )
        if not 2 <= self.bridge_choices < self.vocab:
            raise ValueError(
                f"`bridge_choices` must be between 2 and vocab - 1 = {self.vocab - 1}; "
                f"got {self.bridge_choices}"
            )
        if not 0 < self.slip < 1:
            raise ValueError(f"`slip` must lie between 0 and 1; got {self.slip}")


@dataclass(frozen=True)
class StudyConfig:
    """Students, how they are trained, and where the report goes.

    Args:
        output: folder of ``study.json`` and ``study.png``.
        world: the language and its teacher.
        seeds: students by each method and size; each has its own weights and texts.
        sizes: hidden units of a student.
        texts: the teacher's texts that a student learns from.
        steps: steps of AdamW.
        batch: texts of a step.
        learning_rate: falls linearly to 0.
        seed: first seed.
    """

    output: Path = Path("runs/study")
    world: WorldConfig = WorldConfig()
    seeds: int = 8
    sizes: tuple[int, ...] = (8, 24)
    texts: int = 600
    steps: int = 300
    batch: int = 16
    learning_rate: float = 1e-2
    seed: int = 0

    @classmethod
    def quick(cls) -> StudyConfig:
        """A study in seconds, on a few texts; its numbers mean little."""
        return replace(cls(), output=Path("runs/quick-study"), seeds=3, texts=64, steps=60, batch=8)
