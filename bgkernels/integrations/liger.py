"""Liger's distillation losses by their own names and arguments, to swap one import and compare.

Both have fixed weights, no routing, and no factor T² on the soft loss, as Liger's have; ``beta`` is
that of :func:`bgkernels.divergences.generalized_jsd` in both libraries. Where the teacher's
vocabulary is padded, columns that only one model has are left out; Liger compares them with zeros.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import bgkernels as bg


class LigerFusedLinearJSDLoss(nn.Module):
    """``weight_hard_loss·CE + weight_soft_loss·JSD``, the mean over the tokens that have a label.

    Like ``liger_kernel.chunked_loss.LigerFusedLinearJSDLoss``.

    Args:
        weight_hard_loss, weight_soft_loss: weights of both terms.
        beta: 0 is the forward KL, 1 the reverse KL.
        ignore_index: label of tokens that take no part.
        temperature: of the soft term; its square is not a factor.
        compiled, chunk_size: accepted and not used; the planner chooses.
        return_soft_hard_loss: return ``(loss, soft, hard)``, the last two without gradient.

    Example:
        >>> loss_fn = LigerFusedLinearJSDLoss(beta=0.1)
        >>> x, w, h, v = (torch.randn(n, 8) for n in (5, 50, 5, 50))
        >>> loss = loss_fn(x, w, h, v, torch.randint(50, (5,)))
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ) -> None:
        super().__init__()
        self.divergence = bg.divergences.generalized_jsd(beta)
        self.return_soft_hard_loss = return_soft_hard_loss
        soft = weight_soft_loss / temperature**2
        self.loss = bg.LinearHybridDistillationLoss(
            divergence=self.divergence,
            routing=bg.routing.additive(weight_hard_loss, soft),
            temperature=temperature,
            ignore_index=ignore_index,
            return_stats=True,
        )

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Any:
        """The loss of ``(rows, hidden)`` states and ``(vocab, hidden)`` heads."""
        bias = None if teacher_bias is None else teacher_bias.detach()
        teacher = bg.LinearTeacher(teacher_input.detach(), teacher_weight.detach(), bias)
        loss, stats = self.loss(student_input, student_weight, teacher, true_labels, student_bias)
        if not self.return_soft_hard_loss:
            return loss
        tokens = stats.valid.sum().clamp(min=1)
        parts = (self.divergence(stats), stats.nll)
        soft, hard = (torch.where(stats.valid, x, 0.0).sum() / tokens for x in parts)
        return loss, soft, hard


class LigerFusedLinearJSD(nn.Module):
    """The generalised JSD alone, as ``liger_kernel.transformers.LigerFusedLinearJSD``.

    Args:
        jsd_beta: 0 is the forward KL, 1 the reverse KL.
        ignore_index: label of tokens that take no part.
        temperature: of both distributions; its square is not a factor.
        accum_dtype: accepted and not used; gradients of the weight are gathered in fp32.

    Example:
        >>> x, w, h, v = (torch.randn(n, 8) for n in (5, 50, 5, 50))
        >>> loss = LigerFusedLinearJSD(jsd_beta=0.1)(x, w, h, v)
    """

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.loss = LigerFusedLinearJSDLoss(0.0, 1.0, jsd_beta, ignore_index, temperature)

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss; labels only say which rows take part."""
        rows = student_input.shape[:-1]
        labels = torch.zeros(rows, dtype=torch.int64, device=student_input.device)
        if shift_labels is not None:
            labels = torch.where(shift_labels == self.ignore_index, self.ignore_index, labels)
        loss: Tensor = self.loss(
            student_input, student_weight, teacher_input, teacher_weight, labels
        )
        return loss
