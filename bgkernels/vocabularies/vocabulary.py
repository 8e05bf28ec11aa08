"""The bytes that each token of a vocabulary stands for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """What a tokenizer's ids stand for: bytes of text, or the role of a special token.

    Args:
        content: ``(bytes,)`` uint8: the bytes of all tokens, one after the other.
        lengths: ``(size,)`` int64: how many of them each id has; 0 for an id without a text.
        fallback: ``(size,)`` bool: tokens of one byte that stand in for what has no token.
        roles: special tokens by what they are for; they have no bytes.

    Example:
        >>> letters = Vocabulary.of([b"a", b"bc", b""], roles={"eos": 2})
        >>> letters.size, letters[1], letters.roles
        (3, b'bc', {'eos': 2})
    """

    content: Array
    lengths: Array
    fallback: Array
    roles: Mapping[str, int]

    @classmethod
    def of(
        cls,
        tokens: Sequence[bytes],
        roles: Mapping[str, int] | None = None,
        fallback: Sequence[int] = (),
    ) -> Vocabulary:
        """A vocabulary of tokens in the order of their ids.

        Args:
            tokens: bytes of each; none for ids without a text.
            roles: special tokens, whose bytes are left out.
            fallback: ids of byte tokens.
        """
        roles = dict(roles or {})
        special = set(roles.values())
        kept = [b"" if i in special else token for i, token in enumerate(tokens)]
        marked = np.zeros(len(kept), dtype=bool)
        marked[list(fallback)] = True
        content = np.frombuffer(b"".join(kept), dtype=np.uint8)
        return cls(content, np.array([len(x) for x in kept], dtype=np.int64), marked, roles)

    @property
    def size(self) -> int:
        """Ids, whether each stands for something or not."""
        return len(self.lengths)

    @cached_property
    def ends(self) -> Array:
        """``(size,)`` int64: where the bytes of each token end in ``content``."""
        ends: Array = self.lengths.cumsum()
        return ends

    def __getitem__(self, token: int) -> bytes:
        end = int(self.ends[token])
        return self.content[end - int(self.lengths[token]) : end].tobytes()

    @cached_property
    def tokens(self) -> list[bytes]:
        """The bytes of every id."""
        whole, ends = self.content.tobytes(), self.ends.tolist()
        return [whole[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]

    @cached_property
    def fingerprint(self) -> str:
        """Identifies which id stands for what; how text is cut does not enter."""
        sha = hashlib.sha256(json.dumps([self.size, sorted(self.roles.items())]).encode())
        for part in (self.lengths.astype("<i8"), self.content, self.fallback):
            sha.update(part.tobytes())
        return sha.hexdigest()
