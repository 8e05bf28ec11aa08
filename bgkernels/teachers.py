"""Where the soft labels come from: a head, logits, or what was kept of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from bgkernels.rows.spec import Cap
from bgkernels.streaming.sources import Source, TopKSource, Weigh


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

    def source(self, compared: int) -> Source:
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

    def source(self, compared: int) -> Source:
        """The teacher without its tensors."""
        return Source(1, Cap())

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """``(logits,)``."""
        return (self.logits,)


@dataclass(frozen=True, eq=False)
class TopKTeacher:
    """A teacher that was asked before: the log-probabilities of each token's likeliest columns.

    No head is multiplied: a step takes three products instead of four. The rest of the vocabulary,
    the *tail*, is one of three things:

    * ``"bucket"``: one category with the probability that the kept columns leave. Divergences
      compare ``k + 1`` categories: a lower bound of the true ones, and never negative. Temperature
      1 only, since nobody knows what the tail is at another one.
    * ``"renormalize"``: impossible. The teacher is renormalised over the kept columns, and the
      student's tail is one category. Divergences that are infinite there are refused.
    * ``"drop"``: left out of both models, each renormalised over the kept columns.

    Routing sees the teacher column by column: the tail of a bucket is spread evenly over the
    columns that were not kept, the flattest way to complete the row, unless ``entropy`` and
    ``power_sum`` say better. The student's own statistics are those of the whole vocabulary, but
    for ``"drop"``.

    Args:
        indices: ``(..., k)`` int64 or int32, the kept columns, each once; -1 pads a short row.
        logprobs: ``(..., k)`` log-probabilities at temperature 1, normalised over the whole
            vocabulary. Where the index is -1 they are not looked at.
        tail: ``"bucket"``, ``"renormalize"`` or ``"drop"``.
        entropy: ``(...)`` Shannon entropy of the whole distribution in nats, or None.
        power_sum: ``(...)`` ``log Σ p^gamma`` of the whole distribution, or None.
        gamma: exponent of ``power_sum``; a policy with another one completes the row instead.
        vocab: columns of the teacher; None: the student's.

    Example:
        >>> import torch, bgkernels as bg
        >>> kept = torch.randn(5, 50).log_softmax(-1).topk(8)
        >>> teacher = bg.TopKTeacher(kept.indices, kept.values)
    """

    indices: Tensor
    logprobs: Tensor
    tail: str = "bucket"
    entropy: Tensor | None = None
    power_sum: Tensor | None = None
    gamma: float = 0.1
    vocab: int | None = None

    def source(self, compared: int) -> Source:
        """The teacher without its tensors."""
        k = self.indices.shape[-1]
        return TopKSource(4, Cap(), k, self.tail, float(self.gamma), compared)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """``(indices, logprobs, entropy, power_sum)``."""
        return self.indices, self.logprobs, self.entropy, self.power_sum


@dataclass(frozen=True, eq=False)
class MixtureTeacher:
    """Several teachers, each weighed per token.

    * ``kind="sum"``: the loss is ``Σ λ_i·L_i``, ``L_i`` being the loss with teacher i, but for one
      cross-entropy: its weight is the mean of what routing says of each teacher, weighed by λ. So
      every teacher's soft label counts by what routing says of that teacher. Statistics that are
      returned are means weighed by λ too; what is not a number is the first teacher's.
    * ``kind="distribution"``: one teacher, whose probabilities at the loss's temperature are
      ``Σ λ_i·p_i``. Each step walks over the teachers' heads once more.

    All are compared on the columns that the student and every teacher have.

    Args:
        teachers: two or more; top-k teachers in a sum only.
        weights: λ, not negative; for a distribution of sum 1. A number for each teacher,
            ``(..., teachers)``, or a function of the list of the teachers' ``RowStats`` that
            returns ``(tokens, teachers)``. It sees some tokens at a time, and must treat each
            alone; in a distribution only fields of the teacher (``entropy_t`` …) mean something.
        kind: ``"sum"`` or ``"distribution"``.

    Example:
        >>> import torch, bgkernels as bg
        >>> pair = [bg.LogitsTeacher(torch.randn(5, 50)) for _ in range(2)]
        >>> teacher = bg.MixtureTeacher(pair, (0.7, 0.3), kind="distribution")
        >>> def surer(stats):
        ...     return torch.softmax(-torch.stack([s.entropy_t for s in stats], -1), -1)
        >>> teacher = bg.MixtureTeacher(pair, surer)
    """

    teachers: Sequence[LinearTeacher | LogitsTeacher | TopKTeacher]
    weights: Sequence[float] | Tensor | Weigh
    kind: str = "sum"

    @property
    def vocab(self) -> int | None:
        """Number of columns that all teachers have; None: as many as the student."""
        return min((t.vocab for t in self.teachers if t.vocab is not None), default=None)


Teacher = LinearTeacher | LogitsTeacher | TopKTeacher | MixtureTeacher


def members(teacher: Teacher | None) -> tuple[LinearTeacher | LogitsTeacher | TopKTeacher, ...]:
    """The teachers of a mixture, or the one."""
    if isinstance(teacher, MixtureTeacher):
        return tuple(teacher.teachers)
    return () if teacher is None else (teacher,)
