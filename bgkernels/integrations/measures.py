"""What a trainer logs beside the loss, gathered on the device and read when it is asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import bgkernels as bg

NAMES = (
    "hard_loss", "soft_loss", "teacher_entropy", "bridge_share", "entropy", "mean_token_accuracy",
)  # fmt: skip


class Measures:
    """Running means over tokens of the parts of a hybrid loss.

    ``hard_loss``: cross-entropy. ``soft_loss``: T² times the divergence. ``teacher_entropy``: in
    nats, at temperature 1. ``bridge_share``: of tokens whose hard weight exceeds the soft one.
    ``entropy``, ``mean_token_accuracy``: TRL's names for the student's entropy, and for the share
    of tokens whose hard label is the student's favourite, both over the compared columns. Where
    the policy reads no teacher, these two are left out, and what is of the teacher is 0.

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
        valid, nothing = stats.valid, torch.zeros_like(stats.nll)
        parts = [stats.nll, nothing, nothing, torch.ones_like(stats.nll)]
        if self.policy.uses_teacher:
            hard, soft = self.policy(stats)
            led = torch.as_tensor(hard > soft, device=valid.device).expand(valid.shape)
            parts = [
                stats.nll,
                self.temperature**2 * self.divergence(stats),
                stats.entropy_t,
                led.float(),
                stats.entropy_s,
                (stats.argmax_s == stats.label).float(),
            ]
        parts.append(torch.ones_like(stats.nll))
        sums = torch.stack([torch.where(valid, x, 0.0).sum(dtype=torch.float64) for x in parts])
        self.sums = sums if self.sums is None else self.sums + sums

    def pop(self) -> Tensor | None:
        """``(parts + 1,)`` sums and the number of tokens since the last call; None: no batch."""
        sums, self.sums = self.sums, None
        return sums


def means(sums: Tensor) -> dict[str, float]:
    """Named means of :meth:`Measures.pop`, added over processes if need be."""
    *parts, tokens = sums.tolist()
    return {name: part / max(tokens, 1) for name, part in zip(NAMES, parts, strict=False)}
