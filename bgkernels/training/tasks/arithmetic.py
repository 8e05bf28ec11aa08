"""Chains of sums, products and remainders with every step written out."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from bgkernels.training.errors import OptionError
from bgkernels.training.tasks.base import Problem, Task, numbers
from bgkernels.training.tasks.pens import Pen

Link = tuple[str, int]
"""An operation and the number that it takes."""

OPENINGS = ("now ", "next ", "here ", "we see ")
OPERATIONS = {
    "+": (" plus ", " and ", " with ", " added to "),
    "-": (" minus ", " less ", " without ", " reduced by "),
    "*": (" times ", " by ", " multiplied by ", " taken times "),
    "%": (" mod ", " modulo ", " remainder by ", " left over by "),
}
VERBS = (" is ", " makes ", " gives ", " equals ")
STOPS = (", ", "; ", ". ", " - ")
CLOSINGS = ("so ", "answer ", "result ", "in all ")


@dataclass(frozen=True)
class Arithmetic(Task):
    """A chain that is worked out from left to right, and the last number checked.

    Digits are bridges, connecting words gardens of four equally good choices.

    Args:
        terms: numbers of a chain.
        digits: of each number that is added or subtracted.
        operations: which of ``+-*%`` occur; factors and moduli have one digit.
        largest: no total on the way exceeds this.

    Raises:
        OptionError: a parameter is out of range.

    Example:
        >>> task = Arithmetic(terms=3)
        >>> problem = task.problems("train", 1, seed=0)[0]
        >>> problem.prompt
        '50+76+77='
        >>> task.solve(problem, seed=0)
        'now 50 and 76 equals 126, here 126 with 77 gives 203 - answer 203'
    """

    terms: int = 4
    digits: int = 2
    operations: str = "+"
    largest: int = 999

    name: ClassVar[str] = "arithmetic"
    words: ClassVar[tuple[str, ...]] = (
        *"0123456789+-*%=",
        *OPENINGS,
        *(word for words in OPERATIONS.values() for word in words),
        *VERBS,
        *STOPS,
        *CLOSINGS,
    )

    def __post_init__(self) -> None:
        for parameter, low, high in (("terms", 2, 100), ("digits", 1, 9), ("largest", 9, 10**9)):
            value = getattr(self, parameter)
            if not isinstance(value, int) or not low <= value <= high:
                raise OptionError(
                    f"`{parameter}` of arithmetic must be a whole number from {low} to {high}; "
                    f"got {value!r}"
                )
        if not self.operations or set(self.operations) - set(OPERATIONS):
            raise OptionError(
                f"`operations` of arithmetic must be some of {''.join(OPERATIONS)}; "
                f"got {self.operations!r}"
            )

    @property
    def room(self) -> tuple[int, int]:
        most = max(self.digits, len(str(self.largest)))
        step = 4 + 2 * most + self.digits
        return self.terms * (self.digits + 1), (self.terms - 1) * step + most + 3

    def pose(self, draw: random.Random) -> Problem | None:
        """A chain at random, unless a total on the way would be too large, or below zero."""
        first = self._number(draw)
        links: list[Link] = []
        total = first
        for _ in range(self.terms - 1):
            operation = draw.choice(self.operations)
            number = draw.randint(2, 9) if operation in "*%" else self._number(draw)
            links.append((operation, number))
            total = apply(total, operation, number)
            if not 0 <= total <= self.largest:
                return None
        return Problem(self._prompt(first, links), canonical(first, links), (first, *links))

    def _number(self, draw: random.Random) -> int:
        return draw.randint(10 ** (self.digits - 1), 10**self.digits - 1)

    @staticmethod
    def _prompt(first: int, links: list[Link]) -> str:
        return f"{first}{''.join(f'{operation}{number}' for operation, number in links)}="

    def compose(self, problem: Problem, pen: Pen) -> None:
        total, *links = problem.parts
        for operation, number in links:
            pen.garden("opening", OPENINGS)
            pen.bridge(str(total))
            pen.garden(operation, OPERATIONS[operation])
            pen.bridge(str(number))
            pen.garden("verb", VERBS)
            total = apply(total, operation, number)
            pen.bridge(str(total))
            pen.garden("stop", STOPS)
        pen.garden("closing", CLOSINGS)
        pen.bridge(str(total))

    def right(self, problem: Problem, text: str) -> bool:
        """Whether the last number is the total."""
        total, *links = problem.parts
        for operation, number in links:
            total = apply(total, operation, number)
        return [*numbers(text)][-1:] == [total]


def apply(total: int, operation: str, number: int) -> int:
    """One link of a chain.

    Example:
        >>> [apply(17, operation, 5) for operation in "+-*%"]
        [22, 12, 85, 2]
    """
    return {
        "+": total + number,
        "-": total - number,
        "*": total * number,
        "%": total % number,
    }[operation]


def canonical(first: int, links: list[Link]) -> str:
    """The chain with the terms of each run of sums in order, so that their order is no matter.

    Example:
        >>> canonical(45, [("+", 27), ("*", 3)]) == canonical(27, [("+", 45), ("*", 3)])
        True
    """
    runs: list[list[str]] = [[f"+{first}"]]
    for operation, number in links:
        if operation in "+-":
            runs[-1].append(f"{operation}{number}")
        else:
            runs += [[f"{operation}{number}"], []]
    return "".join(term for run in runs for term in sorted(run))
