"""Sequences of tokens as places in a text: where each token begins, and what stands before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bgkernels.vocabularies import hashing
from bgkernels.vocabularies.vocabulary import Array, Vocabulary

SPACE = 0x20
ROLE = b"\xff"
"""A byte that no text in UTF-8 has."""


@dataclass(frozen=True, eq=False)
class Reading:
    """What each token adds to a text, as a length and a hash.

    Args:
        lengths: ``(size,)`` int64 bytes; 0 for tokens that are passed over.
        hashes: ``(size,)`` uint64.
        spaces: ``(size,)`` int64: with so many of them it begins.
    """

    lengths: Array
    hashes: Array
    spaces: Array

    @classmethod
    def of(cls, vocabulary: Vocabulary, events: Sequence[str]) -> Reading:
        """The reading of a vocabulary.

        Args:
            vocabulary: of the tokenizer.
            events: roles that stand for something in a text; others are passed over.
        """
        names = [ROLE + role.encode() for role in events]
        content = np.concatenate([vocabulary.content, np.frombuffer(b"".join(names), np.uint8)])
        lengths = np.concatenate([vocabulary.lengths, [len(x) for x in names]]).astype(np.int64)
        ends = lengths.cumsum()
        hashes = hashing.hash_pieces(content, ends)
        spaces = _spaces(content, ends, lengths)
        size, ids = vocabulary.size, [vocabulary.roles[role] for role in events]
        for array in (lengths, hashes, spaces):
            array[ids] = array[size:]
        return cls(lengths[:size], hashes[:size], spaces[:size])


class Stream(NamedTuple):
    """The tokens of a batch that stand for something, in their order.

    Args:
        at: ``(n,)`` int64, in the flattened batch.
        speaker: ``(n,)`` int64: the position before it, which predicts it; -1: there is none.
        segment: ``(n,)`` int64: of the text, ascending.
        lengths: ``(n,)`` int64 bytes.
        hashes: ``(n,)`` uint64.
        spaces: ``(n,)`` int64: with so many of them it begins.
        closing: ``(n,)`` bool: whether its row ends with it.
    """

    at: Array
    speaker: Array
    segment: Array
    lengths: Array
    hashes: Array
    spaces: Array
    closing: Array

    @classmethod
    def of(cls, ids: Array, segments: Array | None, reading: Reading, count: int) -> Stream:
        """The tokens of ``(batch, length)`` ids.

        Args:
            ids: negative where there is no token.
            segments: ``(batch, length)`` part of the row's text that each token belongs to, below
                0 for tokens of none; None: one text a row.
            reading: of the vocabulary.
            count: segments of a row at most.
        """
        rows = np.broadcast_to(np.arange(len(ids))[:, None], ids.shape)
        real = chosen = ids >= 0
        segment = rows
        if segments is not None:
            chosen = chosen & (segments >= 0)
            segment = rows * count + segments
        at = np.flatnonzero(chosen)
        at = at[reading.lengths[ids.ravel()[at]] > 0]
        tokens, width = ids.ravel()[at], max(ids.shape[1], 1)
        spoken = (at % width > 0) & real.ravel()[at - 1]
        left = real[:, ::-1].cumsum(1)[:, ::-1]  # tokens from here to the end of the row
        return cls(
            at,
            np.where(spoken, at - 1, -1),
            segment.ravel()[at],
            reading.lengths[tokens],
            reading.hashes[tokens],
            reading.spaces[tokens],
            left.ravel()[at] == 1,
        )

    @property
    def starts(self) -> Array:
        """``(segments,)`` int64: the first token of each segment that has one."""
        return np.flatnonzero(np.diff(self.segment, prepend=-1))

    @property
    def indents(self) -> Array:
        """``(segments,)`` int64: with how many spaces each segment begins."""
        next_token = self.starts
        ends = np.append(next_token[1:], len(self.at))
        found, segments = np.zeros_like(next_token), np.arange(len(next_token))
        while len(segments):
            tokens = next_token[segments]
            found[segments] += self.spaces[tokens]
            next_token[segments] += 1
            goes_on = (self.spaces[tokens] == self.lengths[tokens]) & (tokens + 1 < ends[segments])
            segments = segments[goes_on]
        return found

    def unspaced(self, chosen: Array) -> Stream:
        """The same tokens; some of them begin one byte later, after a space before a text.

        Args:
            chosen: ``(k,)`` int64 tokens of this stream.
        """
        lengths, hashes = self.lengths.copy(), self.hashes.copy()
        lengths[chosen] -= 1
        hashes[chosen] = hashing.without_first(hashes[chosen], SPACE)
        changed, kept = self._replace(lengths=lengths, hashes=hashes), lengths > 0
        return Stream(*(x[kept] for x in changed))

    def places(self) -> Places:
        """Where each token begins, and where texts end that end with their row."""
        starts = self.starts
        of = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(self.at)))
        ends = self.lengths.cumsum()
        before = ends - self.lengths
        before -= before[starts][of]
        longest = int((before + self.lengths).max(initial=0))
        terms = self.hashes * hashing.powers(longest)[before] if len(before) else self.hashes
        sums = terms.cumsum(dtype=np.uint64)
        read = sums - terms
        read -= read[starts][of]
        key = (self.segment << 32) + before
        final = np.flatnonzero(self.closing)
        return Places(
            np.insert(key, final + 1, key[final] + self.lengths[final]),
            np.insert(read, final + 1, read[final] + terms[final]),
            np.insert(self.speaker, final + 1, self.at[final]),
        )


class Places(NamedTuple):
    """Places in the texts of a batch, in ascending order.

    Args:
        key: ``(n,)`` int64: the segment, and the bytes before the place in it.
        read: ``(n,)`` uint64: the hash of those bytes.
        speaker: ``(n,)`` int64: the position whose prediction begins there; -1: none does.
    """

    key: Array
    read: Array
    speaker: Array


def _spaces(content: Array, ends: Array, lengths: Array) -> Array:
    """``(pieces,)`` int64: with how many spaces each piece begins."""
    places = np.arange(len(content) + 1)
    other = np.append(content != SPACE, True)
    following = np.minimum.accumulate(np.where(other, places, len(content))[::-1])[::-1]
    found: Array = np.minimum(following[ends - lengths], ends) - (ends - lengths)
    return found
