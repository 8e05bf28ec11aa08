"""Stage 2: the most useful parts of the teacher."""

from __future__ import annotations

from bgkernels.training import pruning
from bgkernels.training.recipe.base import Outcome, Recipe
from bgkernels.training.recipe.lessons import batch_of

SCORED = 256
"""Lessons that the parts are scored on."""


def prune(recipe: Recipe) -> Outcome:
    """Layers, heads and neurons of the teacher that do most on the lessons."""
    teacher = recipe.models["teacher"]
    shortest = min(map(len, recipe.lessons))
    tokens = batch_of(recipe.lessons[:SCORED]).tokens[:, :shortest]  # no row is filled up
    with recipe.display.working("scoring the teacher's parts"):
        importance = pruning.measure(teacher, tokens)
        small = pruning.prune(teacher, importance, recipe.config.student)
    small.freeze()
    return Outcome(small)
