"""Pass 2: the gradient in the student's logits, of a range of columns of one row a program."""

# mypy: ignore-errors
# ruff: noqa: RUF005
# See math; the conventions of grids and arguments are those of absorb.

import triton
import triton.language as tl

from bgkernels.backends.triton.absorb import column_range, load_logits
from bgkernels.backends.triton.extras import narrow_extra, vjp_extra
from bgkernels.backends.triton.math import (
    CAPPED,
    RAW,
    SKIP,
    exp,
    number,
    numbers,
    tempered,
    times,
)
from bgkernels.backends.triton.state import load_columns
from bgkernels.rows import spec

COEFFICIENTS = tl.constexpr(len(spec.COEFFICIENTS))


@triton.jit
def narrowed(factor, mend):
    """An fp64 coefficient in fp32, times what its exponential lacks."""
    return factor.to(tl.float32) * mend


@triton.jit
def load_coefficients(ptr, stride, parameters, inv_t, EXTRAS: tl.constexpr):
    """The coefficients of one row in fp32, from fp64.

    A log-sum-exp of hundreds loses digits there; what it loses is moved into the factors.
    ``EXTRAS`` are ``(kind, variant, first, count)``, as in the state.
    """
    wide_s, wide_t, wide_c, a, b, c, d, h, m, a_y, d_y, h_y, hot = load_columns(
        ptr, stride, 0, COEFFICIENTS, None, tl.float64
    )
    lse_s, lse_t, lse_c = wide_s.to(tl.float32), wide_t.to(tl.float32), wide_c.to(tl.float32)
    lost_s, lost_t = (lse_s - wide_s).to(tl.float32), (lse_t - wide_t).to(tl.float32)
    mend_s, mend_t, mend_c = exp(lost_s), exp(lost_t), exp((lse_c - wide_c).to(tl.float32))
    bend = b.to(tl.float32) * lost_s - c.to(tl.float32) * lost_t
    lse_wide_s, lse_wide_t = lse_s.to(tl.float64), lse_t.to(tl.float64)
    wide, wide_inv_t = numbers(parameters, tl.float64), number(inv_t, tl.float64)
    factors = ()
    for i in tl.static_range(len(EXTRAS)):
        x = load_columns(ptr, stride, EXTRAS[i][2], EXTRAS[i][3], None, tl.float64)
        x = narrow_extra(wide[i], wide_inv_t, x, lse_wide_s, lse_wide_t, mend_s, EXTRAS[i][0])
        factors = factors + (x,)
    pair = (
        (a.to(tl.float32) + bend) * mend_s, narrowed(b, mend_s), narrowed(c, mend_s),
        narrowed(d, mend_t), (a_y.to(tl.float32) + bend) * mend_s, narrowed(d_y, mend_t),
    )  # fmt: skip
    ce = lse_c, narrowed(h, mend_c), narrowed(h_y, mend_c), m.to(tl.float32), hot.to(tl.float32)
    return lse_s, lse_t, pair, ce, factors


@triton.jit
def vjp_line(lp, lq, a, b, c, d):
    """``e^lp·(A + B·lp - C·lq) - D·e^lq``: the gradient over compared columns."""
    p = exp(lp)
    # Where p is not 0, lp is finite, so that lq alone needs the rule 0·(±inf) = 0.
    slope = tl.where(p == 0, 0.0, b * lp - times(c, lq))
    return (a + slope) * p - times(d, exp(lq))


@triton.jit
def store_gradient(out_row, columns, stop, local, begin, z, g, ce, s_cap, SHARED: tl.constexpr,
                   S_MAP: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Add the gradient through the cross-entropy, go back through the soft-cap, and store."""
    lse_c, h, h_y, m, hot = ce
    g += m
    if not SHARED:
        e = exp(z - lse_c)
        x = times(h, e)
        if (local >= begin) & (local < begin + BLOCK):
            x = tl.where(columns == local, times(h_y, e), x)
        g += x
    if (local >= begin) & (local < begin + BLOCK):
        g += tl.where(columns == local, hot, 0.0)
    if S_MAP == CAPPED:
        ratio = z * (1 / tl.cast(s_cap[1], tl.float32))
        g *= 1 - ratio * ratio
    if S_MAP != RAW:
        g *= tl.cast(s_cap[0], tl.float32)
    tl.store(out_row + columns, g, mask=columns < stop)


@triton.jit(
    do_not_specialize=[
        "coefficients_ptr", "labels_ptr", "rows", "blocks", "first_column", "inv_t", "s_cap",
        "t_cap", "parameters",
    ]
)  # fmt: skip
def vjp_kernel(
    out_ptr, out_stride, s_ptr, s_stride, t_ptr, t_stride, coefficients_ptr, labels_ptr,
    rows, width, compared, blocks, first_column, inv_t, s_cap, t_cap, parameters,
    HAS_TEACHER: tl.constexpr, SHARED: tl.constexpr, S_MAP: tl.constexpr, T_MAP: tl.constexpr,
    EXTRAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pass 2.

    ``out_ptr (rows, width)`` may be ``s_ptr``: an element is read and written by the same program,
    in that order. ``coefficients_ptr (·, rows)`` is fp64, ``labels_ptr (rows,)`` int64.
    """
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, stop = column_range(split, blocks, width, BLOCK)
    s_row, t_row = s_ptr + row * s_stride, t_ptr + row * t_stride
    out_row = out_ptr + row * out_stride
    label = tl.load(labels_ptr + row)
    if label == SKIP:
        for begin in range(start, stop, BLOCK):
            columns = begin + tl.arange(0, BLOCK)
            tl.store(out_row + columns, tl.zeros((BLOCK,), tl.float32), mask=columns < stop)
        return
    local = (label - first_column).to(tl.int32)
    pair_stop = start
    if HAS_TEACHER:
        pair_stop = tl.maximum(start, tl.minimum(stop, compared))
    lse_s, lse_t, pair, ce, factors = load_coefficients(
        coefficients_ptr + row, rows, parameters, inv_t, EXTRAS
    )
    a, b, c, d, a_y, d_y = pair
    inv_t, parameters = number(inv_t, tl.float32), numbers(parameters, tl.float32)
    if HAS_TEACHER:
        for begin in range(start, pair_stop, BLOCK):
            columns = begin + tl.arange(0, BLOCK)
            z = load_logits(s_row, columns, pair_stop, s_cap, S_MAP)
            v = tempered(load_logits(t_row, columns, pair_stop, t_cap, T_MAP), inv_t, SHARED)
            u = tempered(z, inv_t, SHARED)
            lp, lq = u - lse_s, v - lse_t
            g = vjp_line(lp, lq, a, b, c, d)
            if (local >= begin) & (local < begin + BLOCK):
                g = tl.where(columns == local, vjp_line(lp, lq, a_y, b, c, d_y), g)
            for i in tl.static_range(len(EXTRAS)):
                g = vjp_extra(g, parameters[i], inv_t, factors[i], u, v, lp, lq, EXTRAS[i][0],
                              EXTRAS[i][1])  # fmt: skip
            store_gradient(out_row, columns, pair_stop, local, begin, z, g, ce, s_cap, SHARED,
                           S_MAP, BLOCK)  # fmt: skip
    if not SHARED:
        for begin in range(pair_stop, stop, BLOCK):
            columns = begin + tl.arange(0, BLOCK)
            z = load_logits(s_row, columns, stop, s_cap, S_MAP)
            store_gradient(out_row, columns, stop, local, begin, z, tl.zeros_like(z), ce, s_cap,
                           SHARED, S_MAP, BLOCK)  # fmt: skip
