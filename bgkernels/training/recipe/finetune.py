"""Stage 4: supervised fine-tuning on solutions."""

from __future__ import annotations

from bgkernels.training.recipe.base import Outcome, Recipe


def finetune(recipe: Recipe) -> Outcome:
    """Cross-entropy of the lessons' answers; problems are read and not learnt."""
    student = recipe.models["pretrained"].clone()
    seconds = recipe.imitate("finetuned", student, recipe.batches(), recipe.config.finetuning)
    return Outcome(student, seconds)
