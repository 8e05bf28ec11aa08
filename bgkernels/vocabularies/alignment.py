"""Which positions of two tokenizations of one text can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bgkernels.vocabularies.errors import VocabularyError
from bgkernels.vocabularies.matching import VocabularyMatch
from bgkernels.vocabularies.streams import Stream
from bgkernels.vocabularies.vocabulary import Array

Ids = Tensor | Sequence[Sequence[int]]
"""``(batch, length)`` integers, negative where there is no token; or a list for each row."""


@dataclass(frozen=True)
class Alignment:
    """Positions of a student's batch and of its teacher's that have read the same bytes.

    Args:
        positions: ``(batch, length)`` int64: for each position of the student the row of the
            teacher's flattened batch whose next-token distribution is about the same place of the
            text, or -1.
        tokens: of the student, those that are no padding.
        differing: ``(batch,)`` int64: places at which both tokenizations begin a token at the same
            distance from the beginning, after other bytes. Where it is not 0, the tokenizers do not
            give the text back, or the ids are of other tokenizers.
    """

    positions: Tensor
    tokens: int
    differing: Tensor

    @property
    def share(self) -> float:
        """The share of the student's tokens that have a soft label."""
        return int((self.positions >= 0).sum()) / max(self.tokens, 1)

    def check(self, least: float = 0.0) -> None:
        """Refuse an alignment in which bytes differ and fewer positions than a share agree.

        Args:
            least: the share; 0: some position must.

        Raises:
            VocabularyError: fewer do.
        """
        odd = int((self.differing > 0).sum())
        if odd and (self.share < least or not self.share):
            raise VocabularyError(
                f"the two tokenizations are of different texts in {odd} of {len(self.differing)} "
                f"sequences, and only {self.share:.1%} of the positions agree; are the ids those "
                "of the tokenizers that were matched, and do these change the text (lower case, "
                "NFKC)? Normalise it before both read it"
            )


def align(
    match: VocabularyMatch,
    student: Ids,
    teacher: Ids,
    *,
    student_segments: Ids | None = None,
    teacher_segments: Ids | None = None,
) -> Alignment:
    """Find the positions at which both tokenizations of a text have read the same bytes.

    Position ``i`` predicts what follows token ``i``. It is comparable where a token of the student
    and one of the teacher begin at the same byte after the same bytes, which is verified by a hash
    of all that stands before in the segment. Special tokens that both have, by their role, count as
    events of the text; the beginning of a text, padding, and what only one side has are passed
    over. A space that only one side puts before a text does not count.

    Args:
        match: of the two tokenizers.
        student, teacher: ids of the same texts, a row each.
        student_segments, teacher_segments: of the same shapes: the part of the row's text (the
            message of a conversation) that a token belongs to, ascending, or a negative number for
            what is compared with nothing, such as the words of a template. None: a row is one text.

    Raises:
        ValueError: shapes that do not fit, ids beyond a vocabulary, or segments out of order.

    Example:
        >>> from bgkernels.training.tokens import train_tokenizer
        >>> from bgkernels.vocabularies import match
        >>> one = train_tokenizer(["aaaa"], 258)
        >>> two = train_tokenizer(["abab"], 258)
        >>> found = match(one, two)
        >>> ids = [one.encode("aabab"), two.encode("aabab")]
        >>> [len(x) for x in ids]
        [4, 3]
        >>> align(found, ids[:1], ids[1:]).positions
        tensor([[-1,  1, -1,  2]])
    """
    numbers = [matrix(student, "student"), matrix(teacher, "teacher")]
    parts = [
        None if given is None else _segments(given, ids, name)
        for given, ids, name in zip(
            (student_segments, teacher_segments), numbers, ("student", "teacher"), strict=True
        )
    ]
    if len(numbers[0]) != len(numbers[1]):
        raise ValueError(
            f"`student` and `teacher` must have as many rows; got {len(numbers[0])} and "
            f"{len(numbers[1])}"
        )
    if (parts[0] is None) != (parts[1] is None):
        raise ValueError("segments of both sides are needed, or of neither")
    for ids, side in zip(numbers, ("student", "teacher"), strict=True):
        size = getattr(match, side).size
        if ids.size and int(ids.max()) >= size:
            raise ValueError(
                f"`{side}` has the id {int(ids.max())}, and the vocabulary of the match has {size} "
                "tokens; match the tokenizers that made the ids"
            )
    count = 1 + max((int(x.max(initial=0)) for x in parts if x is not None), default=0)
    streams = [
        Stream.of(ids, part, reading, count)
        for ids, part, reading in zip(numbers, parts, match.readings, strict=True)
    ]
    own, other = (stream.places() for stream in _level(*streams))
    rows, width = numbers[0].shape
    positions = np.full(rows * width, -1, dtype=np.int64)
    differing = np.zeros(rows, dtype=np.int64)
    if len(own.key) and len(other.key):
        at = np.searchsorted(other.key, own.key).clip(max=len(other.key) - 1)
        met = other.key[at] == own.key
        same = met & (other.read[at] == own.read)
        used = same & (own.speaker >= 0) & (other.speaker[at] >= 0)
        positions[own.speaker[used]] = other.speaker[at][used]
        odd = own.key[met & ~same] >> 32
        differing = np.bincount(odd // count, minlength=rows)
    return Alignment(
        torch.from_numpy(positions).view(rows, width),
        int((numbers[0] >= 0).sum()),
        torch.from_numpy(differing),
    )


def _level(student: Stream, teacher: Stream) -> tuple[Stream, Stream]:
    """Both streams, without the space that one of them has before a text, and the other not."""
    starts = student.starts, teacher.starts
    begun = student.segment[starts[0]], teacher.segment[starts[1]]
    _, own, other = np.intersect1d(*begun, assume_unique=True, return_indices=True)
    more = student.indents[own] - teacher.indents[other]
    return (
        student.unspaced(starts[0][own[more == 1]]),
        teacher.unspaced(starts[1][other[more == -1]]),
    )


def matrix(ids: Any, name: str) -> Array:
    """``(batch, length)`` int64."""
    if not isinstance(ids, Tensor):
        rows = [torch.as_tensor(row, dtype=torch.int64) for row in ids]
        ids = pad_sequence(rows, batch_first=True, padding_value=-1) if rows else torch.empty(0, 0)
    if ids.dim() != 2 or (ids.is_floating_point() and ids.numel()):
        raise ValueError(
            f"`{name}` must be (batch, length) integers, or a list of ids for each row; got "
            f"{tuple(ids.shape)} {ids.dtype}"
        )
    matrix: Array = ids.detach().cpu().to(torch.int64).numpy()
    return matrix


def _segments(segments: Any, ids: Array, name: str) -> Array:
    """``(batch, length)`` int64, ascending in each row where they are not negative."""
    found = matrix(segments, f"{name}_segments")
    if found.shape != ids.shape:
        raise ValueError(
            f"`{name}_segments` must have the shape of `{name}`, {ids.shape}; got {found.shape}"
        )
    reached = np.maximum.accumulate(found, axis=1) if found.size else found
    if ((found >= 0) & (found < reached)).any():
        raise ValueError(f"`{name}_segments` must ascend in each row; number texts in their order")
    return found
