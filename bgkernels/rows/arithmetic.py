"""The functions here keep one rule for ``-inf``: an empty state has shift 0, and 0·(±inf) = 0."""

from __future__ import annotations

import torch
from torch import Tensor

NEG_INF = float("-inf")
NONE, SKIP = -1, -2
"""Label codes: a label that pass 1 chooses (argmax, sample), and a row that takes no part."""


def shift(m: Tensor) -> Tensor:
    """Return the centre that belongs to a maximum: itself, or 0 for an empty state."""
    return torch.where(m == NEG_INF, 0.0, m)


def times(weight: Tensor, x: Tensor) -> Tensor:
    """Return ``weight · x`` with 0 · (±inf) = 0; a NaN weight stays a NaN."""
    return torch.where(weight == 0, 0.0, weight * x)


def scaled(a: float, x: Tensor) -> Tensor:
    """Return ``a · x`` with 0 · (±inf) = 0, for a number ``a``."""
    return torch.zeros_like(x) if a == 0 else x * a


def log_prob(rest: Tensor, logit: Tensor, lse: Tensor) -> Tensor:
    """Return a label's log-probability, from ``rest = 1 - p[label]`` where that is exact."""
    return torch.where(rest < 0.5, torch.log1p(-rest), logit - lse)


def minus(x: Tensor, lse: Tensor) -> Tensor:
    """Return ``x (rows, width) - lse (rows,)``; an fp64 ``lse`` keeps its digits."""
    high = lse.to(x.dtype)
    return (x - high[:, None]) - (lse - high).to(x.dtype)[:, None]
