"""This module restates :mod:`bgkernels.rows.extras` in Triton: all that kernels know of a kind.

A kernel loops over the extras of its specification. The ``i``-th is described by ``EXTRAS[i]``,
``(kind, variant, first row, rows)``, which is compiled in, and by three parameters, which are not:
``numbers`` are ``1/T`` and the parameters of all. For every kind there are, in this
order: what a block of columns (or a single one) adds to the state, how two states merge, what the
second read adds, the statistics, the coefficients of pass 2, what fp32 loses of those, and the
gradient. Functions take fp32 and fp64 alike. Last come the eight functions
that kernels call.
"""

import triton
import triton.language as tl

from bgkernels.backends.triton.math import (
    NEG_INF,
    at_least_0,
    below,
    exp,
    expm1,
    largest,
    log1p,
    log_prob,
    shift,
    sign,
    times,
    total,
)
from bgkernels.rows import extras

TILT, TEMPERED, MIXTURE, TOTAL_VARIATION = (
    tl.constexpr(kind.kind)
    for kind in (extras.Tilt, extras.Tempered, extras.Mixture, extras.TotalVariation)
)
# Variants of a tilt: the signs of (a, b), any, (+, +), (0, +) or (+, 0), and 4 more with moments.
ANY, BOTH, TEACHER, STUDENT = (tl.constexpr(i) for i in range(4))


def variant(extra: extras.Extra) -> int:
    """Return what of the parameters of a statistic is compiled in."""
    if not isinstance(extra, extras.Tilt):
        return 0
    a, b, moments = extra.parameters
    signs = 2 if a == 0 else 3 if b == 0 else 1
    return (0 if min(a, b) < 0 or a == b == 0 else signs) + 4 * int(moments)


@triton.jit
def tilted(parameters, u, v, VARIANT: tl.constexpr):
    """Return ``a·u + b·v``, or -inf where both models mask the column."""
    a, b = parameters[0], parameters[1]
    if VARIANT % 4 == TEACHER:
        return b * v
    elif VARIANT % 4 == STUDENT:
        return a * u
    elif VARIANT % 4 == BOTH:
        return a * u + b * v
    else:
        return tl.where((u == NEG_INF) & (v == NEG_INF), NEG_INF, times(a, u) + times(b, v))


@triton.jit
def tilt_absorb(parameters, pair, maxima, VARIANT: tl.constexpr, SHAPE: tl.constexpr):
    """Return ``m, d, k, q``; the moments ``k, q`` are of ``(u-m_s) - (v-m_t)``."""
    u, v, du, dv = pair
    w = tilted(parameters, u, v, VARIANT)
    if VARIANT % 4 >= TEACHER:  # or STUDENT
        # Rounding is monotone: this is the maximum of w.
        m = tilted(parameters, maxima[0], maxima[1], VARIANT)
    else:
        m = largest(w, SHAPE)
    e, x = exp(w - shift(m)), du - dv
    k, q = tl.zeros_like(m), tl.zeros_like(m)
    if VARIANT >= 4:
        k, q = total(times(e, x), SHAPE), total(times(e, x * x), SHAPE)
    return m, total(e, SHAPE), k, q


@triton.jit
def tilt_merge(a, b, drop_a, drop_b, VARIANT: tl.constexpr):
    """The origin of the moments moves by the difference of the drops."""
    m = tl.maximum(a[0], b[0])
    w_a, w_b = exp(below(a[0], m)), exp(below(b[0], m))
    k, q = a[2], a[3]
    if VARIANT >= 4:
        x, y = drop_a[0] - drop_a[1], drop_b[0] - drop_b[1]
        k = times(w_a, a[2] + times(a[1], x)) + times(w_b, b[2] + times(b[1], y))
        q_a = a[3] + times(a[2], 2 * x) + times(a[1], x * x)
        q_b = b[3] + times(b[2], 2 * y) + times(b[1], y * y)
        q = times(w_a, q_a) + times(w_b, q_b)
    return m, w_a * a[1] + w_b * b[1], k, q


@triton.jit
def tilt_finalize(sums, maxima, VARIANT: tl.constexpr):
    """Return the log-sum-exp, and the moments of ``u - v``."""
    m, d, k, q = sums
    lse = shift(m) + tl.log(d)
    if VARIANT < 4:
        return (lse,)
    else:
        centre, mean = shift(maxima[0]) - shift(maxima[1]), k / d
        return lse, mean + centre, q / d + centre * (2 * mean + centre)


@triton.jit
def tilt_fold(parameters, inv_t, fields, grads, VARIANT: tl.constexpr):
    """Return ``lse, P0, P1, P2``."""
    a, zero = parameters[0], tl.zeros_like(grads[0])
    if VARIANT < 4:
        return fields[0], a * grads[0] * inv_t, zero, zero
    else:
        lse, mean, second = fields
        g_lse, g_mean, g_second = grads
        p0 = a * (g_lse - times(g_mean, mean) - times(g_second, second)) + g_mean
        return lse, p0 * inv_t, (a * g_mean + 2 * g_second) * inv_t, a * g_second * inv_t


@triton.jit
def tilt_narrow(parameters, factors, lse_s, lse_t):
    """Round the factors to fp32; their log-sum-exp becomes a difference, as in narrow_extra."""
    # With exponents as pass 1 had them, since the maxima in the state are not centred.
    a = parameters[0].to(tl.float32).to(tl.float64)
    b = parameters[1].to(tl.float32).to(tl.float64)
    lse = times(a, lse_s) + times(b, lse_t) - factors[0]
    p0, p1, p2 = factors[1].to(tl.float32), factors[2].to(tl.float32), factors[3].to(tl.float32)
    return lse.to(tl.float32), p0, p1, p2


@triton.jit
def tilt_vjp(g, parameters, factors, u, v, lp, lq, VARIANT: tl.constexpr):
    """Add ``e^(a·lp+b·lq+lse)·(P0 + P1·x + P2·x²)``, with ``x = u - v``."""
    if VARIANT != TEACHER:  # else nothing of it depends on the student
        lse, terms, p1, p2 = factors
        if VARIANT >= 4:
            x = u - v
            terms = terms + (p1 + p2 * x) * x
        g += times(exp(tilted(parameters, lp, lq, VARIANT) + lse), terms)
    return g


@triton.jit
def tempered_side(d, h, x):
    """Return ``d, h`` about a maximum that lies ``-x`` higher."""
    weight = exp(x)
    return weight * d, times(weight, h + times(d, x))


@triton.jit
def tempered_absorb(ratio, du, dv, SHAPE: tl.constexpr):
    """Return ``d_s, h_s, d_t, h_t`` about the maxima in the state."""
    x, y = ratio * du, ratio * dv
    p, q = exp(x), exp(y)
    s = total(p, SHAPE), total(times(p, x), SHAPE)
    t = total(q, SHAPE), total(times(q, y), SHAPE)
    return s[0], s[1], t[0], t[1]


@triton.jit
def tempered_merge(ratio, a, b, drop_a, drop_b):
    """Return the sums about the common maxima, from which the drops are ``ratio`` times as far."""
    d_a, h_a = tempered_side(a[0], a[1], ratio * drop_a[0])
    d_b, h_b = tempered_side(b[0], b[1], ratio * drop_b[0])
    x_a, y_a = tempered_side(a[2], a[3], ratio * drop_a[1])
    x_b, y_b = tempered_side(b[2], b[3], ratio * drop_b[1])
    return d_a + d_b, h_a + h_b, x_a + x_b, y_a + y_b


@triton.jit
def tempered_statistics(ratio, m, d, h, m_others, d_others, logit):
    """Return ``lse, entropy, logp, max_prob`` of one model."""
    log_d = tl.log(d)
    lse = ratio * shift(m) + log_d
    rest = times(d_others, exp(ratio * shift(m_others) - lse))
    return lse, at_least_0(log_d - h / d), log_prob(rest, ratio * logit, lse), 1 / d


@triton.jit
def tempered_finalize(ratio, sums, others, maxima, maxima_of_others, label):
    """Return four statistics of each model."""
    d_s, h_s, d_t, h_t = sums
    s = tempered_statistics(ratio, maxima[0], d_s, h_s, maxima_of_others[0], others[0], label[0])
    t = tempered_statistics(ratio, maxima[1], d_t, h_t, maxima_of_others[1], others[2], label[1])
    return s[0], s[1], s[2], s[3], t[0], t[1], t[2], t[3]


@triton.jit
def tempered_fold(parameters, fields, grads, hot):
    """Return ``lse, A, B``, and ``hot`` with what it gains."""
    inverse = 1 / parameters[0]
    a = grads[0] - grads[2] - times(grads[1], fields[1])
    return (fields[0], a * inverse, -grads[1] * inverse), hot + grads[2] * inverse


@triton.jit
def tempered_vjp(ratio, factors, lp):
    """Return ``e^y·(A + B·y)``, with ``y`` the log-probability at the other temperature."""
    y = ratio * lp + factors[0]
    return times(exp(y), factors[1] + factors[2] * y)


@triton.jit
def mixture_terms(lp, lq, omega):
    """Return ``p_t/m``, ``log(p_s/m)``, ``log(p_t/m)`` for ``m = omega·p_t + (1-omega)·p_s``.

    It goes from the side of the larger probability, so that no exponential overflows. NaN where a
    column is masked in both models: their factors are 0 there.
    """
    delta = lq - lp
    teacher = delta > 0
    x = -tl.abs(delta)
    e = exp(x)
    larger = -log1p(tl.where(teacher, 1 - omega, omega) * expm1(x, e))
    ratio = tl.where(teacher, 1.0, e) * exp(larger)
    return ratio, larger + tl.minimum(-delta, 0.0), larger + tl.minimum(delta, 0.0)


@triton.jit
def mixture_read(lp, lq, omega, SHAPE: tl.constexpr):
    """Return ``KL(p_t ‖ m)``, ``KL(p_s ‖ m)`` and ``Σ p_s·p_t/m``."""
    p, q = exp(lp), exp(lq)
    ratio, log_s, log_t = mixture_terms(lp, lq, omega)
    kl_tm, kl_sm = total(times(q, log_t), SHAPE), total(times(p, log_s), SHAPE)
    return kl_tm, kl_sm, total(times(p, ratio), SHAPE)


@triton.jit
def mixture_fold(omega, inv_t, fields, grads):
    """Return ``Y0, Y1, Y2``."""
    kl_sm, overlap, g_tm, g_sm = fields[1], fields[2], grads[0], grads[1]
    y0 = g_tm * (1 - omega) * overlap - g_sm * (omega * overlap + kl_sm)
    return y0 * inv_t, (omega * g_sm - (1 - omega) * g_tm) * inv_t, g_sm * inv_t


@triton.jit
def mixture_vjp(omega, factors, lp, lq):
    """Return ``e^lp·(Y0 + Y1·p_t/m + Y2·log(p_s/m))``."""
    ratio, log_ratio, _ = mixture_terms(lp, lq, omega)
    return times(exp(lp), factors[0] + factors[1] * ratio + factors[2] * log_ratio)


@triton.jit
def variation_read(lp, lq, SHAPE: tl.constexpr):
    """Return ``½ Σ |p_s - p_t|`` and ``Σ p_s·sgn(p_s - p_t)``."""
    p, q = exp(lp), exp(lq)
    return 0.5 * total(tl.abs(p - q), SHAPE), total(p * sign(p - q), SHAPE)


@triton.jit
def variation_fold(inv_t, fields, grads):
    """Return ``V0, V1``."""
    half = 0.5 * grads[0] * inv_t
    return -half * fields[1], half


@triton.jit
def variation_vjp(factors, lp, lq):
    """Return ``e^lp·(V0 + V1·sgn(p_s - p_t))``."""
    p = exp(lp)
    return p * (factors[0] + factors[1] * sign(p - exp(lq)))


@triton.jit
def ratio_of(i: tl.constexpr, numbers):
    """Return what turns logits at the temperature of the rows into logits at another."""
    return 1 / (numbers[0] * numbers[1][i][0])


# What kernels call. A statistic of one read has no sums in the other.


@triton.jit
def empty_extra(i: tl.constexpr, maximum, zero, EXTRAS: tl.constexpr):
    """Return the sums of no column, ``zero``, and the ``maximum`` of none."""
    if EXTRAS[i][0] == TILT:
        return maximum, zero, zero, zero
    elif EXTRAS[i][0] == TEMPERED:
        return zero, zero, zero, zero
    else:
        return ()


@triton.jit
def gather_extra(i: tl.constexpr, sums, EXTRAS: tl.constexpr):
    """Return the sums of all lanes, which have their maximum in common."""
    if EXTRAS[i][0] == TILT and len(sums) > 0:
        return sums[0], tl.sum(sums[1], 0), tl.sum(sums[2], 0), tl.sum(sums[3], 0)
    else:
        out = ()
        for k in tl.static_range(len(sums)):
            out = out + (tl.sum(sums[k], 0),)
        return out


@triton.jit
def absorb_extra(i: tl.constexpr, numbers, pair, maxima, EXTRAS: tl.constexpr, SHAPE: tl.constexpr):
    """Return the sums of a block of columns, or of a single one.

    ``pair`` is ``(u, v, du, dv)``: tempered logits, and how far below their ``maxima`` in the block
    they are.
    """
    if EXTRAS[i][0] == TILT:
        return tilt_absorb(numbers[1][i], pair, maxima, EXTRAS[i][1], SHAPE)
    elif EXTRAS[i][0] == TEMPERED:
        return tempered_absorb(ratio_of(i, numbers), pair[2], pair[3], SHAPE)
    else:
        return ()


@triton.jit
def merge_extra(i: tl.constexpr, numbers, a, b, drop_a, drop_b, EXTRAS: tl.constexpr):
    """Return the sums of a union; drops are how far the old maxima lie below the common ones."""
    if EXTRAS[i][0] == TILT:
        return tilt_merge(a, b, drop_a, drop_b, EXTRAS[i][1])
    elif EXTRAS[i][0] == TEMPERED:
        return tempered_merge(ratio_of(i, numbers), a, b, drop_a, drop_b)
    else:
        return a


@triton.jit
def read_extra(i: tl.constexpr, numbers, lp, lq, EXTRAS: tl.constexpr, SHAPE: tl.constexpr):
    """Return what a block of columns adds in the second read, from both log-probabilities."""
    if EXTRAS[i][0] == MIXTURE:
        return mixture_read(lp, lq, numbers[1][i][0], SHAPE)
    elif EXTRAS[i][0] == TOTAL_VARIATION:
        return variation_read(lp, lq, SHAPE)
    else:
        return ()


@triton.jit
def finalize_extra(
    i: tl.constexpr, numbers, sums, others, maxima, maxima_of_others, label, EXTRAS: tl.constexpr
):
    """Return the statistics; ``others`` are without the label's column, ``label`` its logits."""
    if EXTRAS[i][0] == TILT:
        return tilt_finalize(sums, maxima, EXTRAS[i][1])
    elif EXTRAS[i][0] == TEMPERED:
        ratio = ratio_of(i, numbers)
        return tempered_finalize(ratio, sums, others, maxima, maxima_of_others, label)
    elif EXTRAS[i][0] == MIXTURE:
        return at_least_0(sums[0]), at_least_0(sums[1]), sums[2]
    else:
        return sums


@triton.jit
def fold_extra(i: tl.constexpr, numbers, fields, grads, hot, EXTRAS: tl.constexpr):
    """Return the coefficients, and ``hot`` with what the gradient gains at the label's column."""
    inv_t, parameters = numbers[0], numbers[1][i]
    if EXTRAS[i][0] == TILT:
        return tilt_fold(parameters, inv_t, fields, grads, EXTRAS[i][1]), hot
    elif EXTRAS[i][0] == TEMPERED:
        return tempered_fold(parameters, fields, grads, hot)
    elif EXTRAS[i][0] == MIXTURE:
        return mixture_fold(parameters[0], inv_t, fields, grads), hot
    else:
        return variation_fold(inv_t, fields, grads), hot


@triton.jit
def narrow_extra(i: tl.constexpr, numbers, factors, lse_s, lse_t, mend, EXTRAS: tl.constexpr):
    """Round the coefficients to fp32; all is fp64 here but ``mend``.

    Log-sum-exps become differences from ``lse_s, lse_t`` as the kernel has them, rounded, and keep
    their digits; by ``mend``, ``e^lp`` is too small there.
    """
    if EXTRAS[i][0] == TILT:
        return tilt_narrow(numbers[1][i], factors, lse_s, lse_t)
    elif EXTRAS[i][0] == TEMPERED:
        lse = ratio_of(i, numbers) * lse_s - factors[0]
        return lse.to(tl.float32), factors[1].to(tl.float32), factors[2].to(tl.float32)
    else:
        mended = ()
        for i in tl.static_range(len(factors)):
            mended = mended + (factors[i].to(tl.float32) * mend,)
        return mended


@triton.jit
def vjp_extra(i: tl.constexpr, numbers, g, factors, pair, EXTRAS: tl.constexpr):
    """Add the gradient in ``u`` of a block of compared columns, ``pair = (u, v, lp, lq)``."""
    u, v, lp, lq = pair
    if EXTRAS[i][0] == TILT:
        return tilt_vjp(g, numbers[1][i], factors, u, v, lp, lq, EXTRAS[i][1])
    elif EXTRAS[i][0] == TEMPERED:
        return g + tempered_vjp(ratio_of(i, numbers), factors, lp)
    elif EXTRAS[i][0] == MIXTURE:
        return g + mixture_vjp(numbers[1][i][0], factors, lp, lq)
    else:
        return g + variation_vjp(factors, lp, lq)
