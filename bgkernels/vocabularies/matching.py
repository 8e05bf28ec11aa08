"""Which tokens of two vocabularies are the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bgkernels.vocabularies import files
from bgkernels.vocabularies.errors import VocabularyError
from bgkernels.vocabularies.readers import read
from bgkernels.vocabularies.roles import SILENT
from bgkernels.vocabularies.streams import Reading
from bgkernels.vocabularies.vocabulary import Vocabulary


def match(student_tokenizer: Any, teacher_tokenizer: Any) -> VocabularyMatch:
    """Pair the tokens of two tokenizers that stand for the same bytes or play the same role.

    A token is what it adds to a text: ``Ġthe`` of a byte-level BPE, ``▁the`` of SentencePiece and
    ``b" the"`` of tiktoken are one. Special tokens are paired by what they are for (the end of a
    text, of a turn, padding), however they are spelt; others by their spelling. Where several ids
    of a vocabulary stand for the same bytes, a piece is preferred to a byte token, then the lowest.

    Args:
        student_tokenizer, teacher_tokenizer: see :func:`bgkernels.vocabularies.read`.

    Raises:
        VocabularyError: one of them cannot be read, or they share no token.

    Example:
        >>> from bgkernels.training.tokens import train_tokenizer
        >>> text = ["the cat sat on the mat, and the dog sat on the cat"]
        >>> student, teacher = train_tokenizer(text, 270), train_tokenizer(text, 280)
        >>> found = match(student, teacher)
        >>> found.pairs.shape, found.shares
        (torch.Size([2, 270]), (1.0, 0.9818181818181818))
    """
    return VocabularyMatch.between(read(student_tokenizer), read(teacher_tokenizer))


@dataclass(frozen=True, eq=False)
class VocabularyMatch:
    """The tokens that two vocabularies share, and what the others stand for.

    Args:
        pairs: ``(2, m)`` int64: ids of the student and of the teacher, ascending in the student's.
            No id is in two pairs.
        student, teacher: the vocabularies.
    """

    pairs: Tensor
    student: Vocabulary
    teacher: Vocabulary

    @classmethod
    def between(cls, student: Vocabulary, teacher: Vocabulary) -> VocabularyMatch:
        """The match of two vocabularies that have been read.

        Raises:
            VocabularyError: they share no token.
        """
        known = _numbers(teacher)
        pairs = [(i, known[x]) for x, i in _numbers(student).items() if x in known]
        if not pairs:
            raise VocabularyError(
                f"the tokenizers share no token: none of the {student.size} tokens of the student "
                f"has the bytes of one of the teacher's {teacher.size}; are these the "
                "tokenizers of the two models?"
            )
        return cls(torch.tensor(sorted(pairs)).T.contiguous(), student, teacher)

    @property
    def shares(self) -> tuple[float, float]:
        """The share of the student's and of the teacher's ids that are in a pair."""
        count = self.pairs.shape[1]
        return count / self.student.size, count / self.teacher.size

    @property
    def unmatched(self) -> tuple[Tensor, Tensor]:
        """Ids of the student and of the teacher that are in no pair, ascending, int64."""
        sizes = (self.student.size, self.teacher.size)
        student, teacher = (
            torch.from_numpy(np.setdiff1d(np.arange(size), ids.numpy()))
            for size, ids in zip(sizes, self.pairs, strict=True)
        )
        return student, teacher

    def mass(self, probabilities: Tensor, side: str = "teacher") -> Tensor:
        """The probability that the paired tokens have.

        Args:
            probabilities: ``(..., columns)`` over one vocabulary, padded or not.
            side: whose: ``"student"`` or ``"teacher"``.

        Returns:
            ``(...)``.

        Raises:
            ValueError: another side; or fewer columns than the pairs need.
        """
        if side not in ("student", "teacher"):
            raise ValueError(f"`side` must be 'student' or 'teacher'; got {side!r}")
        self.check_heads(**{side: probabilities.shape[-1]})
        ids = self.pairs[int(side == "teacher")]
        return probabilities[..., ids.to(probabilities.device)].sum(-1)

    def check_tokenizers(self, student: Any = None, teacher: Any = None) -> None:
        """Refuse tokenizers that this match is not of.

        Args:
            student, teacher: tokenizers; None: not checked.

        Raises:
            VocabularyError: one numbers its tokens otherwise; the message shows an id.
        """
        for side, tokenizer in (("student", student), ("teacher", teacher)):
            if tokenizer is None:
                continue
            mine, its_own = getattr(self, side), read(tokenizer)
            if mine.fingerprint != its_own.fingerprint:
                raise VocabularyError(
                    f"the match is of another vocabulary than that of the {side}'s tokenizer: "
                    f"{_difference(mine, its_own)}; make it again with "
                    "bg.vocabularies.match(student_tokenizer, teacher_tokenizer)"
                )

    def check_heads(self, student: int | None = None, teacher: int | None = None) -> None:
        """Refuse heads that lack a column of the pairs.

        Args:
            student, teacher: columns of the heads; None: not checked.

        Raises:
            VocabularyError: a paired id lies beyond.
        """
        for side, columns, ids in zip(
            ("student", "teacher"), (student, teacher), self.pairs, strict=True
        ):
            largest = int(ids.max())
            if columns is not None and largest >= columns:
                raise VocabularyError(
                    f"the match pairs the {side}'s token {largest}, and the head of the {side} has "
                    f"{columns} columns; the tokenizer is that of another model, or the model "
                    f"lacks added tokens: {side}.resize_token_embeddings(n)"
                )

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the vocabularies and the pairs."""
        sha = hashlib.sha256(f"{self.student.fingerprint} {self.teacher.fingerprint}".encode())
        sha.update(self.pairs.numpy().astype("<i8").tobytes())
        return sha.hexdigest()

    @cached_property
    def readings(self) -> tuple[Reading, Reading]:
        """How the tokens of the student and of the teacher are compared in a text."""
        shared = self.student.roles.keys() & self.teacher.roles.keys()
        events = sorted(shared - {*SILENT})
        return Reading.of(self.student, events), Reading.of(self.teacher, events)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the match into one file, which :meth:`load` reads.

        Raises:
            VocabularyError: the file cannot be written.
        """
        files.save(path, self.pairs.numpy(), self.student, self.teacher)

    @classmethod
    def load(
        cls, path: str | PathLike[str], student: Any = None, teacher: Any = None
    ) -> VocabularyMatch:
        """Read a match.

        Args:
            path: of the file.
            student, teacher: tokenizers that it must be of; None: not checked.

        Raises:
            VocabularyError: it is no such file, was changed, or is of other vocabularies.
        """
        pairs, *vocabularies = files.load(path)
        found = cls(torch.from_numpy(pairs), *vocabularies)
        found.check_tokenizers(student, teacher)
        return found


def _numbers(vocabulary: Vocabulary) -> dict[bytes | str, int]:
    """The id of each bytes, and of each role, that a vocabulary has."""
    found: dict[bytes | str, int] = {role: i for role, i in vocabulary.roles.items()}
    for i, token in _preferred(vocabulary):
        if token:
            found.setdefault(token, i)
    return found


def _preferred(vocabulary: Vocabulary) -> Iterator[tuple[int, bytes]]:
    """Ids and their bytes, byte tokens last."""
    tokens, fallback = vocabulary.tokens, vocabulary.fallback.tolist()
    yield from ((i, token) for i, token in enumerate(tokens) if not fallback[i])
    yield from ((i, token) for i, token in enumerate(tokens) if fallback[i])


def _difference(one: Vocabulary, other: Vocabulary) -> str:
    """Where two vocabularies part."""
    if one.size != other.size:
        return f"it has {one.size} ids and the tokenizer {other.size}"
    if one.roles != other.roles:
        return f"its special tokens are {dict(one.roles)} and the tokenizer's {dict(other.roles)}"
    for i, (mine, its_own) in enumerate(zip(one.tokens, other.tokens, strict=True)):
        if mine != its_own:
            return f"id {i} is {mine!r} in it and {its_own!r} in the tokenizer"
    return "byte tokens are other ones"
