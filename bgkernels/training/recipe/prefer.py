"""Stage 6: direct preference optimisation."""

from __future__ import annotations

from bgkernels.training.preference import Preference
from bgkernels.training.recipe.attempts import Ranked, attempts
from bgkernels.training.recipe.base import Outcome, Recipe
from bgkernels.training.recipe.lessons import Lesson, LessonBatches


def prefer(recipe: Recipe) -> Outcome:
    """DPO on pairs of a better and a worse answer of the model's own."""
    config = recipe.config
    reference = recipe.models["rejection"]
    ranked, sampling = attempts(recipe, "preference-samples", reference, config.seed + 2)
    found = [pair for answers in ranked for pair in pairs(answers)]
    batches = LessonBatches(found, config.batch_size, config.seed)
    policy, training = reference.clone(), config.preference
    objective = Preference(
        policy, reference, config.beta, config.hard_weight, training.accumulate,
        config.loss.memory_budget,
    )  # fmt: skip
    more = {"beta": config.beta, "hard_weight": config.hard_weight}
    seconds = recipe.learn("preference", policy, batches, training, objective, **more)
    return Outcome(policy, sampling + seconds, {"pairs": len(found)})


def pairs(answers: Ranked) -> list[tuple[Lesson, Lesson]]:
    """The best answer and the worst, the second best and the second worst, while they differ."""
    half = len(answers) // 2
    ends = zip(answers[:half], reversed(answers), strict=False)
    return [(chosen, rejected) for (high, chosen), (low, rejected) in ends if high > low]
