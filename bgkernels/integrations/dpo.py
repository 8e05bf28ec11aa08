"""Direct preference optimisation (Rafailov et al. 2023) from hidden states, without logits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import bgkernels as bg


def linear_sequence_log_probs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    **options: Any,
) -> Tensor:
    """Log-probabilities of whole sequences: ``Σ log p(label)`` over the tokens that have a label.

    Backward multiplies the logits again, so that one walk in forward and one in backward is all
    that a policy costs; a reference, under ``torch.no_grad()``, costs the first alone.

    Args:
        input: ``(..., length, D)`` last hidden states.
        linear_weight: ``(V, D)`` the head.
        target: ``(..., length)`` integer labels, ``ignore_index`` at prompts and padding.
        ignore_index: label of tokens that take no part.
        **options: of :func:`bgkernels.linear_row_stats`, such as ``linear_bias``,
            ``logit_softcap`` and ``memory_budget``.

    Returns:
        ``(...)`` nats, fp64, since preferences are small differences of these large numbers.

    Raises:
        ValueError: a sequence has no label (on a GPU, which is not waited for, its value is NaN).
        TypeError, ValueError: an argument that does not fit, by name.

    Example:
        >>> x, w = torch.zeros(2, 3, 8), torch.randn(50, 8)
        >>> y = torch.tensor([[-100, 4, 2], [-100, -100, 7]])
        >>> [round(value, 3) for value in linear_sequence_log_probs(x, w, y).tolist()]
        [-7.824, -3.912]
    """
    stats = bg.linear_row_stats(
        input, linear_weight, None, target, ignore_index=ignore_index, **options
    )
    empty = ~stats.valid.any(-1)
    if empty.device.type == "cpu" and bool(empty.any()):
        raise ValueError(
            f"`target` must have a label in every sequence; the sequences "
            f"{empty.nonzero().squeeze(-1).tolist()} have {ignore_index} alone. Leave them out, or "
            "cut prompts shorter"
        )
    return -stats.nll.sum(-1, dtype=torch.float64).masked_fill(empty, math.nan)


def dpo_loss(log_probs: Tensor, reference: Tensor, *, beta: float = 0.1) -> Tensor:
    """The mean over pairs of ``-log σ(β·((r - r') of the chosen - (r - r') of the rejected))``.

    The loss is equation 7 of Rafailov et al. 2023, where ``r`` is the policy's log-probability of
    a sequence and ``r'`` the reference's. ``beta·(log_probs - reference)`` are the implicit
    rewards.

    Args:
        log_probs: ``(2·pairs,)`` the policy's: of the chosen answers, then of the rejected ones,
            in the same order.
        reference: ``(2·pairs,)`` those of the model that training began with, without gradient.
        beta: what leaving the reference costs; larger values stay nearer to it.

    Returns:
        Scalar, in the dtype of ``log_probs``.

    Raises:
        ValueError: shapes that are not those of pairs, or ``beta`` is not positive.

    Example:
        >>> policy = torch.tensor([-3.0, -5.0])  # the chosen answer gained, the other one lost
        >>> round(dpo_loss(policy, torch.tensor([-4.0, -4.0]), beta=1.0).item(), 4)
        0.1269
    """
    if not (isinstance(beta, (int, float)) and 0 < beta < math.inf):
        raise ValueError(f"`beta` must be a positive number, such as 0.1; got {beta!r}")
    if log_probs.ndim != 1 or not len(log_probs) or len(log_probs) % 2:
        raise ValueError(
            "`log_probs` must be (2·pairs,): those of all chosen answers, then those of the "
            f"rejected ones; got the shape {tuple(log_probs.shape)}"
        )
    if reference.shape != log_probs.shape:
        raise ValueError(
            "`reference` must hold the same sequences as `log_probs`, "
            f"{tuple(log_probs.shape)}; got the shape {tuple(reference.shape)}"
        )
    chosen, rejected = (beta * (log_probs - reference.detach())).chunk(2)
    return -torch.nn.functional.logsigmoid(chosen - rejected).mean()
