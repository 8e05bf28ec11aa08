"""Which tokenizer numbered the tokens."""

from __future__ import annotations

from typing import Any

from bgkernels.training.files import digest


def fingerprint(tokenizer: Any) -> str:
    """Identifies which number stands for which token; how text is cut does not enter.

    Args:
        tokenizer: of ``transformers``, or anything with ``get_vocab()``.

    Example:
        >>> class Tiny:
        ...     def get_vocab(self):
        ...         return {"a": 0, "b": 1}
        >>> fingerprint(Tiny()) == fingerprint(Tiny())
        True
    """
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[::-1])
    return digest(f"{number}:{token}".encode("utf-8", "surrogatepass") for token, number in vocab)
