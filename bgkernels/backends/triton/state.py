"""This module restates :mod:`bgkernels.rows.state` in Triton, function for function.

The functions work on scalars and on blocks of rows, in fp32 and fp64: one :func:`merge` joins the
blocks of a row, the programs that share a row, and the tiles of a vocabulary. Inside a kernel, a
state is the tuple ``(s, t, argmax, ce, held, extras)`` with ``s = (m, d, h, k)`` and its mirror
``t``, ``argmax = (argmax_s, argmax_t)``, ``ce = (m_c, d_c, z_sum)``,
``held = (score, z_y, v_y, label)``, and a tuple of sums for each extra.

``EXTRAS`` and ``numbers`` are those of :mod:`.extras`. A statistic has no rows in a kernel of the
other read.
"""

import triton
import triton.language as tl

from bgkernels.backends.triton.extras import (
    absorb_extra,
    empty_extra,
    gather_extra,
    merge_extra,
)
from bgkernels.backends.triton.math import NEG_INF, NONE, below, exp, shift, tempered, times
from bgkernels.rows import spec

NOWHERE = tl.constexpr(2**31 - 1)  # beyond every column
INDEX, ARGMAX, SAMPLE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # label rules
FLOATS = tl.constexpr(len(spec.FLOATS))


@triton.jit
def load_columns(ptr, stride, FIRST: tl.constexpr, COUNT: tl.constexpr, mask, DTYPE: tl.constexpr):
    """Load a tuple of rows of a matrix ``(·, rows)``, for one row of logits or a block of them."""
    values = ()
    for i in tl.static_range(FIRST, FIRST + COUNT):
        value = tl.load(ptr + i * tl.cast(stride, tl.int64), mask=mask)
        values = values + (value.to(DTYPE),)
    return values


@triton.jit
def load_extras(ptr, stride, mask, EXTRAS: tl.constexpr, DTYPE: tl.constexpr):
    """Load a tuple of columns for each extra statistic."""
    extras = ()
    for i in tl.static_range(len(EXTRAS)):
        extras = extras + (load_columns(ptr, stride, EXTRAS[i][2], EXTRAS[i][3], mask, DTYPE),)
    return extras


@triton.jit
def store_extras(ptr, stride, mask, extras, EXTRAS: tl.constexpr):
    """Store what :func:`load_extras` loads."""
    for i in tl.static_range(len(EXTRAS)):
        for k in tl.static_range(len(extras[i])):
            tl.store(ptr + (EXTRAS[i][2] + k) * stride, extras[i][k], mask=mask)


@triton.jit
def load_state(floats, ints, stride, mask, EXTRAS: tl.constexpr, DTYPE: tl.constexpr):
    """Load a state from ``(14 + ·, rows)`` and ``(3, rows)``, by pointers to the row."""
    x = load_columns(floats, stride, 0, FLOATS, mask, DTYPE)
    label, at_s, at_t = load_columns(ints, stride, 0, 3, mask, tl.int32)
    sums = load_extras(floats, stride, mask, EXTRAS, DTYPE)
    return x[0:4], x[4:8], (at_s, at_t), x[8:11], (x[11], x[12], x[13], label), sums


@triton.jit
def store_state(floats, ints, stride, mask, value, EXTRAS: tl.constexpr):
    """Store what :func:`load_state` loads."""
    s, t, at, ce, held, sums = value
    columns = s + t + ce + (held[0], held[1], held[2])
    for i in tl.static_range(FLOATS):
        tl.store(floats + i * stride, columns[i], mask=mask)
    store_extras(floats, stride, mask, sums, EXTRAS)
    tl.store(ints, held[3].to(tl.int64), mask=mask)
    tl.store(ints + stride, at[0].to(tl.int64), mask=mask)
    tl.store(ints + 2 * stride, at[1].to(tl.int64), mask=mask)


@triton.jit
def empty(zero, EXTRAS: tl.constexpr):
    """Return the state of no column, whose sums have the shape and dtype of ``zero``."""
    inf, none = tl.full((), NEG_INF, zero.dtype), tl.full((), NONE, tl.int32)
    side, sums = (inf, zero, zero, zero), ()
    for i in tl.static_range(len(EXTRAS)):
        sums = sums + (empty_extra(i, inf, zero, EXTRAS),)
    return side, side, (none, none), (inf, zero, zero), (inf, inf, inf, none), sums


@triton.jit
def gathered(state, EXTRAS: tl.constexpr):
    """Return a state whose sums, one for each lane, are added up; all are about the same maxima."""
    s, t, at, ce, held, extras = state
    sums = ()
    for i in tl.static_range(len(EXTRAS)):
        sums = sums + (gather_extra(i, extras[i], EXTRAS),)
    return (
        (s[0], tl.sum(s[1], 0), tl.sum(s[2], 0), tl.sum(s[3], 0)),
        (t[0], tl.sum(t[1], 0), tl.sum(t[2], 0), tl.sum(t[3], 0)),
        at,
        (ce[0], tl.sum(ce[1], 0), tl.sum(ce[2], 0)),
        held,
        sums,
    )


@triton.jit
def recentred(side, drop, gap):
    """Return ``d, h, k`` about a maximum that is ``-drop`` higher; ``u - v`` gains ``gap``."""
    _, d, h, k = side
    weight = exp(drop)
    return weight * d, times(weight, h + times(d, drop)), times(weight, k + times(d, gap))


@triton.jit
def merge_side(a, b, drop_a, drop_b, gap_a, gap_b):
    """Return ``m, d, h, k`` of one model; drops and gaps are those of :func:`recentred`."""
    x, y = recentred(a, drop_a, gap_a), recentred(b, drop_b, gap_b)
    return tl.maximum(a[0], b[0]), x[0] + y[0], x[1] + y[1], x[2] + y[2]


@triton.jit
def merge_argmax(m_a, at_a, m_b, at_b):
    """Return the column of the larger maximum; of equal ones, the lower column."""
    tie = (m_a == m_b) & (at_a != NONE) & (at_b != NONE)
    return tl.where(tie, tl.minimum(at_a, at_b), tl.where(m_a > m_b, at_a, at_b))


@triton.jit
def merge_ce(a, b):
    """Return ``m_c, d_c, z_sum`` of a union."""
    m = tl.maximum(a[0], b[0])
    d = exp(below(a[0], m)) * a[1] + exp(below(b[0], m)) * b[1]
    return m, d, a[2] + b[2]


@triton.jit
def merge_sums(a, b, held, numbers, EXTRAS: tl.constexpr):
    """Return the state of a union, whose label is ``held``."""
    s_a, t_a, at_a, ce_a, _, extras_a = a
    s_b, t_b, at_b, ce_b, _, extras_b = b
    m_s, m_t = tl.maximum(s_a[0], s_b[0]), tl.maximum(t_a[0], t_b[0])
    drop_a = below(s_a[0], m_s), below(t_a[0], m_t)
    drop_b = below(s_b[0], m_s), below(t_b[0], m_t)
    sums = ()
    for i in tl.static_range(len(EXTRAS)):
        x = merge_extra(i, numbers, extras_a[i], extras_b[i], drop_a, drop_b, EXTRAS)
        sums = sums + (x,)
    gap_a, gap_b = drop_a[0] - drop_a[1], drop_b[0] - drop_b[1]
    return (
        merge_side(s_a, s_b, drop_a[0], drop_b[0], gap_a, gap_b),
        merge_side(t_a, t_b, drop_a[1], drop_b[1], -gap_a, -gap_b),
        (
            merge_argmax(s_a[0], at_a[0], s_b[0], at_b[0]),
            merge_argmax(t_a[0], at_a[1], t_b[0], at_b[1]),
        ),
        merge_ce(ce_a, ce_b),
        held,
        sums,
    )


@triton.jit
def merge_label(a, b):
    """Return ``held`` of a union, and ``(z, v, label)`` of the loser; ties go to the lower one."""
    score_a, z_a, v_a, at_a = a
    score_b, z_b, v_b, at_b = b
    lower = (at_a != NONE) & ((at_a < at_b) | (at_b == NONE))
    first = (score_a > score_b) | ((score_a == score_b) & lower)
    held = (
        tl.where(first, score_a, score_b),
        tl.where(first, z_a, z_b),
        tl.where(first, v_a, v_b),
        tl.where(first, at_a, at_b),
    )
    return held, (
        tl.where(first, z_b, z_a),
        tl.where(first, v_b, v_a),
        tl.where(first, at_b, at_a),
    )


@triton.jit
def one_column(column, compared, numbers, SHARED: tl.constexpr, EXTRAS: tl.constexpr):
    """Return the state of a single column ``(z, v, index)``; empty where the index is NONE."""
    z, v, at = column
    compared &= at >= 0
    u = tl.where(compared, tempered(z, numbers[0], SHARED), NEG_INF)
    v = tl.where(compared, v, NEG_INF)
    du, dv = u - shift(u), v - shift(v)
    e_s, e_t = exp(du), exp(dv)
    z_sum = tl.where(at >= 0, z, 0.0)
    ce = (tl.zeros_like(z) + NEG_INF, tl.zeros_like(z), z_sum)
    if not SHARED:
        ce = (tl.where(at >= 0, z, NEG_INF), tl.where(at >= 0, exp(z - shift(z)), 0.0), z_sum)
    pair, sums = (u, v, du, dv), ()
    for i in tl.static_range(len(EXTRAS)):
        sums = sums + (absorb_extra(i, numbers, pair, (u, v), EXTRAS, ()),)
    s = (u, e_s, times(e_s, du), times(e_s, du - dv))
    t = (v, e_t, times(e_t, dv), times(e_t, dv - du))
    at = tl.where(compared, at, NONE)
    return s, t, (at, at), ce, (), sums


@triton.jit
def merge(a, b, numbers, RULE: tl.constexpr, SHARED: tl.constexpr, EXTRAS: tl.constexpr):
    """Return the state of a union of disjoint sets of columns; the losing label is absorbed."""
    held, loser = merge_label(a[4], b[4])
    out = merge_sums(a, b, held, numbers, EXTRAS)
    if RULE != INDEX:
        column = one_column(loser, loser[2] >= 0, numbers, SHARED, EXTRAS)
        out = merge_sums(out, column, held, numbers, EXTRAS)
    return out
