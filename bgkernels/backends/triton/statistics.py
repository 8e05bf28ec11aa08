"""Between the passes, states become statistics, and derivatives coefficients, in fp64.

A program works on a block of rows. ``EXTRAS`` say where the sums, or the fields, of each extra are
in what is read; what is written is in order.
"""

import triton
import triton.language as tl

from bgkernels.backends.triton.extras import finalize_extra, fold_extra
from bgkernels.backends.triton.math import (
    NEG_INF,
    SKIP,
    at_least_0,
    exp,
    kernel,
    log_prob,
    numbers_of,
    shift,
    times,
)
from bgkernels.backends.triton.state import (
    load_columns,
    load_extras,
    load_state,
    merge_sums,
    one_column,
)
from bgkernels.rows import spec

FIELDS = tl.constexpr(len(spec.FIELDS))


@triton.jit
def softmax_of(m, d, m_others, d_others):
    """Return ``lse``, ``log d``, and the probability outside the label."""
    log_d = tl.log(d)
    lse = shift(m) + log_d
    return lse, log_d, times(d_others, exp(shift(m_others) - lse))


@triton.jit
def compared_fields(s, t, s_others, t_others, u, v):
    """Return the fields of both softmaxes, and what these give to columns other than the label's.

    ``u, v`` are the label's logits, -inf where not compared.
    """
    lse_s, log_s, rest_s = softmax_of(s[0], s[1], s_others[0], s_others[1])
    lse_t, log_t, rest_t = softmax_of(t[0], t[1], t_others[0], t_others[1])
    return (
        lse_s, lse_t, at_least_0(log_s - s[2] / s[1]), at_least_0(log_t - t[2] / t[1]),
        at_least_0(t[3] / t[1] + log_s - log_t), at_least_0(s[3] / s[1] + log_t - log_s),
        log_prob(rest_s, u, lse_s), log_prob(rest_t, v, lse_t), 1 / s[1], 1 / t[1],
    ), rest_s, rest_t  # fmt: skip


@kernel()
def finalize_kernel(
    floats_ptr, ints_ptr, labels_ptr, out_ptr, out_stride, rows, columns, compared, inv_t,
    parameters, HAS_TEACHER: tl.constexpr, SHARED: tl.constexpr, EXTRAS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the statistics ``(fields, rows)`` of states ``(·, rows)`` and ``(3, rows)``.

    The integers of the state become those of all columns, the label's too.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = row < rows
    keep = tl.load(labels_ptr + row, mask=mask, other=SKIP) != SKIP
    numbers = numbers_of(inv_t, parameters, tl.float64)
    others = load_state(floats_ptr + row, ints_ptr + row, rows, mask, EXTRAS, tl.float64)
    z, v, label = others[4][1], others[4][2], others[4][3]
    in_pair = (label >= 0) & (label < compared)
    u = tl.where(in_pair, z * numbers[0], NEG_INF)
    column = one_column((z, v, label), in_pair, numbers, SHARED, EXTRAS)
    whole = merge_sums(others, column, (), numbers, EXTRAS)

    at = ints_ptr + row
    tl.store(at, tl.where(keep, label, SKIP).to(tl.int64), mask=mask)
    tl.store(at + rows, whole[2][0].to(tl.int64), mask=mask)
    tl.store(at + 2 * tl.cast(rows, tl.int64), whole[2][1].to(tl.int64), mask=mask)
    zero = tl.zeros_like(z)
    pair, rest_s, rest_t = (zero, zero, zero, zero, zero, zero, zero, zero, zero, zero), zero, zero
    if HAS_TEACHER:
        pair, rest_s, rest_t = compared_fields(whole[0], whole[1], others[0], others[1], u, v)
    lse_c, nll, rest_c = pair[0], -pair[6], rest_s
    if not SHARED:
        lse_c, _, rest_c = softmax_of(whole[3][0], whole[3][1], others[3][0], others[3][1])
        nll = -log_prob(rest_c, z, lse_c)
    # A label that no column has is a bad one that could not be refused: it must not look plausible.
    lost = tl.where(label < 0, NEG_INF - NEG_INF, zero)
    fields = ()
    for i in tl.static_range(len(pair)):
        fields = fields + (pair[i] + lost,)
    mean = whole[3][2] / columns
    maxima, maxima_of_others = (whole[0][0], whole[1][0]), (others[0][0], others[1][0])
    fields = fields + (nll + lost, lse_c + lost, mean + lost, rest_s, rest_t, rest_c)
    for i in tl.static_range(len(EXTRAS)):
        fields = fields + finalize_extra(
            i, numbers, whole[5][i], others[5][i], maxima, maxima_of_others, (u, v), EXTRAS
        )
    for i in tl.static_range(len(fields)):
        at = out_ptr + i * tl.cast(out_stride, tl.int64) + row
        tl.store(at, tl.where(keep, fields[i], 0.0), mask=mask)


@kernel()
def fold_kernel(
    statistics_ptr, statistics_stride, grads_ptr, grads_stride, out_ptr, rows, columns, inv_t,
    parameters, SHARED: tl.constexpr, EXTRAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the coefficients ``(·, rows)`` of two matrices ``(fields, rows)``."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = row < rows
    s_ptr, g_ptr = statistics_ptr + row, grads_ptr + row
    numbers = numbers_of(inv_t, parameters, tl.float64)
    inv = numbers[0]
    s = load_columns(s_ptr, statistics_stride, 0, FIELDS, mask, tl.float64)
    g = load_columns(g_ptr, grads_stride, 0, FIELDS, mask, tl.float64)
    lse_s, lse_t, entropy_s, _, _, kl_st, _, _, _, _, _, lse_c, _, rest_s, rest_t, rest_c = s
    g_lse, _, g_entropy, _, g_kl_ts, g_kl_st, g_logp, _, _, _, g_nll, g_lse_c, g_mean, _, _, _ = g
    a_y = (g_lse - times(g_entropy, entropy_s) - times(g_kl_st, kl_st)) * inv
    a = a_y + (g_kl_ts - g_logp) * inv
    h, h_y = g_lse_c + g_nll, g_lse_c
    zero = tl.zeros_like(h)
    hot = (times(g_logp, rest_s) + times(g_kl_ts, rest_t - rest_s)) * inv - times(g_nll, rest_c)
    if SHARED:
        a, a_y, h, h_y = a + h, a_y + h_y, zero, zero
    fields = load_extras(s_ptr, statistics_stride, mask, EXTRAS, tl.float64)
    grads = load_extras(g_ptr, grads_stride, mask, EXTRAS, tl.float64)
    factors = ()
    for i in tl.static_range(len(EXTRAS)):
        x, hot = fold_extra(i, numbers, fields[i], grads[i], hot, EXTRAS)
        factors = factors + x
    row_factors = (lse_s, lse_t, lse_c, a, (g_kl_st - g_entropy) * inv, g_kl_st * inv,
                   g_kl_ts * inv, h, g_mean / columns, a_y, zero, h_y, hot)  # fmt: skip
    factors = row_factors + factors
    for i in tl.static_range(len(factors)):
        tl.store(out_ptr + i * tl.cast(rows, tl.int64) + row, factors[i], mask=mask)
