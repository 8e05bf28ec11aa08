"""Hashes of byte strings that follow from those of their pieces, for whole arrays at once."""

from __future__ import annotations

import numpy as np

from bgkernels.vocabularies.vocabulary import Array

BASE = np.uint64(0x9E3779B97F4A7C15)
"""Odd, and so invertible modulo 2^64."""
INVERSE = np.uint64(pow(int(BASE), -1, 2**64))
DIGITS = np.random.default_rng(19).integers(1, 2**64, 256, dtype=np.uint64)
"""A number for each byte."""


def powers(count: int) -> Array:
    """``(count,)`` uint64: powers of the base, modulo 2^64."""
    factors = np.full(max(count, 1), BASE)
    factors[0] = 1
    found: Array = np.multiply.accumulate(factors)[:count]
    return found


def hash_pieces(content: Array, ends: Array) -> Array:
    r"""``(pieces,)`` uint64: the hash ``Σ_i DIGITS[byte_i] · BASE^i`` of each piece.

    The hash of two pieces one after the other is ``h_1 + BASE^(length of 1) · h_2``.

    Args:
        content: ``(bytes,)`` uint8, of all pieces.
        ends: ``(pieces,)`` int64, where each ends.

    Example:
        >>> content = np.frombuffer(b"abab", dtype=np.uint8)
        >>> one, two = hash_pieces(content, np.array([2, 4]))
        >>> bool(one == two)
        True
    """
    lengths = np.diff(ends, prepend=0)
    places = np.arange(len(content)) - np.repeat(ends - lengths, lengths)
    terms = DIGITS[content] * powers(int(lengths.max(initial=0)))[places]
    sums = np.concatenate([np.zeros(1, np.uint64), terms.cumsum(dtype=np.uint64)])
    hashes: Array = sums[ends] - sums[ends - lengths]
    return hashes


def without_first(hashes: Array, byte: int) -> Array:
    """The hashes of pieces without their first byte, which is the same in all of them."""
    shorter: Array = (hashes - DIGITS[byte]) * INVERSE
    return shorter
