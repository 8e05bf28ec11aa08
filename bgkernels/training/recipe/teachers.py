"""Stage 1: two teachers of different size, who know the task."""

from __future__ import annotations

from bgkernels.training.config import ModelShape
from bgkernels.training.models import small_llama
from bgkernels.training.recipe.base import Outcome, Recipe


def teach(recipe: Recipe) -> Outcome:
    """The teacher, from which the student is cut."""
    return _taught(recipe, "teacher", recipe.config.teacher_shape, recipe.config.seed)


def teach_second(recipe: Recipe) -> Outcome:
    """The other one, whose distributions are imitated too."""
    return _taught(recipe, "second-teacher", recipe.config.second_shape, recipe.config.seed + 1)


def _taught(recipe: Recipe, name: str, shape: ModelShape, seed: int) -> Outcome:
    """The model that the user named, or a small Llama, trained on the lessons."""
    room, length = recipe.room, sum(recipe.room.task.room)
    model = recipe.named.get(f"--{name}") or small_llama(shape, len(room.tokenizer), length, seed)
    seconds = recipe.imitate(name, model, recipe.batches(), recipe.config.teaching)
    return Outcome(model, seconds)
