"""A routing policy gives each token the weights of its hard and of its soft label.

A policy maps :class:`~bgkernels.RowStats` to ``(hard, soft)`` weights, one pair per row. At a
*bridge* (the teacher is sure) the hard label should get more weight, in a *garden* (many
continuations are good) the soft label (Bridge-Garden, arXiv 2605.26246). Whether a token is a
bridge does not depend on the temperature of the divergence: a policy sees each model's
distribution over the compared columns at temperature 1. Register your own policy with
:func:`register`, or pass any callable.

Example:
    >>> from bgkernels import routing
    >>> routing.static(0.2)
    Policy(name='static', batchwide=False)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bgkernels.loss.objective import Policy as Policy
from bgkernels.loss.objective import Weight as Weight
from bgkernels.loss.objective import Weights as Weights
from bgkernels.registry import Registry
from bgkernels.rows.extras import Tilt
from bgkernels.rows.stats import RowStats

LOG_EPS = 1e-8


@dataclass
class Curriculum(Policy):
    """The policy depends on training progress: add 1 to ``step`` after each optimiser step."""

    step: int = 0


registry: Registry[Policy] = Registry("routing", Policy)
register = registry.register


def get(policy: str | Policy | Weights, /, **params: object) -> Policy:
    """Return the policy of this name, or the policy itself; a callable becomes a batchwide one."""
    if isinstance(policy, str):
        return registry.get(policy, **params)
    if isinstance(policy, Policy):
        return policy
    if not callable(policy):
        raise TypeError(
            f"`routing` must be a name, a Policy or a callable; got {type(policy).__name__}"
        )
    return Policy(getattr(policy, "__name__", "callable"), policy, batchwide=True)


def _non_negative(**values: float) -> None:
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"`{name}` must not be negative; got {value}")


def _fraction(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"`{name}` must lie in [0, 1]; got {value}")


def _constant(name: str, hard: float, soft: float) -> Policy:
    return Policy(name, lambda s: (hard, soft), uses_teacher=soft > 0, fixed=True)


@register
def hard() -> Policy:
    """Weights are ``(1, 0)``: cross-entropy alone. A teacher is read only to choose the label."""
    return _constant("hard", 1.0, 0.0)


@register
def soft() -> Policy:
    """Weights are ``(0, 1)``: the divergence alone."""
    return _constant("soft", 0.0, 1.0)


@register
def static(w: float = 0.5) -> Policy:
    """Weights are ``(1 - w, w)`` for every token."""
    _fraction(w=w)
    return _constant("static", 1.0 - w, w)


@register
def additive(hard: float = 1.0, soft: float = 1.0) -> Policy:
    """Weights are ``(hard, soft)`` for every token; they need not add up to one."""
    _non_negative(hard=hard, soft=soft)
    return _constant("additive", hard, soft)


@register
def confidence(kind: str = "label") -> Policy:
    """Weights are ``(c, 1 - c)`` with the teacher's confidence ``c``.

    Args:
        kind: ``"label"``: ``c = p_t[label]``, as in the Bridge-Garden code; ``"max"``:
            ``c = max p_t``, as in its paper.
    """
    if kind not in ("label", "max"):
        raise ValueError(f"`kind` must be 'label' or 'max'; got {kind!r}")

    def weights(s: RowStats) -> tuple[Tensor, Tensor]:
        c = s.logp_t.exp() if kind == "label" else s.max_prob_t
        return c, 1 - c

    return Policy("confidence", weights)


def normalized_entropy(s: RowStats) -> Tensor:
    """Return the teacher's entropy as a share of its maximum, ``H_t / log V`` in [0, 1]."""
    return (s.entropy_t / math.log(max(s.vocab, 2))).clamp(0, 1)


@register
def entropy(kind: str = "power", gamma: float = 0.1) -> Policy:
    """Weights are ``(1 - s, s)`` with the teacher's entropy ``s`` in [0, 1]: the default policy.

    Args:
        kind: ``"power"``: ``s = (Σ p_t^γ - 1) / (V^(1-γ) - 1)``, as in the Bridge-Garden code;
            ``"shannon"``: ``s = H_t / log V``, as in its paper. V counts the compared columns.
        gamma: exponent of the power sum, in (0, 1). Small values are sensitive to the tail: with
            0.1, s stays near 0.2 if one token has nearly all the probability.
    """
    if kind == "shannon":
        return Policy("entropy", lambda s: _pair(normalized_entropy(s)))
    if kind != "power":
        raise ValueError(f"`kind` must be 'power' or 'shannon'; got {kind!r}")
    if not 0 < gamma < 1:
        raise ValueError(f"`gamma` must lie in (0, 1); got {gamma}")

    def weights(s: RowStats) -> tuple[Tensor, Tensor]:
        excess = torch.expm1(s.power_sum(0.0, gamma))
        return _pair((excess / max(s.vocab ** (1 - gamma) - 1, 1e-12)).clamp(0, 1))

    return Policy("entropy", weights, (Tilt(0.0, gamma),))


def _pair(soft_weight: Tensor) -> tuple[Tensor, Tensor]:
    return 1 - soft_weight, soft_weight


@register
def threshold(tau: float = 0.5, sharpness: float = 20.0) -> Policy:
    """Weights are ``(1 - s, s)`` with ``s = sigmoid(sharpness·(H_t/log V - tau))``."""
    _fraction(tau=tau)
    _non_negative(sharpness=sharpness)
    return Policy(
        "threshold",
        lambda s: _pair(torch.sigmoid(sharpness * (normalized_entropy(s) - tau))),
    )


@register
def top_entropy(fraction: float = 0.2) -> Policy:
    """The ``ceil(fraction · valid)`` tokens of highest teacher entropy get ``(0, 1)``.

    They count as gardens. All other tokens count as bridges and get ``(1, 0)``. Of tokens with
    equal entropy, the earlier one comes first.
    """
    _fraction(fraction=fraction)

    def weights(s: RowStats) -> tuple[Tensor, Tensor]:
        order = torch.where(s.valid, s.entropy_t, float("-inf")).argsort(
            descending=True, stable=True
        )
        rank = order.argsort()
        # 0.07 · 100 exceeds 7 in floating point.
        count = (fraction * s.valid.sum().double() - 1e-9).ceil()
        return _pair((rank < count).to(s.entropy_t.dtype))

    return Policy("top_entropy", weights, batchwide=True)


@register
def weighted_soft(w: float = 1.0, inverted: bool = False) -> Policy:
    """Weights are ``(1, w·ω)``, ``ω = 1 - e^-r``, ``r = log p_s[label] / log p_t[label]``.

    This is WSL (Zhou et al. 2021), with the clamps of the Bridge-Garden code; ``ω`` is detached.

    Args:
        w: weight of the soft term.
        inverted: take ``ω = e^-r`` instead, the "reverse" control of the Bridge-Garden code.
    """
    _non_negative(w=w)

    def weights(s: RowStats) -> tuple[float, Tensor]:
        log_s, log_t = (x.detach().clamp_min(math.log(LOG_EPS)) for x in (s.logp_s, s.logp_t))
        log_t = log_t.clamp_max(-LOG_EPS)
        decay = torch.exp(-(log_s / log_t).clamp(-10, 10))
        return 1.0, w * (decay if inverted else 1 - decay).clamp(0, 1)

    return Policy("weighted_soft", weights)


@register
def reverse(policy: str | Policy | Weights = "entropy") -> Policy:
    """Swap the weights of ``policy``: a control that prefers the wrong label."""
    base = get(policy)

    def weights(s: RowStats) -> tuple[Weight, Weight]:
        hard_weight, soft_weight = base(s)
        return soft_weight, hard_weight

    name, args = f"reverse({base.name})", (base.extras, base.batchwide, base.hard_term)
    return Policy(name, weights, *args, fixed=base.fixed)


@register
def curriculum(
    schedule: Callable[[int], float] | float = 1.0, policy: str | Policy | Weights = "soft"
) -> Curriculum:
    """Go from the hard label to ``policy``: ``(1 - c + c·hard, c·soft)``, ``c = schedule(step)``.

    With ``policy="soft"`` and a schedule that rises to ``w``, it is the curriculum of the
    Bridge-Garden code; with a schedule that falls from 1 to ``w``, it is the code's reverse
    curriculum. The caller advances ``.step`` of the returned object.
    """
    base = get(policy)
    scheduled = schedule if callable(schedule) else lambda step: float(schedule)

    def weights(s: RowStats) -> tuple[Weight, Weight]:
        c = float(scheduled(policy_of_step.step))
        if not 0 <= c <= 1:
            raise ValueError(
                f"`schedule` must give a number in [0, 1]; got {c} at step {policy_of_step.step}"
            )
        hard_weight, soft_weight = base(s)
        return (1 - c) + c * hard_weight, c * soft_weight

    policy_of_step = Curriculum(
        f"curriculum({base.name})", weights, base.extras, base.batchwide, base.hard_term
    )
    return policy_of_step


@register
def risk_guided(w: float = 0.5, alpha: float = 0.05, gamma: float = 0.9999) -> Policy:
    """Weights are ``(1 - w, w)``; Bridge-Garden's chi-square term replaces the cross-entropy.

    See :func:`chi_square`. The term couples neighbouring positions, so the last leading dimension
    of the input must be the position in the sequence.
    """
    _fraction(w=w, gamma=gamma)
    _non_negative(alpha=alpha)
    return Policy(
        "risk_guided",
        lambda s: (1.0 - w, w),
        batchwide=True,
        hard_term=lambda s: chi_square(s, alpha, gamma),
    )


def chi_square(stats: RowStats, alpha: float, gamma: float) -> Tensor:
    """Return Bridge-Garden's chi-square regularised soft Q-learning loss of each row, ``(rows,)``.

    With ``V_t`` the log-sum-exp of the student's real logits at the ``t``-th valid token of a
    sequence, ``l_t`` the logit of its label and ``V = 0`` after the last, the released code's term
    is (paper appendix; here with the library's one normaliser)

        γ^t · [ -log p_s[label] + α/4 · (l_t - γ·V_{t+1})² ]   and, once a sequence at its last
        token,   γ^t · α·(1-γ)/4 · V_t².

    It depends on the offset of the logits, not on probabilities alone. Rows are ``(sequences,
    stats.positions)`` in order. The per-sequence term is added to the sequence's last valid row,
    weighted so that the mean over valid rows is the mean over sequences.
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
    """Return the value at the next valid position of a sequence; anything after the last."""
    packed = torch.zeros(value.shape[0], value.shape[1] + 2, dtype=value.dtype, device=value.device)
    slot = torch.where(valid, t, value.shape[1] + 1)
    packed = packed.scatter(1, slot, value)
    return packed.gather(1, (t + 1).clamp(0, value.shape[1]))
