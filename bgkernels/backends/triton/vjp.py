"""Pass 2 writes the gradient in the student's logits, a range of columns of one row a program.

Grids and arguments are as in :mod:`.absorb`.
"""

import triton
import triton.language as tl

from bgkernels.backends.triton.absorb import column_range
from bgkernels.backends.triton.code import load_alone, load_pair
from bgkernels.backends.triton.extras import narrow_extra, vjp_extra
from bgkernels.backends.triton.math import (
    CAPPED,
    LOGITS,
    RAW,
    SKIP,
    exp,
    kernel,
    numbers_of,
    tempered,
    times,
)
from bgkernels.backends.triton.state import load_columns, load_extras
from bgkernels.rows import spec

COEFFICIENTS = tl.constexpr(len(spec.COEFFICIENTS))


@triton.jit
def narrowed(factor, mend):
    """Round an fp64 coefficient to fp32, and multiply it with what its exponential lacks."""
    return factor.to(tl.float32) * mend


@triton.jit
def load_coefficients(ptr, stride, parameters, inv_t, EXTRAS: tl.constexpr):
    """Load the coefficients of one row, and round them to fp32.

    A log-sum-exp of hundreds loses digits there; what it loses is moved into the factors.
    """
    exact_s, exact_t, exact_c, a, b, c, d, h, m, a_y, d_y, h_y, hot = load_columns(
        ptr, stride, 0, COEFFICIENTS, None, tl.float64
    )
    lse_s, lse_t, lse_c = exact_s.to(tl.float32), exact_t.to(tl.float32), exact_c.to(tl.float32)
    lost_s, lost_t = (lse_s - exact_s).to(tl.float32), (lse_t - exact_t).to(tl.float32)
    mend_s, mend_t, mend_c = exp(lost_s), exp(lost_t), exp((lse_c - exact_c).to(tl.float32))
    bend = b.to(tl.float32) * lost_s - c.to(tl.float32) * lost_t
    rounded_s, rounded_t = lse_s.to(tl.float64), lse_t.to(tl.float64)
    numbers = numbers_of(inv_t, parameters, tl.float64)
    exact, factors = load_extras(ptr, stride, None, EXTRAS, tl.float64), ()
    for i in tl.static_range(len(EXTRAS)):
        x = narrow_extra(i, numbers, exact[i], rounded_s, rounded_t, mend_s, EXTRAS)
        factors = factors + (x,)
    pair = (
        (a.to(tl.float32) + bend) * mend_s, narrowed(b, mend_s), narrowed(c, mend_s),
        narrowed(d, mend_t), (a_y.to(tl.float32) + bend) * mend_s, narrowed(d_y, mend_t),
    )  # fmt: skip
    ce = lse_c, narrowed(h, mend_c), narrowed(h_y, mend_c), m.to(tl.float32), hot.to(tl.float32)
    return lse_s, lse_t, pair, ce, factors


@triton.jit
def vjp_line(lp, lq, a, b, c, d):
    """Return ``e^lp·(A + B·lp - C·lq) - D·e^lq``, the gradient over compared columns."""
    p = exp(lp)
    # Where p is not 0, lp is finite, so that lq alone needs the rule 0·(±inf) = 0.
    slope = tl.where(p == 0, 0.0, b * lp - times(c, lq))
    return (a + slope) * p - times(d, exp(lq))


@triton.jit
def store_gradient(out_row, columns, stop, local, begin, z, g, ce, cap, SHARED: tl.constexpr,
                   MAP: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
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
    if MAP == CAPPED:
        ratio = z * (1 / tl.cast(cap[1], tl.float32))
        g *= 1 - ratio * ratio
    if MAP != RAW:
        g *= tl.cast(cap[0], tl.float32)
    tl.store(out_row + columns, g, mask=columns < stop)


@kernel(LOGITS)
def vjp_kernel(
    out_ptr, out_stride, s_ptr, s_stride, t_ptr, t_stride, code_ptr, code_stride, centres_ptr,
    centres_stride, coefficients_ptr, labels_ptr,
    rows, width, compared, blocks, first_column, inv_t, s_cap, t_cap, parameters,
    HAS_TEACHER: tl.constexpr, SHARED: tl.constexpr, MAPS: tl.constexpr, EXTRAS: tl.constexpr,
    CODED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradient of a range of columns of one row.

    ``out_ptr (rows, width)`` may be ``s_ptr``: an element is read and written by the same program,
    in that order. ``coefficients_ptr (·, rows)`` is fp64, ``labels_ptr (rows,)`` int64.
    """
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, stop = column_range(split, blocks, width, BLOCK)
    s_row, t_row = s_ptr + row * s_stride, t_ptr + row * t_stride
    word_row, centre_row = code_ptr + row * code_stride, centres_ptr + row * centres_stride
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
    numbers = numbers_of(inv_t, parameters, tl.float32)
    if HAS_TEACHER:
        for begin in range(start, pair_stop, BLOCK):
            columns = begin + tl.arange(0, BLOCK)
            z, v = load_pair(s_row, t_row, word_row, centre_row, columns, begin, pair_stop, s_cap,
                             t_cap, MAPS, CODED, BLOCK)  # fmt: skip
            u, v = tempered(z, numbers[0], SHARED), tempered(v, numbers[0], SHARED)
            lp, lq = u - lse_s, v - lse_t
            g = vjp_line(lp, lq, a, b, c, d)
            if (local >= begin) & (local < begin + BLOCK):
                g = tl.where(columns == local, vjp_line(lp, lq, a_y, b, c, d_y), g)
            for i in tl.static_range(len(EXTRAS)):
                g = vjp_extra(i, numbers, g, factors[i], (u, v, lp, lq), EXTRAS)
            store_gradient(out_row, columns, pair_stop, local, begin, z, g, ce, s_cap, SHARED,
                           MAPS[0], BLOCK)  # fmt: skip
    if not SHARED:
        for begin in range(pair_stop, stop, BLOCK):
            columns = begin + tl.arange(0, BLOCK)
            z = load_alone(s_row, word_row, columns, stop, s_cap, MAPS, CODED)
            g = tl.zeros_like(z)
            store_gradient(out_row, columns, stop, local, begin, z, g, ce, s_cap, SHARED,
                           MAPS[0], BLOCK)  # fmt: skip
