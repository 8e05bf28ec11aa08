"""A teacher's tokens for a batch of the student's, and the positions that can be compared."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bgkernels.vocabularies.alignment import Alignment, align
from bgkernels.vocabularies.matching import VocabularyMatch
from bgkernels.vocabularies.readers import Reader, reader_of
from bgkernels.vocabularies.roles import SILENT

CONTINUES = range(0x80, 0xC0)
"""Bytes that do not begin a character of UTF-8."""


class Translation(NamedTuple):
    """What a teacher reads.

    Args:
        ids: ``(batch, length)`` int64 of the teacher, -1 after the end of a row.
        alignment: of the student's batch with it.
    """

    ids: Tensor
    alignment: Alignment


@dataclass(frozen=True, eq=False)
class Translator:
    """Writes the text of a student's tokens in those of its teacher.

    Text between special tokens is encoded anew; special tokens that both have, by their role, are
    put in their places, and those of the student alone are left out. What the teacher's tokenizer
    puts before every text (``<s>``) comes first. A row that was cut within a character loses that
    character, and its positions have no soft label.

    Args:
        match: of the two tokenizers.
        teacher_tokenizer: the teacher's.

    Raises:
        VocabularyError: the match is not of this tokenizer.

    Example:
        >>> from bgkernels.training.tokens import train_tokenizer
        >>> from bgkernels.vocabularies import match
        >>> student, teacher = train_tokenizer(["aaaa"], 258), train_tokenizer(["abab"], 258)
        >>> translate = Translator(match(student, teacher), teacher)
        >>> found = translate(torch.tensor([student.encode("abab<|endoftext|>")]))
        >>> teacher.decode(found.ids[0])
        'abab<|endoftext|>'
        >>> found.alignment.positions
        tensor([[-1,  0, -1,  1,  2]])
    """

    match: VocabularyMatch
    teacher_tokenizer: Any
    reader: Reader = field(init=False, repr=False)
    prefix: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.match.check_tokenizers(teacher=self.teacher_tokenizer)
        object.__setattr__(self, "reader", reader_of(self.teacher_tokenizer))
        object.__setattr__(self, "prefix", _prefix(self.teacher_tokenizer))

    def __call__(self, ids: Tensor) -> Translation:
        """The teacher's tokens, and which of its positions say something about which of the ids.

        Args:
            ids: ``(batch, length)`` integers of the student, negative where there is no token.

        Raises:
            ValueError: ids beyond the student's vocabulary.
        """
        rows = ids.cpu().numpy()
        parts = [list(self._parts(row)) for row in rows]
        texts = [part.text for row in parts for part in row]
        encoded = iter(self.reader.encode(texts) if texts else [])
        segments = np.full(rows.shape, -1, dtype=np.int64)
        tokens, numbers = [], []
        for own, row in zip(segments, parts, strict=True):
            written, its_own = [*self.prefix], [-1] * len(self.prefix)
            for number, part in enumerate(row):
                own[part.start : part.end] = number
                made = next(encoded) + part.closing
                written += made
                its_own += [number] * len(made)
            tokens.append(torch.tensor(written, dtype=torch.int64))
            numbers.append(torch.tensor(its_own, dtype=torch.int64))
        made_ids, of = (pad_sequence(x, True, -1) for x in (tokens, numbers))
        found = align(
            self.match, ids, made_ids,
            student_segments=torch.from_numpy(segments), teacher_segments=of,
        )  # fmt: skip
        return Translation(made_ids, found)

    def _parts(self, row: Any) -> Iterator[_Part]:
        """Texts of a row, each with the special token that closes it."""
        student, teacher = self.match.student, self.match.teacher
        roles = {number: role for role, number in student.roles.items()}
        special = np.isin(row, [*roles]) | (row < 0)
        at = 0
        if row.size and int(row.max()) >= student.size:
            raise ValueError(
                f"`ids` has the id {int(row.max())}, and the student's vocabulary has "
                f"{student.size} tokens"
            )
        while at < len(row) and not special[at] and student[row[at]][:1] in _CONTINUING:
            at += 1  # the rest of a character
        for stop in [*np.flatnonzero(special).tolist(), len(row)]:
            if stop < at:
                continue
            role = roles.get(int(row[stop])) if stop < len(row) else None
            closed = role is not None and role not in SILENT and role in teacher.roles
            closing = [teacher.roles[role]] if closed and role is not None else []
            if stop > at or closing:
                content = b"".join(student[i] for i in row[at:stop])
                yield _Part(at, stop + len(closing), _text(content), closing)
            at = stop + 1


class _Part(NamedTuple):
    """Tokens ``start`` to ``end`` of the student: their text, and the teacher's closing token."""

    start: int
    end: int
    text: str
    closing: list[int]


_CONTINUING = frozenset(bytes([b]) for b in CONTINUES)


def _text(content: bytes) -> str:
    """The characters of some bytes, without one that is cut at the end."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(content)


def _prefix(tokenizer: Any) -> list[int]:
    """What a tokenizer of ``transformers`` puts before every text."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        return []
    bare, whole = (tokenizer("a", add_special_tokens=x)["input_ids"] for x in (False, True))
    return list(whole[: _find(whole, bare)])


def _find(whole: list[int], bare: list[int]) -> int:
    places = range(len(whole) - len(bare) + 1)
    return next((i for i in places if whole[i : i + len(bare)] == bare), 0)
