"""A tokenizer of a few fixed words and characters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bgkernels.training.errors import extra

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END, PAD = "<|endoftext|>", "<|pad|>"
STOP = 0
"""Number of the token that ends a solution."""


def pattern(words: Sequence[str]) -> str:
    """A regular expression that finds the longest word at a place."""
    return "|".join(map(re.escape, sorted(words, key=len, reverse=True)))


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are these words, an end (number 0) and a padding token (number 1).

    Text is cut at the longest word; decoded tokens are joined as they are.

    Args:
        words: each with the spaces that belong to it.

    Example:
        >>> tokenizer = word_tokenizer([*"0123456789", " plus "])
        >>> tokenizer.encode("12 plus 3")
        [3, 4, 12, 5]
        >>> tokenizer.decode([3, 4, 12, 5])
        '12 plus 3'
    """
    with extra():
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast
    numbers = {word: number for number, word in enumerate((END, PAD, *words))}
    tokenizer = Tokenizer(models.WordLevel(numbers))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern(words)), "isolated")
    tokenizer.decoder = decoders.Fuse()
    make: Any = PreTrainedTokenizerFast
    wrapped: PreTrainedTokenizerFast = make(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    return wrapped
