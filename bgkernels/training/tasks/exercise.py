"""A problem with a solution as a document of fixed length, so that batches are of whole texts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bgkernels.training.errors import CorpusError
from bgkernels.training.tasks.base import Problem, Task
from bgkernels.training.tasks.registry import parse
from bgkernels.training.tasks.vocabulary import STOP

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from bgkernels.training.config import DemoConfig


@dataclass(frozen=True)
class Exercise:
    """A text of one problem: padding, prompt, solution, end, and ends that nobody learns.

    Args:
        task: that poses it.
        problem: what is read.
        solution: what is learnt.
    """

    task: Task
    problem: Problem
    solution: str

    @property
    def text(self) -> str:
        """Prompt and solution."""
        return self.problem.prompt + self.solution

    def encode(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
        """Tokens, as many of every exercise of a task, and which of them are learnt.

        Raises:
            CorpusError: the text is longer than the task says that its texts are.
        """
        given, room = self.task.room
        prompt, said = (
            tokenizer.encode(text, add_special_tokens=False)
            for text in (self.problem.prompt, self.solution)
        )
        if len(prompt) > given or len(said) >= room:
            raise CorpusError(
                f"a prompt must have at most {given} tokens and its solution {room - 1}; these "
                f"have {len(prompt)} and {len(said)}: {self.text!r}"
            )
        padding = [tokenizer.convert_tokens_to_ids(tokenizer.pad_token)] * (given - len(prompt))
        said.append(STOP)
        rest = room - len(said)
        tokens = [*padding, *prompt, *said, *[STOP] * rest]
        return tokens, [False] * given + [True] * len(said) + [False] * rest


def exercises(task: Task, problems: list[Problem], seed: int) -> tuple[Exercise, ...]:
    """Each problem with a right solution.

    Args:
        task: that posed the problems.
        problems: to solve.
        seed: of the wording.
    """
    return tuple(Exercise(task, problem, task.solve(problem, seed)) for problem in problems)


def fitted(config: DemoConfig) -> DemoConfig:
    """The configuration that fits its task: a sequence is a text, whose beginning is the prompt.

    One without a task is returned as it is.

    Raises:
        OptionError: there is no such task.
    """
    if config.data.task is None:
        return config
    given, room = parse(config.data.task).room
    length = given + room + 1  # each document is followed by an end
    prompt = (given + 0.5) / length  # of which the whole tokens are the prompt's
    return replace(
        config,
        data=replace(config.data, sequence_length=length),
        loss=replace(config.loss, prompt=prompt),
        evaluation=replace(config.evaluation, prompt=prompt),
    )
