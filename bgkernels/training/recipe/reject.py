"""Stage 5: rejection sampling."""

from __future__ import annotations

import math

from bgkernels.training.recipe.attempts import attempts
from bgkernels.training.recipe.base import Outcome, Recipe
from bgkernels.training.recipe.lessons import LessonBatches


def reject(recipe: Recipe) -> Outcome:
    """Fine-tuning on the best of several answers of the model's own."""
    config = recipe.config
    student = recipe.models["finetuned"].clone()
    ranked, sampling = attempts(recipe, "rejection-samples", student, config.seed + 1)
    best = [answers[0][1] for answers in ranked if answers[0][0] > -math.inf]
    batches = LessonBatches([(x,) for x in best], config.batch_size, config.seed)
    training = recipe.imitate("rejection", student, batches, config.rejection)
    return Outcome(student, sampling + training, {"answers learnt": len(best)})
