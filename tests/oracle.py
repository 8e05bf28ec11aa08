"""The oracle: every loss of the library written densely, from its definition, in plain torch.

It exists to be compared with: slow, full of (rows, vocab) matrices, and without a line or a
derivation in common with what it checks. It works in the dtype of its inputs, best float64.

Names: ``lp_s`` and ``lp_t`` are log-probabilities (rows, vocab) of student and teacher, s and t in
formulas their exponentials, z the student's real (scaled, softcapped) logits. Two rules hold
throughout: ``0 * (+-inf) = 0``, and a NaN is never hidden. A divergence compares distributions at
the loss's temperature; a policy looks at temperature 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

Weights = tuple[Tensor, ...]  # hard, soft; a third replaces CE. Each (rows,)
Options = tuple[int, int | None, bool]  # ignore_index, vocab_size, blank
INF = float("inf")


def real_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None,
                logit_scale: float = 1, logit_softcap: float | None = None) -> Tensor:  # fmt: skip
    """``y = scale * (h W^T + b)``, then ``cap * tanh(y / cap)``: (..., D), (V, D) -> (..., V)."""
    y = logit_scale * (hidden @ weight.T + (0 if bias is None else bias))
    return y if logit_softcap is None else logit_softcap * torch.tanh(y / logit_softcap)


# Divergences: lp_s, lp_t (rows, vocab) -> (rows,)


def _product(weight: Tensor, value: Tensor) -> Tensor:
    """``weight * value`` with ``0 * (+-inf) = 0``, in the gradient too."""
    return weight * value.masked_fill((weight == 0) & value.isinf(), 0.0)


def _drop_empty(lp_s: Tensor, lp_t: Tensor, fill: float) -> tuple[Tensor, Tensor, Tensor]:
    """Columns of zero probability in both models, and the two matrices with `fill` there."""
    empty = (lp_s == -INF) & (lp_t == -INF)
    return empty, lp_s.masked_fill(empty, fill), lp_t.masked_fill(empty, fill)


def _kl(lp_a: Tensor, lp_b: Tensor) -> Tensor:
    """``sum a log(a / b)``."""
    a = lp_a.exp()
    # Masked before the difference: -inf - (-inf) would leave NaN in the gradient behind a zero.
    log_ratio = lp_a.masked_fill(a == 0, 0.0) - lp_b.masked_fill(a == 0, 0.0)
    return (a * log_ratio).sum(-1)


def _entropy(lp: Tensor) -> Tensor:
    """``-sum p log p``."""
    return -_product(lp.exp(), lp).sum(-1)


def _log_mixture(lp_s: Tensor, lp_t: Tensor, weight_t: float) -> Tensor:
    """``log(w p_t + (1 - w) p_s)``."""
    if weight_t in (0, 1):
        return lp_t if weight_t == 1 else lp_s
    empty, s, t = _drop_empty(lp_s, lp_t, 0.0)
    mixed = torch.logaddexp(t + math.log(weight_t), s + math.log1p(-weight_t))
    return mixed.masked_fill(empty, -INF)


def forward_kl(lp_s: Tensor, lp_t: Tensor) -> Tensor:
    """``KL(t || s)``."""
    return _kl(lp_t, lp_s)


def reverse_kl(lp_s: Tensor, lp_t: Tensor) -> Tensor:
    """``KL(s || t)``."""
    return _kl(lp_s, lp_t)


def jeffreys(lp_s: Tensor, lp_t: Tensor) -> Tensor:
    """``KL(t || s) + KL(s || t)``."""
    return _kl(lp_t, lp_s) + _kl(lp_s, lp_t)


def generalized_jsd(lp_s: Tensor, lp_t: Tensor, beta: float = 0.5) -> Tensor:
    """``beta KL(t || m) + (1 - beta) KL(s || m), m = beta t + (1 - beta) s``; ends are the KLs."""
    if beta in (0, 1):
        return _kl(lp_t, lp_s) if beta == 0 else _kl(lp_s, lp_t)
    lp_m = _log_mixture(lp_s, lp_t, beta)
    return beta * _kl(lp_t, lp_m) + (1 - beta) * _kl(lp_s, lp_m)


def skew_forward_kl(lp_s: Tensor, lp_t: Tensor, lam: float = 0.1) -> Tensor:
    """``KL(t || lam t + (1 - lam) s)``."""
    return _kl(lp_t, _log_mixture(lp_s, lp_t, lam))


def skew_reverse_kl(lp_s: Tensor, lp_t: Tensor, lam: float = 0.1) -> Tensor:
    """``KL(s || (1 - lam) t + lam s)``."""
    return _kl(lp_s, _log_mixture(lp_s, lp_t, 1 - lam))


def alpha_beta(lp_s: Tensor, lp_t: Tensor, alpha: float = 0.2, beta: float = 0.7) -> Tensor:
    """``-1/(ab) sum[t^a s^b - a/(a+b) t^(a+b) - b/(a+b) s^(a+b)]`` and its four limits."""
    a, b = alpha, beta
    empty, lp_s, lp_t = _drop_empty(lp_s, lp_t, 0.0)
    log_ratio = lp_s - lp_t
    if a == 0 and b == 0:
        terms = log_ratio.square() / 2
    elif a == 0:
        s, t = (b * lp_s).exp(), (b * lp_t).exp()
        terms = (_product(s, b * log_ratio) - s + t) / b**2
    elif b == 0:
        s, t = (a * lp_s).exp(), (a * lp_t).exp()
        terms = (_product(t, -a * log_ratio) - t + s) / a**2
    elif math.isclose(a, -b, rel_tol=1e-12):
        terms = (a * log_ratio + (-a * log_ratio).exp() - 1) / a**2
    else:
        c = a + b
        cross, t, s = (a * lp_t + b * lp_s).exp(), (c * lp_t).exp(), (c * lp_s).exp()
        terms = -(cross - a / c * t - b / c * s) / (a * b)
    return terms.masked_fill(empty, 0.0).sum(-1)


def _tilt(lp_s: Tensor, lp_t: Tensor, a: float, b: float) -> Tensor:
    """``log sum s^a t^b``; an exponent of 0 leaves its factor out, also where that is 0."""
    empty, s, t = _drop_empty(lp_s, lp_t, 0.0)
    power = sum((e * lp for e, lp in ((a, s), (b, t)) if e != 0), torch.zeros_like(s))
    return power.masked_fill(empty, -INF).logsumexp(-1)


def renyi(lp_s: Tensor, lp_t: Tensor, alpha: float = 0.5) -> Tensor:
    """``1/(alpha - 1) log sum t^alpha s^(1 - alpha)``; at 1 the forward KL."""
    return _kl(lp_t, lp_s) if alpha == 1 else _tilt(lp_s, lp_t, 1 - alpha, alpha) / (alpha - 1)


def total_variation(lp_s: Tensor, lp_t: Tensor) -> Tensor:
    """``1/2 sum |t - s|``."""
    return (lp_t.exp() - lp_s.exp()).abs().sum(-1) / 2


def adaptive_kl(lp_s: Tensor, lp_t: Tensor, mu: float = 0.5, detach: bool = False) -> Tensor:
    """``h KL(t || s) + (1 - h) KL(s || t), h = sigmoid(mu (H_s - H_t))``; h has a gradient."""
    gate = torch.sigmoid(mu * (_entropy(lp_s) - _entropy(lp_t)))
    h = gate.detach() if detach else gate
    return h * _kl(lp_t, lp_s) + (1 - h) * _kl(lp_s, lp_t)


_ALL = (forward_kl, reverse_kl, jeffreys, generalized_jsd, skew_forward_kl, skew_reverse_kl,
        alpha_beta, renyi, total_variation, adaptive_kl)  # fmt: skip
DIVERGENCES: dict[str, Callable[..., Tensor]] = {f.__name__: f for f in _ALL}


# Routing policies: Row -> (hard, soft), each (rows,)


@dataclass(frozen=True)
class Row:
    """The dense quantities that policies are written in; `shape` is what rows were before."""

    shape: tuple[int, ...]
    z: Tensor  # (rows, columns of the cross-entropy): real student logits
    lp_s: Tensor  # (rows, vocab): at temperature 1, over the compared columns; so is lp_t
    lp_t: Tensor
    label: Tensor  # (rows,) int64: 0 where ignored
    valid: Tensor  # (rows,) bool
    logp_s: Tensor  # (rows,): lp_s at the label, -inf if the label is not among the compared
    logp_t: Tensor

    def full(self, value: float) -> Tensor:
        """A constant, (rows,)."""
        return torch.full_like(self.logp_t, value)


def additive(row: Row, hard: float = 1.0, soft: float = 1.0) -> Weights:
    """``(hard, soft)``; hard() is (1, 0), soft() is (0, 1)."""
    return row.full(hard), row.full(soft)


def static(row: Row, w: float = 0.5) -> Weights:
    """``(1 - w, w)``."""
    return row.full(1 - w), row.full(w)


def confidence(row: Row, kind: str = "label") -> Weights:
    """``(c, 1 - c)``, c = p_t[label], or max_j p_t[j] for kind "max"."""
    c = {"label": row.logp_t, "max": row.lp_t.amax(-1)}[kind].exp()
    return c, 1 - c


def entropy(row: Row, kind: str = "power", gamma: float = 0.1) -> Weights:
    """``(1 - s, s)``, s = clamp01[(sum p_t^g - 1) / (V^(1-g) - 1)], or H_t / log V ("shannon")."""
    vocab = max(row.lp_t.shape[-1], 2)  # a single column has no entropy: 0 / anything
    power = ((gamma * row.lp_t).exp().sum(-1) - 1) / (vocab ** (1 - gamma) - 1)
    s = {"shannon": _entropy(row.lp_t) / math.log(vocab), "power": power}[kind].clamp(0, 1)
    return 1 - s, s


def threshold(row: Row, tau: float = 0.5, sharpness: float = 20.0) -> Weights:
    """``(1 - s, s)``, s = sigmoid(sharpness * (H_t / log V - tau))."""
    s = torch.sigmoid(sharpness * (entropy(row, kind="shannon")[1] - tau))
    return 1 - s, s


def top_entropy(row: Row, fraction: float = 0.2) -> Weights:
    """``(0, 1)`` for the ceil(fraction * n_valid) valid rows of highest H_t, else ``(1, 0)``."""
    index = row.valid.nonzero()[:, 0]
    order = _entropy(row.lp_t)[index].sort(descending=True, stable=True).indices
    s, count = row.full(0), math.ceil(fraction * len(index) - 1e-9)  # 0.07 * 100 > 7 in floats
    s[index[order[:count]]] = 1
    return 1 - s, s


def weighted_soft(row: Row, w: float = 1.0, inverted: bool = False) -> Weights:
    """``(1, w omega)``, omega = clamp01(1 - e^-r), or e^-r inverted; r = clamp(logp_s / logp_t)."""
    floor = math.log(1e-8)  # probabilities count as at least 1e-8, log p_t as at most -1e-8
    s, t = row.logp_s.detach().clamp(min=floor), row.logp_t.clamp(min=floor, max=-1e-8)
    omega = torch.exp(-(s / t).clamp(-10, 10))
    return row.full(1), w * (omega if inverted else 1 - omega).clamp(0, 1)


def reverse(row: Row, policy: str = "entropy", **params: Any) -> Weights:
    """``(soft, hard)`` of the policy."""
    hard, soft, *hard_term = POLICIES[policy](row, **params)
    return soft, hard, *hard_term


def curriculum(row: Row, c: float, policy: str = "soft", **params: Any) -> Weights:
    """``((1 - c) + c hard, c soft)`` of the policy."""
    hard, soft, *hard_term = POLICIES[policy](row, **params)
    return (1 - c) + c * hard, c * soft, *hard_term


def risk_guided(row: Row, w: float = 0.5, alpha: float = 0.05, gamma: float = 0.9999) -> Weights:
    """``(1 - w, w)``; CE becomes ``g^t [nll + a/4 (z[y] - g V')^2] + (t=T) n/B g^T a(1-g)/4 V^2``.

    t numbers the valid tokens of a sequence (the last leading dimension) from 0, T is the last,
    V = lse(z) and V' that of token t + 1, 0 after the last. With n valid tokens in B sequences, n/B
    makes of the mean over tokens a mean over sequences. The gradient reaches the raw logits.
    """
    value, reached = row.z.logsumexp(-1), row.z.gather(1, row.label[:, None])[:, 0]
    width = row.shape[-1] if row.shape else 1
    places = torch.arange(len(value), device=value.device).reshape(-1, max(width, 1))
    lines = [line for place in places if len(line := place[row.valid[place]])]
    hard_term = torch.zeros_like(value)
    for line in lines:
        v, discount = value[line], gamma ** torch.arange(len(line)).to(value)
        v_next = torch.cat([v[1:], torch.zeros_like(v[:1])])
        gap, nll = reached[line] - gamma * v_next, v - reached[line]
        terms = discount * (nll + alpha / 4 * gap.square())
        if 1 - gamma >= 1e-6:
            end = discount[-1:] * alpha * (1 - gamma) / 4 * v[-1:].square()
            terms = torch.cat([terms[:-1], terms[-1:] + row.valid.sum() / len(lines) * end])
        hard_term = hard_term.index_add(0, line, terms)
    return row.full(1 - w), row.full(w), hard_term


POLICIES: dict[str, Callable[..., Weights]] = {
    "hard": partial(additive, hard=1.0, soft=0.0),
    "soft": partial(additive, hard=0.0, soft=1.0),
}
for _policy in (static, additive, confidence, entropy, threshold, top_entropy, weighted_soft,
                reverse, curriculum, risk_guided):  # fmt: skip
    POLICIES[_policy.__name__] = _policy


def _at(x: Tensor, label: Tensor) -> Tensor:
    """``x[label]``, -inf for a label beyond the columns of x."""
    inside = label < x.shape[-1]
    picked = x.gather(1, label.masked_fill(~inside, 0)[:, None])[:, 0]
    return picked.masked_fill(~inside, -INF)


def _rows(s_logits: Tensor, t_logits: Tensor, target: Tensor | str, options: Options) -> Row:
    """Everything dense about the rows. Under `blank` the ignored rows get all-zero logits."""
    ignore_index, vocab_size, blank = options
    shape, vocab = s_logits.shape[:-1], vocab_size or min(s_logits.shape[-1], t_logits.shape[-1])
    z = s_logits[..., :vocab_size].reshape(-1, vocab_size or s_logits.shape[-1])
    t = t_logits.detach()[..., :vocab].reshape(-1, vocab)
    if isinstance(target, str):
        label, valid = t.argmax(-1), torch.ones_like(t[:, 0], dtype=torch.bool)
    else:
        valid = target.reshape(-1) != ignore_index
        label = target.reshape(-1).masked_fill(~valid, 0)
    if blank:
        z, t = z.masked_fill(~valid[:, None], 0.0), t.masked_fill(~valid[:, None], 0.0)
    lp_s, lp_t = z[:, :vocab].log_softmax(-1), t.log_softmax(-1)
    return Row(tuple(shape), z, lp_s, lp_t, label, valid, _at(lp_s, label), _at(lp_t, label))


def tempered(lp: Tensor, temperature: float) -> Tensor:
    """The log-probabilities at a temperature, of logits or of those at temperature 1."""
    return torch.log_softmax(lp / temperature, -1)


def cross_entropy(z: Tensor, label: Tensor, e: float = 0.0) -> Tensor:
    """``-(1 - e) log q[label] - e mean_j log q[j]``, q = softmax(z) at temperature 1."""
    log_q = torch.log_softmax(z, -1)
    smoothed = (1 - e) * _at(log_q, label)
    return -(smoothed if e == 0 else smoothed + e * log_q.mean(-1))


def hybrid_loss(
    s_logits: Tensor,
    t_logits: Tensor,
    target: Tensor | str,
    *,
    divergence: str = "forward_kl",
    divergence_params: Mapping[str, Any] | None = None,
    routing: str | Callable[[Row], Weights] = "entropy",
    routing_params: Mapping[str, Any] | None = None,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    num_items: Tensor | float | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """``L = hard CE + soft T^2 D + z_loss lse(z)^2``, times token_weight, reduced.

    `s_logits` (..., V_s), `t_logits` (..., V_t): real logits, the teacher's detached. `target`:
    (...) int64 or "teacher_argmax". D and the routing compare the first `vocab_size` columns
    (default: the smaller of the two), CE has all the student's unless `vocab_size` is given. "mean"
    divides by the valid rows or `num_items`; "none": the leading shape, 0 at ignored tokens.
    """
    row = _rows(s_logits, t_logits, target, (ignore_index, vocab_size, True))
    policy = POLICIES[routing] if isinstance(routing, str) else routing
    hard, soft, *hard_term = policy(row, **(routing_params or {}))
    pair = (tempered(lp, temperature) for lp in (row.lp_s, row.lp_t))
    d = DIVERGENCES[divergence](*pair, **(divergence_params or {}))
    ce = hard_term[0] if hard_term else cross_entropy(row.z, row.label, label_smoothing)
    loss = _product(hard, ce) + _product(soft, temperature**2 * d)
    loss = loss + _product(row.full(z_loss), row.z.logsumexp(-1).square())
    weight = row.full(1) if token_weight is None else token_weight.reshape(-1).to(loss)
    loss = _product(weight.masked_fill(~row.valid, 0.0), loss).masked_fill(~row.valid, 0.0)
    if reduction == "none":
        return loss.reshape(row.shape)
    count = row.valid.sum().clamp(min=1) if num_items is None else num_items
    return loss.sum() / count if reduction == "mean" else loss.sum()


def row_stats(s_logits: Tensor, t_logits: Tensor, target: Tensor | str, *,
              temperature: float = 1.0, single: float | None = None, ignore_index: int = -100,
              vocab_size: int | None = None, tilt: tuple[float, float] = (0.0, 0.1),
              mixture: float = 0.5) -> dict[str, Tensor]:  # fmt: skip
    """Every field of the library's RowStats, in the leading shape, differentiable in the student.

    Beside them `tilt` = ``log sum s^a t^b``, the KLs to ``mixture t + (1 - mixture) s``, `tv`, and
    `vocab` = the compared columns. What looks at one distribution, and the tilt, is at temperature
    `single` (None: `temperature`). At ignored tokens logp_s, logp_t, nll are 0.
    """
    row = _rows(s_logits, t_logits, target, (ignore_index, vocab_size, False))
    tau, vocab = temperature if single is None else single, row.lp_s.shape[-1]
    lp_s, lp_t = (tempered(lp, temperature) for lp in (row.lp_s, row.lp_t))
    lp_m = _log_mixture(lp_s, lp_t, mixture)
    stats = {
        "kl_ts": forward_kl(lp_s, lp_t),
        "kl_st": reverse_kl(lp_s, lp_t),
        "label": row.label.masked_fill(~row.valid, ignore_index),
        "nll": cross_entropy(row.z, row.label).masked_fill(~row.valid, 0.0),
        "lse_hard": row.z.logsumexp(-1),
        "logit_mean": row.z.mean(-1),
        "valid": row.valid,
        "tilt": _tilt(tempered(row.lp_s, tau), tempered(row.lp_t, tau), *tilt),
        "kl_t_mix": _kl(lp_t, lp_m),
        "kl_s_mix": _kl(lp_s, lp_m),
        "tv": total_variation(lp_s, lp_t),
    }
    for side, z in (("s", row.z), ("t", t_logits.detach().reshape(-1, t_logits.shape[-1]))):
        lp = tempered(z[:, :vocab], tau)
        stats |= {
            f"lse_{side}": (z[:, :vocab] / tau).logsumexp(-1),
            f"entropy_{side}": _entropy(lp),
            f"logp_{side}": _at(lp, row.label).masked_fill(~row.valid, 0.0),
            f"max_prob_{side}": lp.exp().amax(-1),
            f"argmax_{side}": z[:, :vocab].argmax(-1),
        }
    return {n: x.reshape(row.shape) for n, x in stats.items()} | {"vocab": torch.tensor(vocab)}


def philox2x32(c0: int, c1: int, key: int) -> tuple[int, int]:
    """Philox2x32-10 of Random123: ten rounds of ``(hi ^ key ^ c1, lo)``, hi:lo = M c0."""
    for _ in range(10):
        wide = 0xD256D193 * c0
        c0, c1 = (wide >> 32) ^ key ^ c1, wide & 0xFFFFFFFF
        key = (key + 0x9E3779B9) & 0xFFFFFFFF
    return c0, c1


def gumbel_label(t_logits: Tensor, seed: int, first_row: int = 0) -> Tensor:
    """``argmax_j t_j - log(-log u_j)``: (..., vocab) -> (...), rows numbered from `first_row`."""
    rows = t_logits.detach().reshape(-1, t_logits.shape[-1]).double()
    key = (seed ^ (seed >> 32)) & 0xFFFFFFFF
    places = [[(j, first_row + i, key) for j in range(rows.shape[1])] for i in range(len(rows))]
    bits = torch.tensor([[philox2x32(*at)[0] >> 9 for at in line] for line in places])
    noise = -torch.log(-torch.log((bits.double() + 0.5) * 2.0**-23))
    return (rows + noise).argmax(-1).reshape(t_logits.shape[:-1])
