"""The vector-Jacobian product of the row statistics, in the few numbers a row that pass 2 needs.

With ``g_x`` the derivative of the row's loss in statistic ``x``,
``lp = u - lse_s`` and ``lq = v - lse_t``, pass 2 writes

    d_j = e^lp · [ g_lse + g_kl_ts - g_logp - g_H·(lp + H_s) + g_kl_st·(lp - lq - kl_st) ] -
    g_kl_ts·e^lq + g_logp·1[j = label]

for the tempered logits ``u``, and
``e^(z-lse_c)·(g_lse_hard + g_nll) + g_mean/columns - g_nll·1[j = label]`` for the real ones.
:func:`vjp_coefficients` folds the ``g`` into the few numbers a row that a backend needs:

    d_j = e^lp·(A + B·lp - C·lq) - D·e^lq + H·e^(z-lse_c) + M          (label: A_y, D_y, H_y
    instead, plus ``hot``)

``hot`` is built from ``1 - p[label]`` as summed over the other columns, so the gradient of a
well-known label keeps its digits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from bgkernels.rows.spec import Extra, RowSpec, Tilt, TotalVariation
from bgkernels.rows.state import SKIP, TILT, times
from bgkernels.rows.stats import DIFFERENTIABLE, Final, RowStats

COEFFICIENTS = ("lse_s", "lse_t", "lse_c", "A", "B", "C", "D", "H", "M", "A_y", "D_y", "H_y", "hot")
"""Rows of :attr:`Coefficients.row`."""


@dataclass(frozen=True)
class Coefficients:
    """What pass 2 needs of each row, all ``(·, rows)``.

    Args:
        row: ``(13, rows)`` in the order of ``COEFFICIENTS``.
        labels: ``(rows,)`` int64 column of the label, or ``SKIP``: the row's gradient is zero
            whatever its logits.
        tilts: ``(4·tilts, rows)``: lse, P0, P1, P2; the gradient gains
            ``e^(a·u+b·v-lse)·(P0 + P1·x + P2·x²)``, x = u - v.
        pairs: ``(3·mixtures + 2·total_variation, rows)``: Y0, Y1, Y2 with
            ``e^lp·(Y0 + Y1·p_t/m + Y2·log(p_s/m))``, then V0, V1 with
            ``e^lp·(V0 + V1·sgn(p_s - p_t))``.
    """

    row: Tensor
    labels: Tensor
    tilts: Tensor
    pairs: Tensor

    def to(self, dtype: torch.dtype) -> Coefficients:
        """The same in the dtype that kernels read.

        A log-sum-exp of hundreds loses digits there; what it loses is moved into the factors.
        """
        if dtype == self.row.dtype:
            return self
        row = dict(zip(COEFFICIENTS, self.row, strict=True))
        lost = {k: row[f"lse_{k}"].to(dtype).to(self.row.dtype) - row[f"lse_{k}"] for k in "stc"}
        bend = row["B"] * lost["s"] - row["C"] * lost["t"]
        row |= {"A": row["A"] + bend, "A_y": row["A_y"] + bend}
        for names, side in (("A B C A_y", "s"), ("D D_y", "t"), ("H H_y", "c")):
            row |= {name: row[name] * lost[side].exp() for name in names.split()}
        tilts = self.tilts.clone()
        for lse, *factors in tilts.unflatten(0, (-1, len(TILT))) if len(tilts) else ():
            for x in factors:
                x *= (lse.to(dtype).to(lse.dtype) - lse).exp()
        pairs = self.pairs * lost["s"].exp()
        return Coefficients(
            torch.stack(list(row.values())).to(dtype), self.labels, tilts.to(dtype), pairs.to(dtype)
        )


Grads = Mapping[str, Tensor | None]


def vjp_coefficients(
    final: Final,
    grads: Grads,
    extra_grads: Mapping[Extra, tuple[Tensor | None, ...]],
    spec: RowSpec,
) -> Coefficients:
    """Fold the derivatives of a loss in the statistics into the coefficients of pass 2.

    Args:
        final: statistics of the rows.
        grads: derivative by each name in ``DIFFERENTIABLE``, ``(rows,)``; a missing one or None is
            zero.
        extra_grads: the same for the extras.
        spec: the specification of the pass.
    """
    s = final.stats
    zero = torch.zeros_like(s.nll)
    g = {
        name: cast(Tensor, zero if grads.get(name) is None else grads[name])
        for name in DIFFERENTIABLE
    }
    inv = 1.0 / spec.temperature
    free = (g["lse_s"] - times(g["entropy_s"], s.entropy_s) - times(g["kl_st"], s.kl_st)) * inv
    row = dict.fromkeys(COEFFICIENTS, zero) | {
        "lse_s": s.lse_s, "lse_t": s.lse_t, "lse_c": s.lse_hard,
        "A": free + (g["kl_ts"] - g["logp_s"]) * inv, "A_y": free,
        "B": (g["kl_st"] - g["entropy_s"]) * inv, "C": g["kl_st"] * inv, "D": g["kl_ts"] * inv,
        "H": g["lse_hard"] + g["nll"], "H_y": g["lse_hard"], "M": g["logit_mean"] / spec.columns,
        "hot": times(g["logp_s"], final.rest_s) * inv
        + times(g["kl_ts"], final.rest_t - final.rest_s) * inv - times(g["nll"], final.rest_c),
    }  # fmt: skip
    if spec.shared_softmax:
        row |= {"A": row["A"] + row["H"], "A_y": row["A_y"] + row["H_y"], "H": zero, "H_y": zero}
    labels = torch.where(s.valid, s.label, SKIP)
    tilts = [
        x * w
        for t in spec.tilts
        for x, w in zip(_tilt_vjp(t, s, extra_grads, zero), (1, inv, inv, inv), strict=True)
    ]
    pairs = [x * inv for x in _pair_vjp(final, spec, extra_grads, zero)]
    none = zero.new_zeros(0, len(zero))
    return Coefficients(
        torch.stack(list(row.values())),
        labels,
        torch.stack(tilts) if tilts else none,
        torch.stack(pairs) if pairs else none,
    )


def _given(
    extra: Extra, grads: Mapping[Extra, tuple[Tensor | None, ...]], count: int, zero: Tensor
) -> list[Tensor]:
    given = grads.get(extra, (None,) * count)
    return [zero if x is None else x for x in given]


def _tilt_vjp(
    tilt: Tilt, s: RowStats, grads: Mapping[Extra, tuple[Tensor | None, ...]], zero: Tensor
) -> list[Tensor]:
    values = s.extras[tilt]
    g_lse, *g_moments = _given(tilt, grads, len(values), zero)
    if not tilt.moments:
        return [values[0], tilt.a * g_lse, zero, zero]
    (g_mean, g_second), (lse, mean, second) = g_moments, values
    p0 = tilt.a * (g_lse - g_mean * mean - g_second * second) + g_mean
    return [lse, p0, tilt.a * g_mean + 2 * g_second, tilt.a * g_second]


def _pair_vjp(
    final: Final, spec: RowSpec, grads: Mapping[Extra, tuple[Tensor | None, ...]], zero: Tensor
) -> list[Tensor]:
    out = []
    for mixture, overlap in zip(spec.mixtures, final.overlap, strict=False):
        g_tm, g_sm = _given(mixture, grads, 2, zero)
        omega, kl_sm = mixture.omega, final.stats.extras[mixture][1]
        y0 = g_tm * (1 - omega) * overlap - g_sm * (omega * overlap + kl_sm)
        out += [y0, omega * g_sm - (1 - omega) * g_tm, g_sm]
    if spec.total_variation:
        (g_tv,) = _given(TotalVariation(), grads, 1, zero)
        out += [-0.5 * g_tv * final.overlap[-1], 0.5 * g_tv]
    return out
