"""Answers that a model samples, and who judges them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bgkernels.training.generation import generate
from bgkernels.training.models import CausalLM
from bgkernels.training.preference import sequence_log_probs
from bgkernels.training.recipe.base import Recipe
from bgkernels.training.recipe.lessons import Lesson, batch_of, padded
from bgkernels.training.tasks import Problem
from bgkernels.training.tracing import TracedLM

Ranked = list[tuple[float, Lesson]]
"""Answers to a problem with their scores, the best first; one of ``-inf`` is not to be learnt."""


def said(
    recipe: Recipe, model: CausalLM, problems: Sequence[Problem], seed: int,
    *, each: int = 1, temperature: float = 1.0,
) -> Tensor:  # fmt: skip
    """``(problems·each, longest)`` what a model answers, filled up with the end."""
    prompts, lengths = padded([recipe.room.prompt(p) for p in problems])
    return generate(
        TracedLM.of(model),
        prompts.repeat_interleave(each, 0),
        recipe.longest,
        min(model.vocab, len(recipe.room.tokenizer)),
        seed,
        lengths=lengths.repeat_interleave(each),
        temperature=temperature,
        stop=recipe.room.end,
    ).cpu()


def ended(row: Tensor, end: int) -> tuple[int, ...]:
    """A row up to its end, which may be missing."""
    tokens = row.tolist()
    return tuple(tokens[: tokens.index(end) + 1] if end in tokens else tokens)


def by_checker(recipe: Recipe, problem: Problem, answers: Sequence[Lesson]) -> list[float]:
    """0 for right answers, ``-inf`` for wrong ones."""
    return [0.0 if recipe.room.right(problem, x.answer) else -math.inf for x in answers]


@torch.no_grad()
def by_likelihood(recipe: Recipe, problem: Problem, answers: Sequence[Lesson]) -> list[float]:
    """The teacher's mean log-probability of a token."""
    teacher = recipe.models["teacher"]
    batch = batch_of(answers).to(teacher.device)
    total = sequence_log_probs(teacher, batch, recipe.config.loss.memory_budget)
    return [x / len(lesson.answer) for x, lesson in zip(total.tolist(), answers, strict=True)]


JUDGES: dict[str, Callable[[Recipe, Problem, Sequence[Lesson]], list[float]]] = {
    "checker": by_checker,
    "likelihood": by_likelihood,
}
"""Who says which answers are better: ``(recipe, problem, answers) -> scores``."""


def attempts(recipe: Recipe, name: str, model: CausalLM, seed: int) -> tuple[list[Ranked], float]:
    """Several answers of a model to each of many problems, ranked by the judge.

    Args:
        recipe: whose problems, judge and folder are used.
        name: of the folder where the answers are kept.
        model: who answers, at temperature 1.
        seed: of problems and samples.

    Returns:
        The ranked answers of each problem, and the seconds that sampling took.
    """
    config, room = recipe.config, recipe.room
    problems = room.task.problems("train", config.problems, seed)
    store = recipe.store(
        name, model=model.digest, samples=config.samples, problems=config.problems, draw=seed
    )
    state = store.load()
    if state is None:
        started = time.perf_counter()
        with recipe.display.working(
            f"{name}: {config.samples} answers to {len(problems)} problems"
        ):
            rows = said(recipe, model, problems, seed, each=config.samples)
        state = {"answers": rows, "seconds": time.perf_counter() - started}
        store.save(0, state)
    judge = JUDGES[config.judge]
    ranked = []
    for problem, rows in zip(problems, state["answers"].split(config.samples), strict=True):
        lessons = [Lesson(room.prompt(problem), ended(row, room.end)) for row in rows]
        scores = judge(recipe, problem, lessons)
        order = sorted(range(len(lessons)), key=lambda i: -scores[i])
        ranked.append([(scores[i], lessons[i]) for i in order])
    return ranked, state["seconds"]
