"""What can go wrong between two vocabularies."""

from __future__ import annotations


class VocabularyError(ValueError):
    """Two tokenizers, or what was made from them, do not fit; the message names the remedy."""
