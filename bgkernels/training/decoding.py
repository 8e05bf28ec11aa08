"""How a model reads a text that grows: the beginning at once, then a token at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Decoder:
    """Reads one batch of texts, and keeps the keys and values of what it has read.

    Args:
        body: of a ``transformers`` model.

    Example:
        >>> from bgkernels.training.models import small_llama
        >>> from bgkernels.training.config import ModelShape
        >>> model = small_llama(ModelShape(32, 1, 1), vocab=512, length=64, seed=0)
        >>> text = torch.arange(12).view(2, 6)
        >>> decoder = Decoder(model.body)
        >>> state = decoder.begin(text[:, :5], room=1)
        >>> torch.allclose(decoder.go_on(text[:, 5]), model.hidden(text)[:, -1], atol=1e-5)
        True
    """

    def __init__(self, body: nn.Module) -> None:
        self.body = body
        self.past: Any = None

    def begin(self, tokens: Tensor, room: int) -> Tensor:
        """Read the beginning.

        Args:
            tokens: ``(rows, given)``.
            room: for so many tokens, at most, :meth:`go_on` will be called.

        Returns:
            ``(rows, hidden)`` the last hidden state of each text.
        """
        self.past = None
        return self._read(tokens)

    def go_on(self, token: Tensor) -> Tensor:
        """Read one more ``(rows,)`` token of each text; the hidden state of it, as before."""
        return self._read(token[:, None])

    def _read(self, tokens: Tensor) -> Tensor:
        with torch.compiler.set_stance("force_eager"):  # or each length would be compiled again
            out = self.body(input_ids=tokens, past_key_values=self.past, use_cache=True)
        self.past = out.past_key_values
        state: Tensor = out.last_hidden_state[:, -1]
        return state
