"""Each class here is a statistic beyond the usual ones: its sums, its values, its gradient.

``u`` and ``v`` are the tempered logits of student and teacher. Sums leave the label's column out,
as those of :mod:`bgkernels.rows.state` do; the sums of a second read are over all columns. The
compiled text of each class is the struct of its name in ``csrc/math/extras.h``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

from bgkernels.rows.arithmetic import NEG_INF, log_prob, minus, scaled, shift, times

if TYPE_CHECKING:
    from bgkernels.rows.state import RowState

Sums = tuple[Tensor, Tensor]
"""The sums of two sets of columns, ``(sums, rows)`` each."""
Moves = tuple[Tensor, Tensor]
"""How far the maxima of a set of columns, student and teacher, lie above the common ones: <= 0."""
Folded = tuple[list[Tensor], Tensor | None]
"""Factors, and what they do not say: the gradient that the label's column gains."""


class Pair(NamedTuple):
    """A pair holds a tile of both models, ``(rows, width)``.

    Args:
        u, v: tempered logits of student and teacher.
        s, t: the same about a centre: the maxima in pass 1, else the log-sum-exps.
    """

    u: Tensor
    v: Tensor
    s: Tensor
    t: Tensor


class Extra(ABC):
    """An extra statistic is computed where a divergence or policy asks for it.

    Attributes:
        kind: ``kKind`` of its struct in ``csrc/math/extras.h``.
        sums: names of its rows in the state; zero in an empty state, except ``m``, which is -inf.
        fields: names of its rows in the statistics.
        public: how many of them users see, the first ones.
        factors: names of its rows in the coefficients of pass 2.
        second_read: whether it needs both normalisers first.
    """

    kind: ClassVar[int]
    sums: ClassVar[tuple[str, ...]]
    factors: ClassVar[tuple[str, ...]]
    second_read: ClassVar[bool] = False

    @property
    @abstractmethod
    def fields(self) -> tuple[str, ...]:
        """Names of its rows in the statistics."""

    @property
    def public(self) -> int:
        """How many of the fields users see, the first ones."""
        return len(self.fields)

    @property
    def differentiable(self) -> range:
        """Which of the fields carry a gradient to the student."""
        return range(self.public)

    @property
    def parameters(self) -> tuple[float, float, float]:
        """Three numbers that tell it from others of its kind: its arguments, then zeros."""
        values = [float(getattr(self, f.name)) for f in fields(self)]  # type: ignore[arg-type]
        a, b, c = (*values, 0.0, 0.0, 0.0)[:3]
        return a, b, c

    @classmethod
    def of(cls, *parameters: float) -> Extra:
        """Make the statistic that has these parameters."""
        return cls(*parameters[: len(fields(cls))])  # type: ignore[arg-type]

    def column(self, u: Tensor, v: Tensor, temperature: float) -> list[Tensor]:
        """Return the sums of one column ``(rows,)``, whose logits are -inf where there is none."""
        return [torch.zeros_like(u)] * len(self.sums)

    def merge(self, out: Tensor, sums: Sums, moves: Sequence[Moves], temperature: float) -> None:
        """Write the sums of two sets of columns, about the common maxima, to ``out``."""
        torch.add(*sums, out=out)

    def absorb(self, pair: Pair, temperature: float) -> list[Tensor]:
        """Return the sums of a tile ``(rows, width)``: none if it waits for the second read."""
        return []

    def absorb_pair(self, pair: Pair) -> list[Tensor]:
        """Return the sums of a tile of log-probabilities, in the second read."""
        raise NotImplementedError

    @abstractmethod
    def finalize(self, i: int, whole: RowState, rest: RowState) -> list[Tensor]:
        """Return the fields of the ``i``-th extra, from states with and without the label."""

    @abstractmethod
    def fold(self, fields: Tensor, grads: Tensor, temperature: float) -> Folded:
        """Turn the derivatives of a loss by the fields into factors."""

    @abstractmethod
    def vjp(self, pair: Pair, factors: Tensor, temperature: float) -> Tensor:
        """Return what it adds to the gradient of a tile; ``factors (·, rows)`` are in fp64."""


@dataclass(frozen=True)
class Tilt(Extra):
    """A tilt is ``log Σ e^(a·u + b·v)`` over the compared columns.

    ``u`` and ``v`` are the tempered logits of student and teacher.

    Args:
        a, b: exponents of student and teacher.
        moments: whether to give ``E[u - v]`` and ``E[(u - v)²]`` under its softmax too (for the
            limits of alpha-beta).
    """

    a: float
    b: float
    moments: bool = False

    kind = 0
    sums = ("m", "d", "k", "q")
    factors = ("lse", "P0", "P1", "P2")

    @property
    def fields(self) -> tuple[str, ...]:
        return ("lse", "mean", "second") if self.moments else ("lse",)

    @property
    def differentiable(self) -> range:
        return range(len(self.fields) if self.a or self.moments else 0)

    @classmethod
    def of(cls, *parameters: float) -> Tilt:
        a, b, moments = parameters
        return cls(a, b, bool(moments))

    def at(self, temperature: float) -> Tilt:
        """Return the tilt of logits / temperature whose value is this one's at temperature 1."""
        return Tilt(self.a * temperature, self.b * temperature, self.moments)

    def exponent(self, u: Tensor, v: Tensor) -> Tensor:
        """Return ``a·u + b·v``, or -inf (no weight) where both models mask the column."""
        w = scaled(self.a, u) + scaled(self.b, v)
        if min(self.a, self.b) < 0 or self.a == self.b == 0:
            return torch.where((u == NEG_INF) & (v == NEG_INF), NEG_INF, w)
        return w

    def column(self, u: Tensor, v: Tensor, temperature: float) -> list[Tensor]:
        w, zero = self.exponent(u, v), torch.zeros_like(u)
        return [w, (w - shift(w)).exp(), zero, zero]

    def merge(self, out: Tensor, sums: Sums, moves: Sequence[Moves], temperature: float) -> None:
        m = torch.maximum(sums[0][0], sums[1][0])
        out.zero_()
        out[0] = m
        # k and q are moments of du - dv, whose origin moves with the maxima.
        for (m_old, d, k, q), (move_s, move_t) in zip(sums, moves, strict=True):
            weight, move = torch.where(m_old == m, 0.0, m_old - m).exp(), move_s - move_t
            out[1] += weight * d
            out[2] += times(weight, k + times(d, move))
            out[3] += times(weight, q + times(k, 2 * move) + times(d, move * move))

    def absorb(self, pair: Pair, temperature: float) -> list[Tensor]:
        w = self.exponent(pair.u, pair.v)
        m = w.amax(1)
        e = (w - shift(m)[:, None]).exp()
        sums = [m, e.sum(1)]
        if self.moments:
            gap = pair.s - pair.t
            sums += [times(e, gap).sum(1), times(e, gap * gap).sum(1)]
        return sums

    def finalize(self, i: int, whole: RowState, rest: RowState) -> list[Tensor]:
        m, d, k, q = whole.extra(i)
        lse = shift(m) + d.log()
        if not self.moments:
            return [lse]
        # The state's moments are about the maxima, the fields about 0.
        centre, mean = shift(whole["m_s"]) - shift(whole["m_t"]), k / d
        return [lse, mean + centre, q / d + centre * (2 * mean + centre)]

    def fold(self, fields: Tensor, grads: Tensor, temperature: float) -> Folded:
        # The gradient is e^(w-lse)·(P0 + P1·x + P2·x²), with w the exponent and x = u - v.
        if not self.moments:
            zero = torch.zeros_like(fields[0])
            return [fields[0], grads[0] * (self.a / temperature), zero, zero], None
        lse, mean, second = fields
        by_lse, by_mean, by_second = grads / temperature
        p0 = self.a * (by_lse - by_mean * mean - by_second * second) + by_mean
        return [lse, p0, self.a * by_mean + 2 * by_second, self.a * by_second], None

    def vjp(self, pair: Pair, factors: Tensor, temperature: float) -> Tensor:
        p0, p1, p2 = factors[1:, :, None].to(pair.u.dtype)
        weight, gap = minus(self.exponent(pair.u, pair.v), factors[0]).exp(), pair.u - pair.v
        return times(weight, p0 + (p1 + p2 * gap) * gap if self.moments else p0)


@dataclass(frozen=True)
class Tempered(Extra):
    """It gives statistics of both distributions, each by itself, at another temperature.

    Routing reads them at temperature 1, whatever the temperature of the divergence.

    Args:
        temperature: τ > 0 of ``softmax(logits / τ)`` over the compared columns.
    """

    temperature: float = 1.0

    kind = 1
    sums = ("d_s", "h_s", "d_t", "h_t")
    factors = ("lse", "A", "B")
    fields = tuple(f"{name}_{x}" for x in "st" for name in ("lse", "entropy", "logp", "max_prob"))
    differentiable = range(3)

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"`temperature` must be positive and finite; got {self.temperature}")

    def column(self, u: Tensor, v: Tensor, temperature: float) -> list[Tensor]:
        zero = torch.zeros_like(u)
        return [(u - shift(u)).exp(), zero, (v - shift(v)).exp(), zero]

    def merge(self, out: Tensor, sums: Sums, moves: Sequence[Moves], temperature: float) -> None:
        out.zero_()
        for both, side_moves in zip(sums, moves, strict=True):
            for first, move in zip((0, 2), side_moves, strict=True):
                step = move * (temperature / self.temperature)
                weight, (d, h) = step.exp(), both[first : first + 2]
                out[first] += weight * d
                out[first + 1] += times(weight, h + times(d, step))

    def absorb(self, pair: Pair, temperature: float) -> list[Tensor]:
        sums = []
        for x in (pair.s, pair.t):
            w = x * (temperature / self.temperature)
            e = w.exp()
            sums += [e.sum(1), times(e, w).sum(1)]
        return sums

    def finalize(self, i: int, whole: RowState, rest: RowState) -> list[Tensor]:
        ratio, fields = whole.spec.temperature / self.temperature, []
        for k, side in ((0, "s"), (2, "t")):
            d, h = whole.extra(i)[k : k + 2]
            lse = ratio * shift(whole[f"m_{side}"]) + d.log()
            others = times(rest.extra(i)[k], (ratio * shift(rest[f"m_{side}"]) - lse).exp())
            logp = log_prob(others, ratio * whole.label_logit(side), lse)
            fields += [lse, (d.log() - h / d).clamp_min(0), logp, 1 / d]
        return fields

    def fold(self, fields: Tensor, grads: Tensor, temperature: float) -> Folded:
        # The gradient is e^lp·(A + B·lp), lp at τ, and one term more at the label.
        by_lse, by_entropy, by_logp, *_ = grads / self.temperature
        a = by_lse - by_logp - times(by_entropy, fields[1])
        return [fields[0], a, -by_entropy], by_logp

    def vjp(self, pair: Pair, factors: Tensor, temperature: float) -> Tensor:
        a, b = factors[1:, :, None].to(pair.u.dtype)
        ratio = temperature / self.temperature
        log_p = minus(pair.u, factors[0] / ratio) * ratio  # exact where the two are near
        return times(log_p.exp(), a + times(b, log_p))


@dataclass(frozen=True)
class Mixture(Extra):
    """It gives ``KL(p_t ‖ m)`` and ``KL(p_s ‖ m)`` for ``m = omega·p_t + (1-omega)·p_s``.

    Args:
        omega: share of the teacher, 0 < omega < 1.
    """

    omega: float

    kind = 2
    sums = fields = ("kl_tm", "kl_sm", "overlap")
    factors = ("Y0", "Y1", "Y2")
    public = 2
    second_read = True

    def absorb_pair(self, pair: Pair) -> list[Tensor]:
        # The overlap, Σ p_s·p_t/m, is for pass 2 alone.
        ratio, log_ratio_s, log_ratio_t = mixture_terms(pair.s, pair.t, self.omega)
        p, q = pair.s.exp(), pair.t.exp()
        return [x.sum(1) for x in (times(q, log_ratio_t), times(p, log_ratio_s), times(p, ratio))]

    def finalize(self, i: int, whole: RowState, rest: RowState) -> list[Tensor]:
        kl_tm, kl_sm, overlap = whole.extra(i)
        return [kl_tm.clamp_min(0), kl_sm.clamp_min(0), overlap]

    def fold(self, fields: Tensor, grads: Tensor, temperature: float) -> Folded:
        # The gradient is e^lp·(Y0 + Y1·p_t/m + Y2·log(p_s/m)).
        (_, kl_sm, overlap), (by_tm, by_sm, _) = fields, grads / temperature
        y0 = by_tm * (1 - self.omega) * overlap - by_sm * (self.omega * overlap + kl_sm)
        return [y0, self.omega * by_sm - (1 - self.omega) * by_tm, by_sm], None

    def vjp(self, pair: Pair, factors: Tensor, temperature: float) -> Tensor:
        y0, y1, y2 = factors[..., None].to(pair.s.dtype)
        ratio, log_ratio, _ = mixture_terms(pair.s, pair.t, self.omega)
        return times(pair.s.exp(), y0 + y1 * ratio + y2 * log_ratio)


@dataclass(frozen=True)
class TotalVariation(Extra):
    """The total variation is ``½ Σ |p_s - p_t|``."""

    kind = 3
    sums = fields = ("distance", "drift")
    factors = ("V0", "V1")
    public = 1
    second_read = True

    def absorb_pair(self, pair: Pair) -> list[Tensor]:
        # The drift, Σ p_s·sgn(p_s - p_t), is for pass 2 alone.
        p, gap = pair.s.exp(), pair.s.exp() - pair.t.exp()
        return [gap.abs().sum(1) / 2, (p * torch.sign(gap)).sum(1)]

    def finalize(self, i: int, whole: RowState, rest: RowState) -> list[Tensor]:
        return list(whole.extra(i))

    def fold(self, fields: Tensor, grads: Tensor, temperature: float) -> Folded:
        # The gradient is e^lp·(V0 + V1·sgn(p_s - p_t)).
        half = grads[0] / (2 * temperature)
        return [-half * fields[1], half], None

    def vjp(self, pair: Pair, factors: Tensor, temperature: float) -> Tensor:
        v0, v1 = factors[..., None].to(pair.s.dtype)
        p = pair.s.exp()
        return times(p, v0 + v1 * torch.sign(p - pair.t.exp()))


KINDS: dict[int, type[Extra]] = {
    extra.kind: extra for extra in (Tilt, Tempered, Mixture, TotalVariation)
}
"""Statistics by their number."""

LOG_RATIO_BOUND = 80.0
"""Bound on ``lq - lp`` inside a mixture: beyond it one of the two probabilities is below e⁻⁸⁰."""


def mixture_terms(lp: Tensor, lq: Tensor, omega: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``p_t/m``, ``log(p_s/m)``, ``log(p_t/m)`` for ``m = omega·p_t + (1-omega)·p_s``.

    They are finite where a column is masked in both models.
    """
    absent = (lp == NEG_INF) & (lq == NEG_INF)
    delta = torch.where(absent, 0.0, lq - lp).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    log_ratio_t = -torch.log1p((1 - omega) * torch.expm1(-delta))
    return log_ratio_t.exp(), -torch.log1p(omega * torch.expm1(delta)), log_ratio_t
