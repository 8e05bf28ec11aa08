"""What a task is: problems, right solutions, and marks."""

from __future__ import annotations

import hashlib
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from bgkernels.training.errors import OptionError
from bgkernels.training.tasks.pens import Choice, Composer, Departure, Kind, Pen, Reader
from bgkernels.training.tasks.vocabulary import pattern, word_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Split = Literal["train", "validation", "test"]
HELD_OUT = 0.1
"""Share of all problems in the test split, and as many again in the validation split."""


@dataclass(frozen=True)
class Problem:
    """Something to be solved.

    Args:
        prompt: as a model reads it.
        key: the problem whatever its wording; the split depends on it alone.
        parts: what the task knows of it.
    """

    prompt: str
    key: str
    parts: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What is known of a solution.

    Args:
        right: whether it is.
        slip: number of the first token that no solution has there, counted from the end of the
            prompt; None where the solution is right.
        kind: of that place, ``"bridge"`` or ``"garden"``.
        choices: what was taken in each garden before it, by name of the garden.
    """

    right: bool
    slip: int | None = None
    kind: Kind | None = None
    choices: tuple[Choice, ...] = ()


@dataclass(frozen=True)
class Task(ABC):
    """A family of problems; the fields of a subclass are its parameters."""

    name: ClassVar[str]
    words: ClassVar[tuple[str, ...]]
    """The vocabulary without end and padding."""

    @abstractmethod
    def pose(self, draw: random.Random) -> Problem | None:
        """A problem at random; None where the draw came to nothing."""

    @abstractmethod
    def compose(self, problem: Problem, pen: Pen) -> None:
        """State the solutions of a problem."""

    @abstractmethod
    def right(self, problem: Problem, text: str) -> bool:
        """Whether a text solves the problem; a text that is no solution at all does not."""

    @property
    @abstractmethod
    def room(self) -> tuple[int, int]:
        """The most tokens of a prompt, and of a solution with its end and one more."""

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The same for all problems of the task; it pads prompts on the left."""
        return word_tokenizer(self.words)

    def check_vocabulary(self, size: int) -> None:
        """Refuse a model that has fewer tokens than the task.

        Raises:
            OptionError: it has.
        """
        if size < len(self.words) + 2:
            raise OptionError(
                f"the task {self.name!r} needs a vocabulary of {len(self.words) + 2} tokens; "
                f"the model has {size}. Use a model that was made for this task"
            )

    def problems(self, split: Split, count: int, seed: int) -> list[Problem]:
        """Different problems of a split.

        A hash of the problem's key decides on its split, so none of another split is among them.

        Args:
            split: ``"train"``, ``"validation"`` or ``"test"``.
            count: how many.
            seed: of the draw.

        Raises:
            OptionError: there is no such split, or the task has too few problems.
        """
        if split not in get_args(Split):
            raise OptionError(f"a split must be one of {', '.join(get_args(Split))}; got {split!r}")
        found: dict[str, Problem] = {}
        draw, misses = random.Random(f"{split} {seed}"), 0
        while len(found) < count:
            problem = self.pose(draw)
            if problem and problem.key not in found and split_of(problem.key) == split:
                found[problem.key], misses = problem, 0
            elif (misses := misses + 1) > 10_000:
                raise OptionError(
                    f"the task {self.name!r} as configured has too few problems: {count} were "
                    f"wanted for {split}, {len(found)} were found; choose larger parameters"
                )
        return list(found.values())

    def solve(self, problem: Problem, seed: int) -> str:
        """One right solution, whose wording depends on the seed."""
        pen = Composer(f"{seed} {problem.key}")
        self.compose(problem, pen)
        return pen.text

    def check(self, problem: Problem, text: str) -> Verdict:
        """Judge a solution, and see how far it goes along with one of ours.

        Args:
            problem: that it solves.
            text: what a model wrote after the prompt, up to its end.
        """
        reader, kind = Reader(self.cut(text), self.cut), None
        try:
            self.compose(problem, reader)
            reader.end()
        except Departure as departure:
            kind = departure.kind
        choices = tuple(reader.choices)
        if self.right(problem, text):
            return Verdict(True, choices=choices)
        return Verdict(False, reader.place, kind, choices)

    def cut(self, text: str) -> list[str]:
        """The text's tokens as strings; a character that belongs to none is one by itself."""
        return re.findall(f"{self._pattern}|.", text, re.DOTALL)

    @cached_property
    def _pattern(self) -> str:
        return pattern(self.words)


def split_of(key: str) -> Split:
    """The split of a problem, the same on every machine.

    Example:
        >>> split_of("+27+45")
        'validation'
    """
    share = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    return "test" if share < HELD_OUT else "validation" if share < 2 * HELD_OUT else "train"


def numbers(text: str) -> Iterator[int]:
    """The whole numbers in a text, in order; digits alone count, and longer ones are none."""
    return (int(x) for x in re.findall("[0-9]+", text) if len(x) <= 18)
