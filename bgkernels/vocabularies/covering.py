"""How much of a text two tokenizers share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bgkernels.vocabularies.agreement import next_pairs
from bgkernels.vocabularies.alignment import Alignment, align
from bgkernels.vocabularies.matching import VocabularyMatch
from bgkernels.vocabularies.readers import reader_of

SPANS = ("1-1", "n-1", "1-n", "n-m")


@dataclass(frozen=True)
class Coverage:
    """What the match of two tokenizers covers of some texts.

    Args:
        tokens: of the student and of the teacher.
        student, teacher: the share of the tokens on each side that are in a pair.
        aligned: the share of the student's positions that have a soft label.
        same: the share of those at which both have the same token next.
        spans: the share of the student's tokens that are in spans of each kind: between two common
            places there are as many tokens of the student as of the teacher says, ``"n-1"``
            several of the student for one of the teacher.
        differing: texts that do not come back as the same bytes from both.
    """

    tokens: tuple[int, int]
    student: float
    teacher: float
    aligned: float
    same: float
    spans: Mapping[str, float]
    differing: int

    @classmethod
    def of(
        cls,
        match: VocabularyMatch,
        student: Sequence[Sequence[int]],
        teacher: Sequence[Sequence[int]],
    ) -> Coverage:
        """What is covered of texts that both tokenizers have encoded.

        Args:
            match: of the two tokenizers.
            student, teacher: ids of each text.
        """
        flat = [torch.tensor([i for row in rows for i in row]) for rows in (student, teacher)]
        shares = [
            float(torch.isin(tokens, paired).double().mean())
            for tokens, paired in zip(flat, match.pairs, strict=True)
        ]
        found = align(match, student, teacher)
        own, other = next_pairs(match, found, student, teacher)
        return cls(
            tokens=(len(flat[0]), len(flat[1])),
            student=shares[0],
            teacher=shares[1],
            aligned=found.share,
            same=float(((own == other) & (own >= 0)).mean()) if len(own) else 0.0,
            spans=_spans(found, max(map(len, teacher))),
            differing=int((found.differing > 0).sum()),
        )


def coverage(
    match: VocabularyMatch, student_tokenizer: Any, teacher_tokenizer: Any, texts: Sequence[str]
) -> Coverage:
    """Measure on some texts how much a student can learn from a teacher's tokens.

    Args:
        match: of the two tokenizers.
        student_tokenizer, teacher_tokenizer: the same.
        texts: whatever is to be learnt.

    Raises:
        VocabularyError: the match is of other tokenizers.
        ValueError: there is no text.

    Example:
        >>> from bgkernels.training.tokens import train_tokenizer
        >>> from bgkernels.vocabularies import match
        >>> student, teacher = train_tokenizer(["aaaa"], 258), train_tokenizer(["abab"], 258)
        >>> found = coverage(match(student, teacher), student, teacher, ["aabab"])
        >>> found.tokens, found.student, found.aligned, found.spans["1-1"]
        ((4, 3), 0.75, 0.5, 0.0)
    """
    if not any(texts):
        raise ValueError("`texts` must hold some text; got none")
    match.check_tokenizers(student_tokenizer, teacher_tokenizer)
    ids = (reader_of(x).encode(texts) for x in (student_tokenizer, teacher_tokenizer))
    return Coverage.of(match, *ids)


def _spans(found: Alignment, width: int) -> dict[str, float]:
    """The student's tokens by the kind of span that they are in."""
    sums = dict.fromkeys(SPANS, 0)
    for row, positions in enumerate(found.positions.numpy()):
        at = np.flatnonzero(positions >= 0)
        own = np.diff(at, prepend=-1)
        other = np.diff(positions[at] - row * width, prepend=-1)
        for several, many in ((False, False), (True, False), (False, True), (True, True)):
            chosen = ((own > 1) == several) & ((other > 1) == many)
            sums[SPANS[several + 2 * many]] += int(own[chosen].sum())
    return {kind: count / max(found.tokens, 1) for kind, count in sums.items()}
