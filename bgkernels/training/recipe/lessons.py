"""Problems with answers as tokens, and batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bgkernels.training.errors import CorpusError
from bgkernels.training.files import digest
from bgkernels.training.tasks import Problem, Task
from bgkernels.training.tokens import IGNORED, Batch, Epochs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Lesson:
    """A problem and an answer.

    Args:
        prompt: tokens of the problem.
        answer: tokens of the answer, with its end if it has one.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def batch_of(lessons: Sequence[Lesson], *, prompts: bool = False) -> Batch:
    """Lessons one below the other, filled up at their ends with tokens that nobody learns.

    Args:
        lessons: at least one.
        prompts: whether the problems are learnt too.

    Example:
        >>> batch_of([Lesson((5, 6), (7, 0)), Lesson((5,), (8,))]).labels
        tensor([[-100,    7,    0],
                [   8, -100, -100]])
    """
    longest = max(map(len, lessons))
    tokens = torch.zeros(len(lessons), longest, dtype=torch.int64)
    labels = torch.full_like(tokens, IGNORED)
    for row, lesson in enumerate(lessons):
        tokens[row, : len(lesson)] = torch.tensor(lesson.prompt + lesson.answer)
        first = 0 if prompts else len(lesson.prompt)
        labels[row, first : len(lesson)] = tokens[row, first : len(lesson)]
    return Batch(tokens, labels[:, 1:])


@dataclass
class LessonBatches:
    """Training batches of groups of lessons: one by one, or a chosen answer and a rejected one.

    Args:
        groups: of equal size. A batch has the first lessons of all its groups, then the second.
        size: groups of a batch.
        seed: of the order.
        prompts: whether the problems are learnt too.

    Raises:
        CorpusError: there are fewer groups than a batch needs.
    """

    groups: Sequence[Sequence[Lesson]]
    size: int
    seed: int
    prompts: bool = False
    _epochs: Epochs = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.groups) < self.size:
            raise CorpusError(
                f"a batch needs {self.size} answers or pairs of them, and there are "
                f"{len(self.groups)}; raise --problems or --samples, or lower --batch-size"
            )
        self._epochs = Epochs(len(self.groups), self.size, self.seed)

    def __getitem__(self, number: int) -> Batch:
        """The batch of a number, counted over all epochs."""
        chosen = [self.groups[i] for i in self._epochs[number].tolist()]
        columns = zip(*chosen, strict=True)
        return batch_of([x for column in columns for x in column], prompts=self.prompts)

    @property
    def identity(self) -> dict[str, Any]:
        """What tells them from others, for checkpoints."""
        lessons = (lesson for group in self.groups for lesson in group)
        data = digest(repr((x.prompt, x.answer)).encode() for x in lessons)
        return {"data": data, "prompts": self.prompts, "batch_size": self.size}


@dataclass(frozen=True)
class Classroom:
    """A task in the tokens of the models that learn it.

    Args:
        task: its problems, solutions and marks.
        tokenizer: of all models.
    """

    task: Task
    tokenizer: PreTrainedTokenizerBase

    @property
    def end(self) -> int:
        """The token that ends an answer."""
        end = self.tokenizer.eos_token_id
        assert isinstance(end, int)
        return end

    def prompt(self, problem: Problem) -> tuple[int, ...]:
        """Tokens of a problem, begun as the tokenizer's models are used to."""
        begin = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        return (*begin, *self._encode(problem.prompt))

    def lessons(self, problems: Sequence[Problem], seed: int) -> list[Lesson]:
        """Problems with one solution each, whose wording depends on the seed."""
        return [
            Lesson(self.prompt(p), (*self._encode(self.task.solve(p, seed)), self.end))
            for p in problems
        ]

    def right(self, problem: Problem, answer: Sequence[int]) -> bool:
        """Whether an answer ends, and is right."""
        return self.task.right(problem, self.text(answer))

    def text(self, answer: Sequence[int]) -> str:
        """An answer without its end; one that has no end says nothing."""
        *said, last = answer
        return str(self.tokenizer.decode(said)) if last == self.end else ""

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))


def padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """``(rows, longest)`` tokens filled up at their ends, and ``(rows,)`` lengths."""
    lengths = torch.tensor([len(p) for p in prompts])
    tokens = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    return tokens, lengths
