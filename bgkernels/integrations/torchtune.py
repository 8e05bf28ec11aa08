"""Losses with torchtune's call shape: chunks of logits of both models, and labels.

torchtune itself is not needed. Its recipes ask the models for the logits in chunks
(``model.set_num_output_chunks``), which saves their fp32 copies but not the logits; a recipe that
can reach the hidden states saves those too with :class:`bgkernels.LinearHybridDistillationLoss`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import bgkernels as bg


class HybridWithChunkedOutputLoss(nn.Module):
    """The hybrid distillation loss, called as torchtune's chunked losses are.

    Args:
        num_output_chunks: for the recipe, which cuts the logits; how it cuts is up to it.
        ignore_index: label of tokens that take no part.
        **options: of :class:`bgkernels.HybridDistillationLoss`; the reduction is the mean.

    Example:
        >>> loss_fn = HybridWithChunkedOutputLoss(num_output_chunks=2)
        >>> student, teacher = torch.randn(3, 6, 50), torch.randn(3, 6, 50)
        >>> labels = torch.randint(50, (3, 6))
        >>> loss = loss_fn(student.chunk(2, dim=1), teacher.chunk(2, dim=1), labels)
    """

    def __init__(
        self, num_output_chunks: int = 8, ignore_index: int = -100, **options: Any
    ) -> None:
        super().__init__()
        self.num_output_chunks = num_output_chunks
        self.ignore_index = ignore_index
        self.loss = bg.HybridDistillationLoss(ignore_index=ignore_index, **options)

    def forward(
        self, student_logits: Sequence[Tensor], teacher_logits: Sequence[Tensor], labels: Tensor
    ) -> Tensor:
        """The mean over all tokens that have a label.

        Args:
            student_logits, teacher_logits: chunks ``(batch, some length, V)``.
            labels: ``(batch, length)``, aligned with the logits.
        """
        lengths = [
            [chunk.shape[1] for chunk in chunks] for chunks in (student_logits, teacher_logits)
        ]
        if lengths[0] != lengths[1] or sum(lengths[0]) != labels.shape[1]:
            raise ValueError(
                "`student_logits` and `teacher_logits` must be cut alike, into chunks of the "
                f"labels' length {labels.shape[1]} in all; got {lengths[0]} and {lengths[1]}"
            )
        valid = (labels != self.ignore_index).sum().clamp(min=1)
        chunks = labels.split(lengths[0], dim=1)
        parts = [
            self.loss(s, bg.LogitsTeacher(t.detach()), y, num_items=valid)
            for s, t, y in zip(student_logits, teacher_logits, chunks, strict=True)
        ]
        return torch.stack(parts).sum()


class ForwardKLWithChunkedOutputLoss(HybridWithChunkedOutputLoss):
    """torchtune's loss of that name: ``-Σ p_t log p_s``, the forward KL plus the teacher's entropy.

    Args:
        num_output_chunks: number of chunks along the sequence.
        ignore_index: label of tokens that take no part.

    Example:
        >>> loss_fn = ForwardKLWithChunkedOutputLoss()
    """

    def __init__(self, num_output_chunks: int = 8, ignore_index: int = -100) -> None:
        soft = bg.divergences.Divergence("soft_cross_entropy", lambda s: s.kl_ts + s.entropy_t)
        super().__init__(num_output_chunks, ignore_index, divergence=soft, routing="soft")
