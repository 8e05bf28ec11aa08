"""Two pens for one text: a task states its solutions once, to be written and to be read.

A task calls :meth:`Pen.bridge` for what must be said, and :meth:`Pen.garden` where several tokens
will do. The composer draws one of them; the reader takes the one that stands there.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

Kind = Literal["bridge", "garden"]
Choice = tuple[str, int]
"""Name of a garden, and the number of the option that was taken there."""


class Pen(Protocol):
    """What a task calls to state a solution."""

    def bridge(self, text: str) -> None:
        """Say what must be said."""

    def garden(self, name: str, options: Sequence[str]) -> str:
        """Say one of several, of which none begins with the first token of another.

        Args:
            name: of the garden, the same wherever the same choice is made.
            options: all equally good.

        Returns:
            The one that was said.
        """


class Composer:
    """A pen that draws, each option as probable as any other.

    Args:
        seed: of the choices.

    Example:
        >>> pen = Composer(seed=0)
        >>> pen.bridge("1 + 1"), pen.garden("verb", [" is ", " makes "])
        (None, ' makes ')
        >>> pen.text
        '1 + 1 makes '
    """

    def __init__(self, seed: int | str) -> None:
        self.text = ""
        self._random = random.Random(seed)

    def bridge(self, text: str) -> None:
        self.text += text

    def garden(self, name: str, options: Sequence[str]) -> str:
        chosen = self._random.choice(options)
        self.text += chosen
        return chosen


class Departure(Exception):
    """A text says what no solution says there."""

    def __init__(self, kind: Kind) -> None:
        super().__init__(kind)
        self.kind = kind


class Reader:
    """A pen that follows a text token by token, until it says what no solution says.

    Args:
        tokens: of the text, as strings.
        cut: how text is cut into tokens.

    Raises:
        Departure: from the methods, at the first wrong token; ``place`` is its number.
    """

    def __init__(self, tokens: Sequence[str], cut: Callable[[str], list[str]]) -> None:
        self.tokens, self.cut, self.place = tokens, cut, 0
        self.choices: list[Choice] = []

    def bridge(self, text: str) -> None:
        self._follow(self.cut(text))

    def garden(self, name: str, options: Sequence[str]) -> str:
        for number, option in enumerate(options):
            first, *rest = self.cut(option)
            if self.tokens[self.place : self.place + 1] == [first]:
                self.place += 1
                self._follow(rest)
                self.choices.append((name, number))
                return option
        raise Departure("garden")

    def end(self) -> None:
        """Nothing may follow."""
        if self.place < len(self.tokens):
            raise Departure("bridge")

    def _follow(self, tokens: Sequence[str]) -> None:
        for token in tokens:
            if self.tokens[self.place : self.place + 1] != [token]:
                raise Departure("bridge")
            self.place += 1
