"""What a trainer logs beside the loss, gathered on the device and read when it is asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import bgkernels as bg

NAMES = ("hard_loss", "soft_loss", "teacher_entropy", "bridge_share")


class Measures:
    """Running means over tokens of the parts of a hybrid loss.

    ``hard_loss``: cross-entropy. ``soft_loss``: T² times the divergence. ``teacher_entropy``: in
    nats, at temperature T. ``bridge_share``: of tokens whose hard weight exceeds the soft one.
    Without a teacher only the first means anything, and the others are 0.

    Args:
        divergence, routing, temperature: those of the loss.
    """

    def __init__(self, divergence: Any, routing: Any, temperature: float) -> None:
        self.policy = bg.routing.get(routing)
        self.divergence = (
            bg.divergences.get(divergence) if isinstance(divergence, str) else divergence
        )
        self.temperature = temperature
        self.sums: Tensor | None = None

    @torch.no_grad()
    def add(self, stats: bg.RowStats) -> None:
        """Add the tokens of a batch."""
        valid = stats.valid
        parts = [
            stats.nll,
            torch.zeros_like(stats.nll),
            stats.entropy_t,
            torch.ones_like(stats.nll),
        ]
        if self.policy.uses_teacher:
            hard, soft = self.policy(stats)
            parts[1] = self.temperature**2 * self.divergence(stats)
            parts[3] = torch.as_tensor(hard > soft, device=valid.device).expand(valid.shape).float()
        parts.append(torch.ones_like(stats.nll))
        sums = torch.stack([torch.where(valid, x, 0.0).sum(dtype=torch.float64) for x in parts])
        self.sums = sums if self.sums is None else self.sums + sums

    def pop(self) -> Tensor | None:
        """``(5,)`` sums and the number of tokens since the last call; None where there are none."""
        sums, self.sums = self.sums, None
        return sums


def means(sums: Tensor) -> dict[str, float]:
    """Named means of :meth:`Measures.pop`, added over processes if need be."""
    *parts, tokens = sums.tolist()
    return {name: part / max(tokens, 1) for name, part in zip(NAMES, parts, strict=True)}
