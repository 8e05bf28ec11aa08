"""Every row statistic from dense logits, by name: what the streamed ones are compared with."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bgkernels.rows.arithmetic import SKIP
from bgkernels.rows.extras import Extra, Mixture, Tempered, Tilt
from tests import oracle

BASE = ("lse_s", "lse_t", "entropy_s", "entropy_t", "kl_ts", "kl_st", "logp_s", "logp_t",
        "max_prob_s", "max_prob_t", "nll", "lse_hard", "logit_mean")  # fmt: skip


def fields(
    z: Tensor, t: Tensor, labels: Tensor, temperature: float, extras: Sequence[Extra] = ()
) -> dict[str, Tensor]:
    """The public fields of the statistics and of extras, differentiable in ``z (rows, columns)``.

    Args:
        z, t: real logits; they are compared on the columns that both have.
        labels: a column, or ``SKIP``.
        temperature: of the comparison.
        extras: those of one class share their names with ``of`` themselves.
    """
    args = (z, t, labels)
    of = oracle.row_stats(*args, temperature=temperature, ignore_index=SKIP)
    values = {name: of[name] for name in BASE}
    for extra in extras:
        if isinstance(extra, Tilt):
            one = moments(z, t, temperature, extra)
        elif isinstance(extra, Tempered):
            warm = oracle.row_stats(*args, single=extra.temperature, ignore_index=SKIP)
            one = {name: warm[name] for name in Tempered.fields}
        elif isinstance(extra, Mixture):
            more = {"temperature": temperature, "mixture": extra.omega, "ignore_index": SKIP}
            mixed = oracle.row_stats(*args, **more)
            one = {"kl_tm": mixed["kl_t_mix"], "kl_sm": mixed["kl_s_mix"]}
        else:
            one = {"distance": of["tv"]}
        values |= {f"{name} of {extra}": x for name, x in one.items()}
    return values


def moments(z: Tensor, t: Tensor, temperature: float, tilt: Tilt) -> dict[str, Tensor]:
    """``log Σ e^(a·u + b·v)`` and the first two moments of ``u - v``."""
    u, v = z[..., : t.shape[-1]] / temperature, t[..., : z.shape[-1]] / temperature
    absent = u.isinf() & v.isinf()  # neither model has the column
    u, v = u.masked_fill(absent, 0.0), v.masked_fill(absent, 0.0)
    w = sum((e * x for e, x in ((tilt.a, u), (tilt.b, v)) if e), 0 * u.masked_fill(u.isinf(), 0.0))
    w = w.masked_fill(absent, -oracle.INF)
    value = {"lse": w.logsumexp(-1)}
    if tilt.moments:
        p, gap = w.softmax(-1), u - v
        value |= {"mean": oracle._product(p, gap).sum(-1)}
        value |= {"second": oracle._product(p, gap * gap).sum(-1)}
    return value
