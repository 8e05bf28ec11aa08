"""The risk-guided objective of Bridge-Garden: a chi-square regularised soft Q-learning loss.

With ``V_t`` the log-sum-exp of the student's real logits at the ``t``-th valid token of a sequence,
``l_t`` the logit of its label and ``V = 0`` after the last, the released code's term is (paper
appendix; here with the library's one normaliser)

    γ^t · [ -log p_s[label] + α/4 · (l_t - γ·V_{t+1})² ]   and, once a sequence at its last token,
    γ^t · α·(1-γ)/4 · V_t².

It depends on the offset of the logits, not on probabilities alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bgkernels.rows.stats import RowStats


def chi_square(stats: RowStats, alpha: float, gamma: float) -> Tensor:
    """The term of each row, ``(rows,)``, rows being ``(sequences, stats.positions)`` in order.

    The per-sequence term is added to the sequence's last valid row, weighted so that the mean over
    valid rows is the mean over sequences.
    """
    shape = (-1, stats.positions)
    valid, value = stats.valid.reshape(shape), stats.lse_hard.reshape(shape)
    nll = stats.nll.reshape(shape)
    t = valid.cumsum(1) - 1
    count = valid.sum(1, keepdim=True)
    last = valid & (t == count - 1)
    following = _next_valid(value, valid, t)
    gap = (value - nll) - gamma * torch.where(last, 0.0, following)
    discount = gamma ** t.clamp_min(0).to(value.dtype)
    term = discount * (nll + alpha / 4 * gap**2)
    if 1 - gamma >= 1e-6:
        sequences = (count > 0).sum().clamp_min(1)
        share = valid.sum() / sequences
        end = discount * alpha * (1 - gamma) / 4 * value**2
        term = term + torch.where(last, share * end, 0.0)
    return torch.where(valid, term, 0.0).reshape(-1)


def _next_valid(value: Tensor, valid: Tensor, t: Tensor) -> Tensor:
    """The value at the next valid position of the same sequence; anything after the last."""
    packed = torch.zeros(value.shape[0], value.shape[1] + 2, dtype=value.dtype, device=value.device)
    slot = torch.where(valid, t, value.shape[1] + 1)
    packed = packed.scatter(1, slot, value)
    return packed.gather(1, (t + 1).clamp(0, value.shape[1]))
