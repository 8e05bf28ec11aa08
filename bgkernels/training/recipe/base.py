"""What every stage of a recipe shares: data, models made so far, and how a model learns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Protocol

from bgkernels.training.checkpoint import CheckpointStore
from bgkernels.training.config import DemoConfig, TrainConfig
from bgkernels.training.distill import make_objective, ready
from bgkernels.training.evaluate import score
from bgkernels.training.loop import Objective, Task, train
from bgkernels.training.models import CausalLM
from bgkernels.training.progress import Display
from bgkernels.training.recipe.config import RecipeConfig
from bgkernels.training.recipe.lessons import Classroom, Lesson, LessonBatches, batch_of
from bgkernels.training.writing import Numbered

VALIDATED = 64
"""Lessons that the validation curves are of."""


class Identified(Numbered, Protocol):
    """Training batches by number that say what tells them from others."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """Plain values, for checkpoints."""


@dataclass(frozen=True)
class Outcome:
    """What a stage leaves behind.

    Args:
        model: frozen.
        seconds: of training and sampling, over all resumptions.
        notes: what else is worth a number.
    """

    model: CausalLM
    seconds: float = 0.0
    notes: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Recipe:
    """A recipe on its way.

    Args:
        config: what was asked.
        room: the task in the models' tokens.
        display: where progress is shown.
        named: models that the user named, by option.
        models: what the stages made so far, by their names, frozen.
    """

    config: RecipeConfig
    room: Classroom
    display: Display
    named: Mapping[str, CausalLM] = field(default_factory=dict)
    models: dict[str, CausalLM] = field(default_factory=dict)

    @cached_property
    def lessons(self) -> list[Lesson]:
        """What all models learn from."""
        config = self.config
        problems = self.room.task.problems("train", config.lessons, config.seed)
        return self.room.lessons(problems, config.seed)

    @cached_property
    def held_out(self) -> list[Lesson]:
        """A few lessons for the validation curves."""
        problems = self.room.task.problems("validation", VALIDATED, self.config.seed)
        return self.room.lessons(problems, self.config.seed)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest solution; an answer may have so many."""
        return max(len(lesson.answer) for lesson in self.lessons)

    def batches(self, *, prompts: bool = False) -> LessonBatches:
        """The lessons in an order of their own for each seed."""
        groups = [(lesson,) for lesson in self.lessons]
        return LessonBatches(groups, self.config.batch_size, self.config.seed, prompts)

    def settings(self, training: TrainConfig) -> DemoConfig:
        """A stage's training as the other parts of the package know it."""
        config = self.config
        return DemoConfig(
            output=config.output, student_training=training, loss=config.loss,
            device=config.device, seed=config.seed,
        )  # fmt: skip

    def store(self, name: str, **identity: Any) -> CheckpointStore:
        """The checkpoints of a stage, cleared if the recipe starts from the beginning."""
        known = {"task": repr(self.room.task), "seed": self.config.seed, **identity}
        store = CheckpointStore(self.config.output / name, known)
        if self.config.fresh:
            store.clear()
        return store

    def imitate(
        self, name: str, model: CausalLM, batches: Identified, training: TrainConfig,
        method: str = "hard", teachers: tuple[CausalLM | None, CausalLM | None] = (None, None),
    ) -> float:  # fmt: skip
        """Train a model by a method of :mod:`~bgkernels.training.methods`; the seconds it took."""
        objective = make_objective(self.settings(training), method, model, *teachers)
        learnt_from = [t.digest if t else None for t in teachers]
        loss = asdict(self.config.loss) | {"method": method, "teachers": learnt_from}
        return self.learn(name, model, batches, training, objective, **loss)

    def learn(
        self, name: str, model: CausalLM, batches: Identified, training: TrainConfig,
        objective: Objective, **identity: Any,
    ) -> float:  # fmt: skip
        """Train a model in place, or restore it; the seconds that it took."""
        store = self.store(
            name, **identity, **asdict(training), **batches.identity,
            initial_weights=model.digest,
        )  # fmt: skip
        model.network.requires_grad_(True)
        held_out = batch_of(self.held_out)

        def cross_entropy() -> dict[str, float]:
            tokens = score(model, None, held_out)
            return {"cross_entropy": float(tokens.nll[tokens.valid].mean())}

        network = ready(model, training, self.settings(training))
        task = Task(name, network, objective, batches, cross_entropy, training, store)
        with self.display.training(name, training.steps) as on_step:
            history = train(task, on_step)
        model.freeze()
        return history.seconds
