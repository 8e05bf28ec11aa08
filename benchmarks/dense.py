"""The losses as one would write them over dense logits, for every form of a step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Problem

GAMMA = 0.1
"""Of the power-sum entropy, as in the library's default policy."""
HALF = 0.5
"""Both weights, where they are fixed."""


class Widened:
    """A problem with fp32 copies of its floating-point tensors: for processors slow in 16 bits."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.case = problem, problem.case

    def __getattr__(self, name: str) -> Tensor:
        x: Tensor = getattr(self.problem, name)
        return x.float() if x.is_floating_point() else x


def student_logits(problem: Problem | Widened) -> Tensor:
    """Real logits ``(rows, V)``."""
    given = problem.case.form == "logits"
    return capped(problem, problem.logits if given else problem.input @ problem.weight.T)


def teacher_logits(problem: Problem | Widened) -> Tensor:
    """Real logits over the columns of the student, without a gradient."""
    columns = problem.case.vocab
    if problem.case.form == "logits":
        return capped(problem, problem.t_logits[:, :columns])
    with torch.no_grad():
        return capped(problem, problem.t_input @ problem.t_weight[:columns].T)


def capped(problem: Problem | Widened, x: Tensor) -> Tensor:
    cap = problem.case.softcap
    return cap * torch.tanh(x / cap) if cap else x


def dense(problem: Problem | Widened) -> Tensor:
    """The loss of the problem's form."""
    z = student_logits(problem).float()
    hard_label = F.cross_entropy(z, problem.target, reduction="none")
    form = problem.case.form
    if form == "hard":
        return mean(hard_label, problem.target)
    if form == "top-k":
        divergence = bucketed(z, problem.indices, problem.logprobs)
        return mean(HALF * hard_label + HALF * divergence, problem.target)
    if form == "matched":
        return mean(HALF * hard_label + HALF * matched(problem, z), problem.target)
    heat = problem.case.temperature
    lp_s = F.log_softmax(z / heat, -1)
    t = teacher_logits(problem).float()
    lp_t = F.log_softmax(t / heat, -1)
    untempered = lp_t if heat == 1 else F.log_softmax(t, -1)
    soft = power_entropy((GAMMA * untempered).exp(), z.shape[1])
    divergence = heat**2 * (lp_t.exp() * (lp_t - lp_s)).sum(-1)
    return mean((1 - soft) * hard_label + soft * divergence, problem.target)


def bucketed(z: Tensor, indices: Tensor, logprobs: Tensor) -> Tensor:
    """Forward KL over the kept columns and one bucket for all others, ``(rows,)``."""
    lp = F.log_softmax(z, -1)
    kept = lp.gather(1, indices)
    rest = lp.scatter(1, indices, float("-inf")).logsumexp(-1)
    tail = torch.log1p(-logprobs.exp().sum(-1))
    return (logprobs.exp() * (logprobs - kept)).sum(-1) + tail.exp() * (tail - rest)


def matched(problem: Problem | Widened, z: Tensor) -> Tensor:
    """Forward KL over the columns that match and one category for all others, ``(rows,)``."""
    with torch.no_grad():
        t = capped(problem, problem.t_input @ problem.t_weight.T).float()
    lp_s, lp_t = (coarse(x, ids) for x, ids in zip((z, t), problem.pairs, strict=True))
    return (lp_t.exp() * (lp_t - lp_s)).sum(-1)


def coarse(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of some columns, and of all others together."""
    lp = F.log_softmax(logits, -1)
    rest = lp.index_fill(1, ids, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat([lp[:, ids], rest], -1)


def mean(loss: Tensor, target: Tensor) -> Tensor:
    """Over the tokens that take part."""
    valid = target != -100
    return (loss * valid).sum() / valid.sum().clamp_min(1)


def power_entropy(powers: Tensor, vocab: int) -> Tensor:
    """The paper's soft weight, from ``p^γ``."""
    return ((powers.sum(-1) - 1) / (vocab ** (1 - GAMMA) - 1)).clamp(0, 1)


def widened(problem: Problem) -> Tensor:
    """:func:`dense` in fp32."""
    return dense(Widened(problem))


def paper(problem: Problem) -> Tensor:
    """The entropy-routed loss in the order of operations of the paper's release.

    It copies both logits (their shift by one token), takes the divergence twice (the configured
    one, which is dropped, and its alpha-beta form at (1, 0)), and the gate from one more softmax.
    """
    z, t = student_logits(problem).clone(), teacher_logits(problem).clone()
    _alpha_beta(z, t)
    divergence = _alpha_beta(z, t)
    powers = F.softmax(t, -1, dtype=torch.float32) ** GAMMA
    soft = power_entropy(powers, t.shape[1])
    hard_label = F.cross_entropy(z.float(), problem.target, reduction="none")
    hard_loss = mean((1 - soft) * hard_label, problem.target)
    return hard_loss + mean(soft * divergence, problem.target)


def _alpha_beta(z: Tensor, t: Tensor) -> Tensor:
    """Alpha-beta at (1, 0), which is the forward KL: ``Σ p(log(p/q) - 1) + q``."""
    q, p = F.softmax(z, -1, dtype=torch.float32), F.softmax(t, -1, dtype=torch.float32)
    log_q = F.log_softmax(z, -1, dtype=torch.float32)
    log_p = F.log_softmax(t, -1, dtype=torch.float32)
    return (p * (log_p - log_q - 1) + q).sum(-1)
