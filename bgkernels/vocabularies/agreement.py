"""Tokens that mean the same event in both tokenizations, learnt from text."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from bgkernels.vocabularies.alignment import Alignment, Ids, align, matrix
from bgkernels.vocabularies.errors import VocabularyError
from bgkernels.vocabularies.matching import VocabularyMatch
from bgkernels.vocabularies.vocabulary import Array


def agreeing(
    match: VocabularyMatch, student: Ids, teacher: Ids, *, least: float = 0.5
) -> VocabularyMatch:
    """Keep the pairs that both tokenizations of a text use at the same places.

    A student that has no token for ``teacher`` writes ``t`` first, which its teacher has too and
    hardly ever writes: it writes ``teacher`` at once. Such a token has the same bytes and another
    probability, and a soft label that pairs it would teach what is wrong. Where one of the two
    tokenizations of the text has a token of a pair next, after the same bytes, the other should
    have it too; pairs that do so too seldom are left to the rest.

    Args:
        match: of the two tokenizers.
        student, teacher: ids of the same texts, as for :func:`bgkernels.vocabularies.align`; some
            hundred thousand tokens of what is to be learnt.
        least: share of the places of either that both must have, in [0, 1]; a token that the texts
            do not have keeps its pair.

    Raises:
        ValueError: ``least`` lies outside.
        VocabularyError: no pair is left.

    Example:
        >>> from bgkernels.training.tokens import train_tokenizer
        >>> from bgkernels.vocabularies import match
        >>> one, two = train_tokenizer(["aaaa"], 258), train_tokenizer(["abab"], 258)
        >>> found = match(one, two)
        >>> ids = [[x.encode("b ab ab")] for x in (one, two)]
        >>> kept = agreeing(found, *ids)
        >>> {*found.pairs[0].tolist()} - {*kept.pairs[0].tolist()} == {one.encode("a")[0]}
        True
    """
    if not 0 <= least <= 1:
        raise ValueError(f"`least` must lie in [0, 1]; got {least}")
    own, other = next_pairs(match, align(match, student, teacher), student, teacher)
    count = match.pairs.shape[1]
    both = np.bincount(own[(own == other) & (own >= 0)], minlength=count)
    either = sum(np.bincount(x[x >= 0], minlength=count) for x in (own, other)) - both
    kept = both >= least * either
    if not kept.any():
        raise VocabularyError(
            f"no pair of tokens is used alike in at least {least:.0%} of its places; lower `least`"
        )
    return replace(match, pairs=match.pairs[:, kept.nonzero()[0]])


def next_pairs(
    match: VocabularyMatch, found: Alignment, student: Ids, teacher: Ids
) -> tuple[Array, Array]:
    """The tokens that follow common places, by the number of their pair; -1 for those of none.

    Args:
        match: of the two tokenizers.
        found: how the ids are aligned.
        student, teacher: the ids.

    Returns:
        ``(n,)`` int64 for the student, and for the teacher.
    """
    at = np.flatnonzero(found.positions.numpy().ravel() >= 0)
    places = at, found.positions.numpy().ravel()[at]
    sides = (student, match.student, "student"), (teacher, match.teacher, "teacher")
    following = []
    for (given, vocabulary, name), place, paired in zip(sides, places, match.pairs, strict=True):
        ids = matrix(given, name)
        padded = np.pad(ids, ((0, 0), (0, 1)), constant_values=-1)
        token = padded[place // ids.shape[1], place % ids.shape[1] + 1] if len(place) else place
        number = np.full(vocabulary.size + 1, -1)  # the last one is that of no token
        number[paired.numpy()] = np.arange(len(paired))
        following.append((token, number[token]))
    (one, own), (two, other) = following
    present = (one >= 0) & (two >= 0)
    return own[present], other[present]
