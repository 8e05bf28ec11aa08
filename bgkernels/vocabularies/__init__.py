"""Student and teacher with two tokenizers: which tokens, and which positions, are the same.

:func:`match` pairs tokens by the bytes that they stand for, and :func:`align` finds the positions
of two tokenizations that have read the same bytes. :func:`agreeing` keeps the pairs that both use
alike, :func:`coverage` measures what is covered of some texts, and :class:`Translator` writes a
student's batch in the tokens of its teacher.
"""

from bgkernels.vocabularies.agreement import agreeing
from bgkernels.vocabularies.alignment import Alignment, align
from bgkernels.vocabularies.covering import Coverage, coverage
from bgkernels.vocabularies.errors import VocabularyError
from bgkernels.vocabularies.matching import VocabularyMatch, match
from bgkernels.vocabularies.readers import read
from bgkernels.vocabularies.translation import Translation, Translator
from bgkernels.vocabularies.vocabulary import Vocabulary

__all__ = [
    "Alignment",
    "Coverage",
    "Translation",
    "Translator",
    "Vocabulary",
    "VocabularyError",
    "VocabularyMatch",
    "agreeing",
    "align",
    "coverage",
    "match",
    "read",
]
