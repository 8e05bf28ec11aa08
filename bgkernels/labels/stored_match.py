"""The match of two tokenizers, beside the labels that were made with it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from bgkernels.labels.errors import CorruptLabels, LabelError
from bgkernels.vocabularies import VocabularyError, VocabularyMatch

FILE = "match.npz"


@dataclass(frozen=True)
class StoredMatch:
    """The match of a student's tokenizer with a teacher's, in the folder of the labels.

    Its file is read once in a process, however many batches come with it from workers.

    Args:
        path: of the file.
        fingerprint: of the match.
    """

    path: Path
    fingerprint: str

    @classmethod
    def write(cls, found: VocabularyMatch, folder: Path, rank: int = 0) -> StoredMatch:
        """Put a match into a folder; several processes may do it at once."""
        folder.mkdir(parents=True, exist_ok=True)
        own = folder / f"match-{rank}.npz"
        try:
            found.save(own)
            os.replace(own, folder / FILE)
        except (VocabularyError, OSError) as error:
            raise LabelError(f"could not write {folder / FILE}: {error}; run again") from error
        return cls(folder / FILE, found.fingerprint)

    @property
    def whole(self) -> VocabularyMatch:
        """The match.

        Raises:
            CorruptLabels: its file is missing, or is not what was written.
        """
        return _load(self)

    @property
    def pairs(self) -> Tensor:
        """``(2, m)`` ids, one tensor in a process, as :class:`bgkernels.MatchedTeacher` likes."""
        return self.whole.pairs


@lru_cache
def _load(stored: StoredMatch) -> VocabularyMatch:
    redo = "run what made these labels again to make it anew"
    try:
        found = VocabularyMatch.load(stored.path)
    except VocabularyError as error:
        raise CorruptLabels(f"{stored.path} is missing or corrupt: {error}; {redo}") from error
    if found.fingerprint != stored.fingerprint:
        raise CorruptLabels(f"{stored.path} is not the match that the labels have; {redo}")
    return found
