"""A divergence compares the teacher ``p_t`` with the student ``p_s``, from row statistics.

Both distributions are softmaxes at temperature T over the compared columns. A factory checks its
parameters, and returns a :class:`Divergence`; at a limit of its parameters, it returns the
divergence of that limit. Register your own with :func:`register`; see ``CONTRIBUTING.md``.

Example:
    >>> from bgkernels import divergences
    >>> divergences.generalized_jsd(beta=0.5).name
    'generalized_jsd'
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bgkernels.loss.objective import Divergence as Divergence
from bgkernels.registry import Registry
from bgkernels.rows.extras import Extra, Mixture, Tilt, TotalVariation
from bgkernels.rows.stats import RowStats

registry: Registry[Divergence] = Registry("divergence", Divergence)
register = registry.register
get = registry.get


def _within(name: str, value: float, low: float, high: float, *, high_open: bool = False) -> float:
    inside = low <= value < high if high_open else low <= value <= high
    if not inside:
        bracket = ")" if high_open else "]"
        raise ValueError(f"`{name}` must lie in [{low}, {high}{bracket}; got {value}")
    return float(value)


@register
def forward_kl() -> Divergence:
    """It is ``KL(p_t ‖ p_s)``, which covers all that the teacher may say (Hinton et al. 2015)."""
    return Divergence("forward_kl", lambda s: s.kl_ts)


@register
def reverse_kl() -> Divergence:
    """It is ``KL(p_s ‖ p_t)``: the student seeks the teacher's modes (MiniLLM, Gu et al. 2024)."""
    return Divergence("reverse_kl", lambda s: s.kl_st)


@register
def jeffreys() -> Divergence:
    """It is ``KL(p_t ‖ p_s) + KL(p_s ‖ p_t)``."""
    return Divergence("jeffreys", lambda s: s.kl_ts + s.kl_st)


@register
def generalized_jsd(beta: float = 0.5) -> Divergence:
    """It is ``β·KL(p_t ‖ m) + (1-β)·KL(p_s ‖ m)`` for ``m = β·p_t + (1-β)·p_s``.

    It is from GKD (Agarwal et al. 2024). As in GKD and its successors, ``beta=0`` is the forward
    and ``beta=1`` the reverse KL, although the formula tends to 0 at both. ``js_distance(lam)`` of
    the released Bridge-Garden code is ``generalized_jsd(1 - lam)``.
    """
    beta = _within("beta", beta, 0, 1)
    if beta in (0, 1):
        return forward_kl() if beta == 0 else reverse_kl()

    def rows(s: RowStats) -> Tensor:
        kl_tm, kl_sm = s.mixture(beta)
        return beta * kl_tm + (1 - beta) * kl_sm

    return Divergence("generalized_jsd", rows, (Mixture(beta),))


@register
def skew_forward_kl(lam: float = 0.1) -> Divergence:
    """It is ``KL(p_t ‖ λ·p_t + (1-λ)·p_s)``, ``0 ≤ lam < 1``; the forward KL at 0.

    It is from DistiLLM (Ko et al. 2024).
    """
    lam = _within("lam", lam, 0, 1, high_open=True)
    if lam == 0:
        return forward_kl()
    return Divergence("skew_forward_kl", lambda s: s.mixture(lam)[0], (Mixture(lam),))


@register
def skew_reverse_kl(lam: float = 0.1) -> Divergence:
    """It is ``KL(p_s ‖ (1-λ)·p_t + λ·p_s)``, ``0 ≤ lam < 1``; the reverse KL at 0.

    It is from DistiLLM (Ko et al. 2024).
    """
    lam = _within("lam", lam, 0, 1, high_open=True)
    if lam == 0:
        return reverse_kl()
    return Divergence("skew_reverse_kl", lambda s: s.mixture(1 - lam)[1], (Mixture(1 - lam),))


@register
def total_variation() -> Divergence:
    """It is ``½ Σ |p_s - p_t|`` (Wen et al. 2023); the gradient takes ``sgn(0) = 0``."""
    return Divergence("total_variation", lambda s: s.total_variation(), (TotalVariation(),))


@register
def renyi(alpha: float = 0.5) -> Divergence:
    """It is ``1/(α-1) · log Σ p_t^α p_s^(1-α)``, ``alpha > 0``; the forward KL at 1."""
    if not alpha > 0 or math.isinf(alpha):
        raise ValueError(f"`alpha` must be positive and finite; got {alpha}")
    if alpha == 1:
        return forward_kl()
    tilt = Tilt(1 - alpha, alpha)
    return Divergence("renyi", lambda s: s.power_sum(tilt.a, tilt.b) / (alpha - 1), (tilt,))


@register
def adaptive_kl(mu: float = 0.5, detach: bool = False) -> Divergence:
    """It is ``h·KL(p_t ‖ p_s) + (1-h)·KL(p_s ‖ p_t)`` for ``h = sigmoid(μ·(H_s - H_t))``.

    This form is that of the released Bridge-Garden code.

    Args:
        mu: slope of the gate, per nat.
        detach: treat ``h`` as a constant. By default, the gradient includes the student's entropy.
    """

    def rows(s: RowStats) -> Tensor:
        h = torch.sigmoid(mu * (s.entropy_s - s.entropy_t))
        h = h.detach() if detach else h
        return h * s.kl_ts + (1 - h) * s.kl_st

    return Divergence("adaptive_kl", rows)


@register
def alpha_beta(alpha: float = 0.2, beta: float = 0.7) -> Divergence:
    """It is the alpha-beta divergence (Cichocki et al. 2011; ABKD, Wang et al. 2025).

    With ``p = p_t`` and ``q = p_s`` it is
    ``-1/(αβ) · Σ [ p^α q^β - α/(α+β)·p^(α+β) - β/(α+β)·q^(α+β) ]``. At α = 0, β = 0, α = -β and
    α = β = 0 it is the limit of this formula. (1, 0) is the forward and (0, 1) the reverse KL. Near
    a limit the three sums cancel: in fp32, α and β should be 0 or at least about 1e-3. Limits that
    are not KLs give all columns the same weight, and are infinite if one is masked by ``-inf``.
    """
    if (alpha, beta) == (1, 0):
        return forward_kl()
    if (alpha, beta) == (0, 1):
        return reverse_kl()
    rows, extras = _alpha_beta_rows(float(alpha), float(beta))
    return Divergence("alpha_beta", rows, extras)


Rows = Callable[[RowStats], Tensor]


def _alpha_beta_rows(a: float, b: float) -> tuple[Rows, tuple[Extra, ...]]:
    def log_ratio(s: RowStats, i: int, x: float, y: float) -> Tensor:
        """Return a moment of ``log(p_s/p_t)`` under the softmax of ``x·u + y·v``: i is 1 or 2."""
        _, mean, second = s.tilt(x, y, moments=True)
        offset = s.lse_s - s.lse_t
        return mean - offset if i == 1 else second - 2 * offset * mean + offset * offset

    def total(s: RowStats, x: float, y: float) -> Tensor:
        return (s.tilt(x, y, moments=True)[0] - x * s.lse_s - y * s.lse_t).exp()

    def second_order(s: RowStats) -> Tensor:
        return 0.5 * total(s, 0, 0) * log_ratio(s, 2, 0, 0)

    def no_alpha(s: RowStats) -> Tensor:
        q = total(s, b, 0)
        return (q * (b * log_ratio(s, 1, b, 0) - 1) + s.power_sum(0, b).exp()) / b**2

    def no_beta(s: RowStats) -> Tensor:
        p = total(s, 0, a)
        return (p * (-a * log_ratio(s, 1, 0, a) - 1) + s.power_sum(a, 0).exp()) / a**2

    def opposite(s: RowStats) -> Tensor:
        return (total(s, 0, 0) * (a * log_ratio(s, 1, 0, 0) - 1) + s.power_sum(-a, a).exp()) / a**2

    def general(s: RowStats) -> Tensor:
        c = a + b
        cross, power_t, power_s = (s.power_sum(x, y).exp() for x, y in ((b, a), (0, c), (c, 0)))
        return (a / c * power_t + b / c * power_s - cross) / (a * b)

    if a == b == 0:
        return second_order, (Tilt(0, 0, True),)
    if a == 0:
        return no_alpha, (Tilt(b, 0, True), Tilt(0, b))
    if b == 0:
        return no_beta, (Tilt(0, a, True), Tilt(a, 0))
    if a == -b:
        return opposite, (Tilt(0, 0, True), Tilt(-a, a))
    return general, (Tilt(b, a), Tilt(0, a + b), Tilt(a + b, 0))
