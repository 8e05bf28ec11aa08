"""What the student's choice of a token costs later: an estimate of leave-one-out risk κ.

In the study, exposure bias is a sum over states of ``Σ_a (π_θ - π_T)(a|s) κ(a|s)``, exactly
(:mod:`bgkernels.training.study.exact`). Here the summand is estimated for a horizon: say a token as
the student would, let the teacher go on, and add up KL(teacher‖student); the same with a token as
the teacher would say it; subtract. Both draws share their random numbers, so where the two models
choose alike the difference is exactly 0, and its noise is that of true disagreements.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bgkernels.training.evaluate import score
from bgkernels.training.generation import continue_text
from bgkernels.training.models import CausalLM
from bgkernels.training.tokens import Batch


@torch.no_grad()
def choice_risk(
    student: CausalLM, teacher: CausalLM, text: Tensor, *, horizon: int, rollouts: int, seed: int
) -> Tensor:
    """Estimate the risk of the student's choice of each token but the first.

    Args:
        student, teacher: the pair.
        text: ``(length + 1,)`` tokens; what comes before each is given to both.
        horizon: tokens that the teacher says after the choice.
        rollouts: coupled pairs of draws a token.
        seed: of the draws.

    Returns:
        ``(length,)`` nats; positive where the student's choices lead it to where it knows less.
    """
    vocab = min(student.vocab, teacher.vocab)
    risk = torch.zeros(len(text) - 1)
    for position in range(1, len(text)):
        prompts = text[:position].expand(rollouts, -1)
        draw = seed + 2 * position
        mine, theirs = (continue_text(m, prompts, 1, vocab, draw) for m in (student, teacher))
        if not torch.equal(mine, theirs):
            costs = [
                _later_loss(student, teacher, said, horizon, draw + 1) for said in (mine, theirs)
            ]
            risk[position - 1] = costs[0] - costs[1]
    return risk


def _later_loss(
    student: CausalLM, teacher: CausalLM, said: Tensor, horizon: int, seed: int
) -> Tensor:
    """Mean over rollouts of the loss in ``horizon`` tokens that the teacher says next."""
    text = continue_text(teacher, said, horizon, min(student.vocab, teacher.vocab), seed)
    tokens = score(student, teacher, Batch.of(text).after(said.shape[1]))
    return tokens.kl.sum(-1).mean()
