"""Pass 1, first read: rows of logits into row states.

Grids are (rows, splits): the first dimension of a grid may pass 65,535. Offsets of rows are 64-bit,
columns inside a tile 32-bit. Only what changes the code is ``constexpr``. Sizes, temperature,
scales and parameters are run-time values, cast here because some callers pass Python floats as
fp64; but the alignment of logits is compiled in, since 16-byte loads depend on it.
"""

# mypy: ignore-errors
# ruff: noqa: RUF005, SIM102
# See math; and `and` evaluates both sides there.

import triton
import triton.language as tl

from bgkernels.backends.triton.extras import absorb_extra
from bgkernels.backends.triton.math import (
    NEG_INF,
    NONE,
    SKIP,
    exp,
    gumbel,
    number,
    numbers,
    real_logits,
    shift,
    tempered,
    times,
)
from bgkernels.backends.triton.state import (
    INDEX,
    NOWHERE,
    SAMPLE,
    empty,
    load_state,
    merge,
    merge_ce,
    merge_label,
    merge_sums,
    one_column,
    store_state,
)


@triton.jit
def column_range(split, blocks, width, BLOCK: tl.constexpr):
    """The columns of one program, from a multiple of BLOCK: Triton widens loads if it sees that."""
    span = blocks * BLOCK
    return split * span, tl.minimum(split * span + span, width)


@triton.jit
def hold(s_row, t_row, local, t_stop, s_cap, t_cap, inv_t, first_column, score,
         HAS_TEACHER: tl.constexpr, SHARED: tl.constexpr, S_MAP: tl.constexpr,
         T_MAP: tl.constexpr):  # fmt: skip
    """``held`` of a column of the tile, empty where it is NONE."""
    found, in_pair = local >= 0, (local >= 0) & (local < t_stop)
    z = real_logits(tl.load(s_row + local, mask=found, other=0.0), s_cap, S_MAP)
    v = tl.full((), NEG_INF, tl.float32)
    if HAS_TEACHER:
        v = real_logits(tl.load(t_row + local, mask=in_pair, other=0.0), t_cap, T_MAP)
        v = tempered(v, inv_t, SHARED)
    return (
        tl.where(found, score, NEG_INF),
        tl.where(found, z, NEG_INF),
        tl.where(in_pair, v, NEG_INF),
        tl.where(found, local + first_column, NONE),
    )


@triton.jit
def load_logits(row, columns, stop, cap, MAP: tl.constexpr):
    """Real logits of a block; anything from ``stop`` on, since a fill value would cost moves."""
    return real_logits(tl.load(row + columns, mask=columns < stop), cap, MAP)


@triton.jit
def is_clean(begin, stop, local, BLOCK: tl.constexpr):
    """Whether a block is whole and without the label, as most are."""
    return (begin + BLOCK <= stop) & ((local < begin) | (local >= begin + BLOCK))


@triton.jit
def first_at(x, m, columns):
    """The lowest of ``columns`` where ``x`` is ``m``."""
    return tl.min(tl.where(x == m, columns, NOWHERE), 0)


@triton.jit
def reduce_pair(u, v, columns, before):
    """``s, t, argmax`` of a block of columns, and ``u-m_s, v-m_t``; -inf takes no part.

    ``before`` are the maxima so far: the index of a smaller one will never be asked for.
    """
    m_s, m_t = tl.max(u, 0), tl.max(v, 0)
    at_s, at_t = tl.full((), NONE, tl.int32), tl.full((), NONE, tl.int32)
    if (m_s >= before[0]) & (m_s > NEG_INF):
        at_s = first_at(u, m_s, columns)
    if (m_t >= before[1]) & (m_t > NEG_INF):
        at_t = first_at(v, m_t, columns)
    du, dv = u - shift(m_s), v - shift(m_t)
    e_s, e_t, x = exp(du), exp(dv), du - dv
    s = (m_s, tl.sum(e_s, 0), tl.sum(times(e_s, du), 0), tl.sum(times(e_s, x), 0))
    t = (m_t, tl.sum(e_t, 0), tl.sum(times(e_t, dv), 0), -tl.sum(times(e_t, x), 0))
    return s, t, (at_s, at_t), du, dv


@triton.jit
def reduce_ce(z):
    """``m_c, d_c`` of a block of columns."""
    m = tl.max(z, 0)
    return m, tl.sum(exp(z - shift(m)), 0)


@triton.jit
def best_column(noisy, columns, first_column, held):
    """Score and column in the tile of the block's best label, NONE if ``held`` is better."""
    best = tl.max(noisy, 0)
    found = tl.full((), NONE, tl.int32)
    if best >= held[0]:
        at = first_at(noisy, best, columns)
        if (best > held[0]) | (held[3] == NONE) | (at + first_column < held[3]):
            found = tl.where(at == NOWHERE, NONE, at)
    return best, found


@triton.jit
def reduce_block(z, v, z_sum, columns, first_column, so_far, parameters, inv_t,
                 SHARED: tl.constexpr, EXTRAS: tl.constexpr):  # fmt: skip
    """The state of a block of compared columns; those that are -inf in both models take no part."""
    u, v = tempered(z, inv_t, SHARED), tempered(v, inv_t, SHARED)
    s, t, at, du, dv = reduce_pair(u, v, columns, (so_far[0][0], so_far[1][0]))
    sums = ()
    for i in tl.static_range(len(EXTRAS)):
        x = absorb_extra(parameters[i], inv_t, u, v, du, dv, (s[0], t[0]), EXTRAS[i][0],
                         EXTRAS[i][1], True)  # fmt: skip
        sums = sums + (x,)
    at_s = tl.where(at[0] == NONE, NONE, at[0] + first_column)
    at_t = tl.where(at[1] == NONE, NONE, at[1] + first_column)
    m_c, d_c, _ = so_far[3]
    if SHARED:
        m_c, d_c = tl.full((), NEG_INF, tl.float32), tl.full((), 0.0, tl.float32)
    else:
        m_c, d_c = reduce_ce(z)
    return s, t, (at_s, at_t), (m_c, d_c, z_sum), (), sums


@triton.jit(
    do_not_specialize=[
        "labels_ptr", "floats_ptr", "ints_ptr", "rows", "blocks", "first_row", "first_column",
        "key", "inv_t", "s_cap", "t_cap", "parameters",
    ]
)  # fmt: skip
def absorb_kernel(
    s_ptr, s_stride, t_ptr, t_stride, labels_ptr, floats_ptr, ints_ptr,
    rows, width, compared, blocks, first_row, first_column, key, inv_t, s_cap, t_cap, parameters,
    HAS_TEACHER: tl.constexpr, SHARED: tl.constexpr, RULE: tl.constexpr, LOGIT_SUM: tl.constexpr,
    S_MAP: tl.constexpr, T_MAP: tl.constexpr, EXTRAS: tl.constexpr, COLUMNS: tl.constexpr,
    RESUME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pass 1: absorb a range of columns of one row, into its state or beside it.

    ``s_ptr (rows, width)``, ``t_ptr (rows, compared)``, ``labels_ptr (rows,)``; with RESUME the
    state ``(·, rows)`` is read and written, else ``(splits, ·, rows)`` is written.
    """
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    given = tl.load(labels_ptr + row)
    if given == SKIP:
        return
    stride = tl.cast(rows, tl.int64)
    floats = floats_ptr + split * COLUMNS * stride + row
    ints = ints_ptr + split * 3 * stride + row
    s_row, t_row = s_ptr + row * s_stride, t_ptr + row * t_stride
    inv_t, first_column = number(inv_t, tl.float32), tl.cast(first_column, tl.int32)
    parameters = numbers(parameters, tl.float32)
    start, stop = column_range(split, blocks, width, BLOCK)
    pair_stop = start
    if HAS_TEACHER:
        pair_stop = tl.maximum(start, tl.minimum(stop, compared))

    local, z_sum = tl.full((), NONE, tl.int32), tl.full((), 0.0, tl.float32)
    total = empty(z_sum, EXTRAS)
    if RESUME:
        total = load_state(floats, ints, stride, None, EXTRAS, tl.float32)
    if RULE == INDEX:
        here = (given >= first_column + start) & (given < first_column + stop)
        local = tl.where(here, given - first_column, NONE).to(tl.int32)
        own = hold(s_row, t_row, local, pair_stop, s_cap, t_cap, inv_t, first_column, 0.0,
                   HAS_TEACHER, SHARED, S_MAP, T_MAP)  # fmt: skip
        s, t, at, ce, held, sums = total
        total = (s, t, at, ce, merge_label(held, own)[0], sums)

    if HAS_TEACHER:
        for begin in range(start, pair_stop, BLOCK):
            columns, held = begin + tl.arange(0, BLOCK), total[4]
            z = load_logits(s_row, columns, pair_stop, s_cap, S_MAP)
            v = load_logits(t_row, columns, pair_stop, t_cap, T_MAP)
            if RULE != INDEX:
                noisy = v
                if RULE == SAMPLE:
                    noisy += gumbel(columns + first_column, first_row + row, key)
                noisy = tl.where(columns < pair_stop, noisy, NEG_INF)
                score, local = best_column(noisy, columns, first_column, held)
                own = hold(s_row, t_row, local, pair_stop, s_cap, t_cap, inv_t, first_column,
                           score, True, SHARED, S_MAP, T_MAP)  # fmt: skip
                held, loser = merge_label(held, own)
            if not is_clean(begin, pair_stop, local, BLOCK):
                keep = (columns < pair_stop) & (columns != local)
                z, v = tl.where(keep, z, NEG_INF), tl.where(keep, v, NEG_INF)
            if LOGIT_SUM:
                keep = (columns < pair_stop) & (columns != local)
                z_sum = tl.sum(tl.where(keep, z, 0.0), 0)
            block = reduce_block(z, v, z_sum, columns, first_column, total, parameters, inv_t,
                                 SHARED, EXTRAS)  # fmt: skip
            total = merge_sums(total, block, held, parameters, inv_t, EXTRAS)
            if RULE != INDEX:
                if loser[2] != NONE:
                    one = one_column(loser, loser[2] != NONE, parameters, inv_t, SHARED, EXTRAS)
                    total = merge_sums(total, one, held, parameters, inv_t, EXTRAS)
    if not SHARED:
        s, t, at, ce, held, sums = total
        for begin in range(pair_stop, stop, BLOCK):
            columns = begin + tl.arange(0, BLOCK)
            z = load_logits(s_row, columns, stop, s_cap, S_MAP)
            if not is_clean(begin, stop, local, BLOCK):
                z = tl.where((columns < stop) & (columns != local), z, NEG_INF)
            if LOGIT_SUM:
                keep = (columns < stop) & (columns != local)
                z_sum = tl.sum(tl.where(keep, z, 0.0), 0)
            ce = merge_ce(ce, reduce_ce(z) + (z_sum,))
        total = (s, t, at, ce, held, sums)
    store_state(floats, ints, stride, None, total, EXTRAS)


@triton.jit(
    do_not_specialize=[
        "floats_ptr", "ints_ptr", "part_floats_ptr", "part_ints_ptr", "labels_ptr", "rows",
        "splits", "inv_t", "parameters",
    ]
)  # fmt: skip
def merge_kernel(
    floats_ptr, ints_ptr, part_floats_ptr, part_ints_ptr, labels_ptr, rows, splits, inv_t,
    parameters,
    SHARED: tl.constexpr, RULE: tl.constexpr, EXTRAS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Merge ``(splits, ·, rows)`` partial states into the state ``(·, rows)``."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = row < rows
    mask &= tl.load(labels_ptr + row, mask=mask, other=SKIP) != SKIP
    stride = tl.cast(rows, tl.int64)
    inv_t, parameters = number(inv_t, tl.float32), numbers(parameters, tl.float32)
    total = load_state(floats_ptr + row, ints_ptr + row, stride, mask, EXTRAS, tl.float32)
    for split in range(splits):
        floats = part_floats_ptr + split * COLUMNS * stride + row
        ints = part_ints_ptr + split * 3 * stride + row
        part = load_state(floats, ints, stride, mask, EXTRAS, tl.float32)
        total = merge(total, part, parameters, inv_t, RULE, SHARED, EXTRAS)
    store_state(floats_ptr + row, ints_ptr + row, stride, mask, total, EXTRAS)
