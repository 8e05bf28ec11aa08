"""The vector-Jacobian product of the row statistics needs a few numbers a row.

With ``g_x`` the derivative of the row's loss in statistic ``x``,
``lp = u - lse_s`` and ``lq = v - lse_t``, pass 2 writes

    d_j = e^lp · [ g_lse + g_kl_ts - g_logp - g_H·(lp + H_s) + g_kl_st·(lp - lq - kl_st) ]
          - g_kl_ts·e^lq + g_logp·1[j = label]

for the tempered logits ``u``, and
``e^(z-lse_c)·(g_lse_hard + g_nll) + g_mean/columns - g_nll·1[j = label]`` for the real ones.
:func:`fold` makes of the ``g`` the few numbers a row that a backend needs, the *coefficients*:

    d_j = e^lp·(A + B·lp - C·lq) - D·e^lq + H·e^(z-lse_c) + M

(at the label A_y, D_y, H_y instead of A, D, H, and ``hot`` is added) and the factors of each extra
statistic (:mod:`bgkernels.rows.extras`). ``hot`` is built from
``1 - p[label]`` as summed over the other columns, so the gradient of a well-known label keeps its
digits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bgkernels.rows.arithmetic import NEG_INF, times
from bgkernels.rows.spec import COEFFICIENTS, FIELDS, RowSpec


def fold(statistics: Tensor, grads: Tensor, spec: RowSpec) -> Tensor:
    """Fold the derivatives of a loss in the statistics into the coefficients of pass 2.

    Args:
        statistics: ``(fields, rows)`` of one pair.
        grads: the derivative by each of them; those by fields that carry no gradient are not read.
        spec: of the rows.

    Returns:
        ``(spec.factor_count, rows)``, ``COEFFICIENTS`` and the factors of each extra.
    """
    s = dict(zip(FIELDS, statistics, strict=False))
    g = dict(zip(FIELDS, grads, strict=False))
    zero, inv = torch.zeros_like(s["nll"]), 1.0 / spec.temperature
    free = g["lse_s"] - times(g["entropy_s"], s["entropy_s"]) - times(g["kl_st"], s["kl_st"])
    free = free * inv
    row = dict.fromkeys(COEFFICIENTS, zero) | {
        "lse_s": s["lse_s"], "lse_t": s["lse_t"], "lse_c": s["lse_hard"],
        "A": free + (g["kl_ts"] - g["logp_s"]) * inv, "A_y": free,
        "B": (g["kl_st"] - g["entropy_s"]) * inv, "C": g["kl_st"] * inv, "D": g["kl_ts"] * inv,
        "H": g["lse_hard"] + g["nll"], "H_y": g["lse_hard"], "M": g["logit_mean"] / spec.columns,
        "hot": times(g["logp_s"], s["rest_s"]) * inv
        + times(g["kl_ts"], s["rest_t"] - s["rest_s"]) * inv - times(g["nll"], s["rest_c"]),
    }  # fmt: skip
    if spec.shared_softmax:
        row |= {"A": row["A"] + row["H"], "A_y": row["A_y"] + row["H_y"], "H": zero, "H_y": zero}
    factors: list[Tensor] = []
    for extra, place in zip(spec.extras, spec.fields, strict=True):
        extra_factors, hot = extra.fold(statistics[place], grads[place], spec.temperature)
        factors += extra_factors
        if hot is not None:
            row["hot"] = row["hot"] + hot
    return torch.stack([*row.values(), *factors])


def recentred(row: dict[str, Tensor], lse: Tensor, bucket: Tensor) -> dict[str, Tensor]:
    """Return coefficients about the log-sum-exp of some columns alone.

    With ``lp = lp' + δ`` for ``lp' = u - lse``, ``e^lp·(A + B·lp) = e^lp'·e^δ·(A + B·δ + B·lp')``:
    nothing overflows if it is small.

    Args:
        row: about the log-sum-exp of all columns.
        lse: of these columns, -inf where there is none.
        bucket: derivative of the loss by the logit of the category that they form.
    """
    present = (lse > NEG_INF) | lse.isnan()
    delta = torch.where(present, lse - row["lse_s"], NEG_INF)
    weight = delta.exp()
    gain = times(weight * row["B"], delta) + torch.where(present, bucket, 0.0)
    centre = torch.where(present, lse, 0.0)
    return {
        "lse_s": centre, "lse_t": centre, "B": weight * row["B"],
        "A": weight * row["A"] + gain, "A_y": weight * row["A_y"] + gain,
    }  # fmt: skip
