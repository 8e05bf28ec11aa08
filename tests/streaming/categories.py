"""What the tests of top-k and of matched teachers share: divergences of categories."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import bgkernels as bg
from tests import oracle
from tests.problems import PAIRS

TAILS = ("bucket", "renormalize", "drop")
ENDLESS = ("reverse_kl", "jeffreys", "adaptive_kl")
"""Divergences that are infinite where the teacher rules out what the student may say."""

TAIL_SETTINGS = [
    pytest.param(tail, ("linear", "logits")[i % 2], pair, id="-".join((tail, *pair)))
    for i, pair in enumerate(PAIRS)
    for tail in TAILS
    if not (tail == "renormalize" and pair[0] in ENDLESS)
]
"""Each tail with each divergence and policy, and a kind of student."""

CAPS = [{"logit_scale": 0.7}, {"logit_scale": -0.7}, {"logit_scale": 2.0, "logit_softcap": 3.0}]

Pair = tuple[Tensor, Tensor]
"""Log-probabilities of student and teacher."""


def mean_loss(
    row: oracle.Row, d: Tensor, *, routing: str, routing_params: Mapping[str, Any] | None,
    temperature: float, label_smoothing: float, z_loss: float = 0.0, absent: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The mean over valid rows of ``hard CE + soft T^2 D``, and z-loss.

    Args:
        row: what routing sees.
        d: ``(rows,)`` divergences of the categories.
        absent: ``(rows,)`` bool: rows without a soft label; None: none.
    """
    hard, soft, *hard_term = oracle.POLICIES[routing](row, **(routing_params or {}))
    if absent is not None:
        hard, soft = hard.masked_fill(absent, 1.0), soft.masked_fill(absent, 0.0)
    ce = hard_term[0] if hard_term else oracle.cross_entropy(row.z, row.label, label_smoothing)
    total = oracle._product(hard, ce) + oracle._product(soft, temperature**2 * d)
    total = total + z_loss * row.z.logsumexp(-1).square()
    return total.masked_fill(~row.valid, 0.0).sum() / row.valid.sum()


class Products(TorchDispatchMode):
    """Counts the multiplications of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if f.name().split("::")[1].split(".")[0] in ("mm", "addmm_", "addmm"):
            a, b = args[-2:]
            self.count += a.shape[0] * a.shape[1] * b.shape[1]
        return f(*args, **(kwargs or {}))


def multiplied(x: Tensor, w: Tensor, teacher: Any, target: Tensor, budget: int) -> int:
    """Multiplications of a step, whose gradients must be those that a small budget gives."""
    made, products = [], Products()
    for memory_budget in (budget, None):
        products.count = 0
        with products:
            loss = bg.linear_hybrid_distillation(x, w, teacher, target, memory_budget=memory_budget)
        made.append(torch.autograd.grad(loss, (x, w)))
    for small, large in zip(*made, strict=True):
        torch.testing.assert_close(small, large, rtol=1e-4, atol=1e-6)
    return products.count
