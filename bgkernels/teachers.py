"""Where the soft labels come from: a teacher's hidden states and head, or its logits."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bgkernels.sources import Source
from bgkernels.spec import Cap


@dataclass(frozen=True, eq=False)
class LinearTeacher:
    """A teacher given by its last hidden states and its head; its logits never exist as a whole.

    Args:
        hidden: ``(..., hidden_t)``, the same leading shape as the student's input; any width.
        weight: ``(vocab_t, hidden_t)``.
        bias: ``(vocab_t,)``, or None.
        logit_scale: factor on the logits (Cohere, Granite: its reciprocal).
        logit_softcap: ``cap·tanh(logits / cap)`` after the scale (Gemma 2), or None.

    Example:
        >>> import torch, bgkernels as bg
        >>> teacher = bg.LinearTeacher(torch.randn(5, 12), torch.randn(50, 12))
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    @property
    def vocab(self) -> int:
        """Number of columns."""
        return self.weight.shape[0]

    @property
    def source(self) -> Source:
        """The teacher without its tensors."""
        return Source(3, Cap(float(self.logit_scale), float(self.logit_softcap or 0)))

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """``(hidden, weight, bias)``."""
        return self.hidden, self.weight, self.bias


@dataclass(frozen=True, eq=False)
class LogitsTeacher:
    """A teacher given by its real logits.

    Args:
        logits: ``(..., vocab_t)``, the same leading shape as the student's input.

    Example:
        >>> import torch, bgkernels as bg
        >>> teacher = bg.LogitsTeacher(torch.randn(5, 50))
    """

    logits: Tensor

    @property
    def vocab(self) -> int:
        """Number of columns."""
        return self.logits.shape[-1]

    @property
    def source(self) -> Source:
        """The teacher without its tensors."""
        return Source(1, Cap())

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """``(logits,)``."""
        return (self.logits,)


Teacher = LinearTeacher | LogitsTeacher
