"""What a model can do after a stage: problems of the test split, solved or not."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from bgkernels.training.evaluate import score
from bgkernels.training.marks import Marks
from bgkernels.training.models import CausalLM
from bgkernels.training.recipe.attempts import ended, said
from bgkernels.training.recipe.base import Outcome, Recipe
from bgkernels.training.recipe.lessons import batch_of
from bgkernels.training.tasks import Problem


@dataclass(frozen=True)
class Standing:
    """What a model can do after a stage.

    Args:
        sampled, greedy: share of right answers at temperature 1, and of the most probable tokens.
        cross_entropy: of right solutions, in nats a token.
        parameters: of the model.
        seconds: of training and sampling, over all resumptions.
        processor_seconds: of the processor, in the process that finished the stage, marking it
            included.
        notes: of the stage.
    """

    sampled: float
    greedy: float
    cross_entropy: float
    parameters: int
    seconds: float
    processor_seconds: float
    notes: dict[str, float]


def error(share: float, problems: int) -> float:
    """Standard error of a share of so many problems.

    Example:
        >>> error(0.5, 100)
        0.05
    """
    return math.sqrt(share * (1 - share) / problems)


def examine_stage(recipe: Recipe, name: str, outcome: Outcome, started: float) -> Standing:
    """Let a model answer the problems of the test split, unless it has done so before.

    Args:
        recipe: whose problems are posed.
        name: of the stage.
        outcome: of the stage.
        started: ``time.process_time()`` at its beginning.
    """
    config, model = recipe.config, outcome.model
    store = recipe.store(f"{name}-marks", model=model.digest, examined=config.examined)
    known = store.load()
    if known is None:
        problems = recipe.room.task.problems("test", config.examined, config.seed)
        with recipe.display.working(f"{name}: answering {len(problems)} problems"):
            tokens = score(model, None, batch_of(recipe.room.lessons(problems, config.seed)))
            sampled, greedy = (_texts(recipe, model, problems, heat) for heat in (1.0, 0.0))
            marks = Marks.of(recipe.room.task, problems, [[x] for x in sampled], greedy).measures()
            standing = Standing(
                marks["right"],
                marks["greedy"],
                float(tokens.nll[tokens.valid].mean()),
                model.parameters,
                outcome.seconds,
                time.process_time() - started,
                dict(outcome.notes),
            )
        known = asdict(standing)
        store.save(0, known)
    return Standing(**known)


def _texts(
    recipe: Recipe, model: CausalLM, problems: Sequence[Problem], temperature: float
) -> list[str]:
    """What a model answers; nothing, where it does not come to an end."""
    rows = said(recipe, model, problems, recipe.config.seed, temperature=temperature)
    return [recipe.room.text(ended(row, recipe.room.end)) for row in rows]
