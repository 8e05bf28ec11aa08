"""Specifications, and programs in a small subset of Python that meet them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from bgkernels.training.errors import OptionError
from bgkernels.training.tasks.base import Problem, Task
from bgkernels.training.tasks.interpreter import ProgramError, run_program
from bgkernels.training.tasks.pens import Pen

NAMES = ("x", "y", "n", "t")
INDICES = ("i", "j", "k", "_")
CASES = 6
"""Inputs at random that a program is tried on, beside those around the bounds."""

SPOKEN = {"+": "plus ", "-": "minus ", "*": "times "}


@dataclass(frozen=True)
class Step:
    """What is done to the value, once, on a condition, or several times.

    Args:
        sign: ``+``, ``-`` or ``*``.
        operand: ``"b"``, or a digit.
        above: only where the value is above this; None: always.
        repeat: how often.
    """

    sign: str
    operand: str
    above: int | None = None
    repeat: int = 1

    @property
    def text(self) -> str:
        """As the specification has it."""
        when = "" if self.above is None else f"if above {self.above} "
        often = "" if self.repeat == 1 else f"{self.repeat} times over "
        return f"{when}{often}{SPOKEN[self.sign]}{self.operand}"

    def apply(self, value: int, b: int) -> int:
        """The value after the step."""
        if self.above is not None and value <= self.above:
            return value
        number = b if self.operand == "b" else int(self.operand)
        for _ in range(self.repeat):
            value = {"+": value + number, "-": value - number, "*": value * number}[self.sign]
        return value


@dataclass(frozen=True)
class Programs(Task):
    """A value goes through some steps; the program is run on inputs that no text shows.

    Names, the form of an assignment and of a condition, and the order of summands are gardens; all
    that must fit the specification, or what was chosen before, is a bridge. A program that none of
    ours resembles is right if it prints what it should.

    Args:
        steps: of a specification.
        conditions, loops: whether steps may have them.

    Raises:
        OptionError: a parameter is out of range.

    Example:
        >>> task = Programs(steps=2)
        >>> problem = task.problems("train", 1, seed=4)[0]
        >>> print(problem.prompt + task.solve(problem, seed=0))
        a, if above 4 plus 9, 3 times over plus 5
        x = a
        if 5 <= x:
         x = 9 + x
        for j in range(3):
         x += 5
        print(x)
    """

    steps: int = 3
    conditions: bool = True
    loops: bool = True

    name: ClassVar[str] = "programs"
    words: ClassVar[tuple[str, ...]] = (
        *"0123456789ab", *NAMES, *INDICES, *SPOKEN.values(), "if above ", " times over ", ", ",
        " = ", " + ", " - ", " * ", " += ", " -= ", " *= ", " > ", " >= ", " < ", " <= ",
        "if ", "for ", " in range(", ")", ":", "\n", " ", "print(",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or not 1 <= self.steps <= 20:
            raise OptionError(
                f"`steps` of programs must be a whole number from 1 to 20; got {self.steps!r}"
            )

    @property
    def room(self) -> tuple[int, int]:
        return 2 + self.steps * 7, 5 + self.steps * 14 + 4

    def pose(self, draw: random.Random) -> Problem:
        return self.specified(tuple(self._step(draw) for _ in range(self.steps)))

    @staticmethod
    def specified(steps: tuple[Step, ...]) -> Problem:
        """The problem of some steps; its key is what a right program prints for many inputs."""
        said = "".join(f", {step.text}" for step in steps)
        key = " ".join(str(value(steps, a, b)) for a in range(-4, 24) for b in (2, 7))
        return Problem(f"a{said}\n", key, steps)

    def _step(self, draw: random.Random) -> Step:
        kinds = ["plain", *["condition"] * bool(self.conditions), *["loop"] * bool(self.loops)]
        kind = draw.choice(kinds)
        sign = draw.choice("+-" if kind == "loop" else "+-*")
        operand = draw.choice(["b", *"23456789"])
        if kind == "condition":
            return Step(sign, operand, above=draw.randint(2, 8))
        return Step(sign, operand, repeat=draw.randint(2, 5) if kind == "loop" else 1)

    def compose(self, problem: Problem, pen: Pen) -> None:
        name = pen.garden("name", NAMES)
        pen.bridge(" = a\n")
        for step in problem.parts:
            if step.above is not None:
                self._condition(name, step.above, pen)
            if step.repeat > 1:
                pen.bridge("for ")
                pen.garden("index", INDICES)
                pen.bridge(f" in range({step.repeat}):\n ")
            self._assignment(name, step, pen)
        pen.bridge(f"print({name})")

    @staticmethod
    def _condition(name: str, above: int, pen: Pen) -> None:
        """``x > 7``, ``x >= 8``, ``7 < x`` or ``8 <= x``."""
        pen.bridge("if ")
        first = pen.garden("condition", (name, str(above), str(above + 1)))
        if first == name:
            sign = pen.garden("comparison", (" > ", " >= "))
            pen.bridge(str(above if sign == " > " else above + 1))
        else:
            pen.bridge(f"{' < ' if first == str(above) else ' <= '}{name}")
        pen.bridge(":\n ")

    @staticmethod
    def _assignment(name: str, step: Step, pen: Pen) -> None:
        """``x += 3``, ``x = x + 3`` or ``x = 3 + x``."""
        sign, operand = step.sign, step.operand
        pen.bridge(name)
        if pen.garden("assignment", (" = ", f" {sign}= ")) != " = ":
            pen.bridge(operand)
        elif sign == "-":
            pen.bridge(f"{name} - {operand}")
        else:
            first = pen.garden("order", (name, operand))
            pen.bridge(f" {sign} {operand if first == name else name}")
        pen.bridge("\n")

    def right(self, problem: Problem, text: str) -> bool:
        """Whether the program prints the value for every one of some inputs, and nothing else."""
        try:
            return all(
                run_program(text, {"a": a, "b": b}) == [value(problem.parts, a, b)]
                for a, b in self._inputs(problem)
            )
        except ProgramError:
            return False

    @staticmethod
    def _inputs(problem: Problem) -> Iterator[tuple[int, int]]:
        """Every value around the bounds of conditions, then some at random."""
        draw = random.Random(f"inputs {problem.key}")
        for a in (*range(12), *(draw.randint(-20, 40) for _ in range(CASES))):
            yield a, draw.randint(2, 9)


def value(steps: tuple[Step, ...], a: int, b: int) -> int:
    """What a right program prints; specifications of one function have the same values."""
    for step in steps:
        a = step.apply(a, b)
    return a
