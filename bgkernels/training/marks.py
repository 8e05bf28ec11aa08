"""Marks: how many of a model's solutions are right, and where the wrong ones go wrong."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from bgkernels.training.generation import generate
from bgkernels.training.models import CausalLM
from bgkernels.training.tasks import STOP, Problem, Task, Verdict, parse
from bgkernels.training.tracing import TracedLM


@dataclass(frozen=True)
class Marks:
    """Verdicts on a model.

    Args:
        sampled: of each problem, on solutions that were sampled at temperature 1.
        greedy: of each problem, on the solution of the most probable tokens.
    """

    sampled: tuple[tuple[Verdict, ...], ...]
    greedy: tuple[Verdict, ...]

    @classmethod
    def of(
        cls,
        task: Task,
        problems: Sequence[Problem],
        sampled: Sequence[Sequence[str]],
        greedy: Sequence[str],
    ) -> Marks:
        """Verdicts on texts.

        Args:
            task: whose problems these are.
            problems: that were to be solved.
            sampled: of each problem, what was sampled at temperature 1.
            greedy: of each problem, the text of the most probable tokens.
        """
        return cls(
            tuple(
                tuple(task.check(problem, text) for text in texts)
                for problem, texts in zip(problems, sampled, strict=True)
            ),
            tuple(
                task.check(problem, text) for problem, text in zip(problems, greedy, strict=True)
            ),
        )

    def measures(self) -> dict[str, float]:
        """What the verdicts say.

        Returns:
            Shares of solutions: ``right`` (sampled), ``greedy``; of problems: ``passed``, of which
            one sample or more is right. Shares of the sampled solutions whose first wrong token is
            at a ``wrong_bridge`` or in a ``wrong_garden``, and ``slip``, which token that is on the
            mean (NaN where none is wrong). ``wording``: see :func:`entropy_of_wording`.
        """
        every = [verdict for verdicts in self.sampled for verdict in verdicts]
        slips = [verdict.slip for verdict in every if verdict.slip is not None]
        return {
            "right": share(verdict.right for verdict in every),
            "greedy": share(verdict.right for verdict in self.greedy),
            "passed": share(any(x.right for x in verdicts) for verdicts in self.sampled),
            "wrong_bridge": share(verdict.kind == "bridge" for verdict in every),
            "wrong_garden": share(verdict.kind == "garden" for verdict in every),
            "slip": sum(slips) / len(slips) if slips else math.nan,
            "wording": entropy_of_wording(every),
        }


def finite(measures: dict[str, float]) -> dict[str, float | None]:
    """The measures for JSON, where a mean over nothing is null."""
    return {name: x if math.isfinite(x) else None for name, x in measures.items()}


def describe(measures: dict[str, float]) -> str:
    """The measures in a line."""
    return (
        f"{measures['right']:.1%} of the sampled solutions are right, {measures['greedy']:.1%} of "
        f"the greedy ones, and {measures['passed']:.1%} of the problems have a right sample; "
        f"{measures['wrong_bridge']:.1%} first go wrong at a bridge, "
        f"{measures['wrong_garden']:.1%} in a garden"
    )


def share(conditions: Iterable[bool]) -> float:
    """The share of them that are true.

    Example:
        >>> share([True, False])
        0.5
    """
    values = list(conditions)
    return sum(values) / max(1, len(values))


def entropy_of_wording(verdicts: Iterable[Verdict]) -> float:
    """How varied the gardens are: entropy of what was chosen, in nats a choice.

    Gardens of one name are taken together, and weigh as much as they have choices.

    Example:
        >>> one, two = (Verdict(True, choices=(("verb", option),)) for option in (0, 1))
        >>> round(entropy_of_wording([one, two]), 4), entropy_of_wording([one, one])
        (0.6931, 0.0)
    """
    gardens: dict[str, Counter[int]] = defaultdict(Counter)
    for verdict in verdicts:
        for name, option in verdict.choices:
            gardens[name][option] += 1
    total = sum(options.total() for options in gardens.values())
    surprise = sum(
        count * math.log(options.total() / count)
        for options in gardens.values()
        for count in options.values()
    )
    return surprise / total if total else 0.0


PROBLEMS = 128
"""Test problems that a model is marked on at the end of a run."""


def examine_by_name(model: CausalLM, name: str) -> Marks:
    """Marks on test problems of the task of a command line."""
    task = parse(name)
    return examine(TracedLM.of(model), task, task.problems("test", PROBLEMS, seed=0))


def examine(
    model: CausalLM, task: Task, problems: Sequence[Problem], *, samples: int = 8, seed: int = 0
) -> Marks:
    """Let a model solve problems, and mark what it writes.

    Args:
        model: that has learnt the task.
        task: whose problems these are.
        problems: to be solved.
        samples: solutions of each problem, beside the greedy one.
        seed: of the samples.

    Raises:
        OptionError: the model has fewer tokens than the task.
    """
    sampled = write_solutions(model, task, problems, samples=samples, seed=seed)
    greedy = write_solutions(model, task, problems, samples=1, temperature=0.0)
    return Marks.of(task, problems, sampled, [text for (text,) in greedy])


def write_solutions(
    model: CausalLM,
    task: Task,
    problems: Sequence[Problem],
    *,
    samples: int = 1,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[list[str]]:
    """What a model writes after each prompt, up to its end.

    Args:
        model: the writer.
        task: whose problems these are.
        problems: whose prompts the model continues.
        samples: texts of each problem.
        temperature: of the samples; 0 takes the most probable token.
        seed: of the samples.

    Raises:
        OptionError: the model has fewer tokens than the task.
    """
    task.check_vocabulary(model.vocab)
    tokenizer, (given, room) = task.tokenizer, task.room
    prompts = tokenizer([x.prompt for x in problems], padding="max_length", max_length=given)
    tokens = torch.tensor(prompts["input_ids"]).repeat_interleave(samples, dim=0)
    said = generate(
        model, tokens, room - 1, len(tokenizer), seed, temperature=temperature, stop=STOP
    )
    rows = (row[: row.index(STOP)] if STOP in row else row for row in said.tolist())
    texts = [str(tokenizer.decode(row)) for row in rows]
    return [texts[first : first + samples] for first in range(0, len(texts), samples)]
