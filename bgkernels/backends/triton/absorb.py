"""The first read of pass 1 turns rows of logits into row states.

Grids are (rows, splits): the first dimension of a grid may pass 65,535. Offsets of rows are 64-bit,
columns inside a tile 32-bit. Only what changes the code is ``constexpr``. Sizes, temperature,
scales and parameters are run-time values, cast here because some callers pass Python floats as
fp64; but the alignment of logits is compiled in, since 16-byte loads depend on it.
"""

import triton
import triton.language as tl

from bgkernels.backends.triton.code import store_pair
from bgkernels.backends.triton.extras import absorb_extra
from bgkernels.backends.triton.math import (
    LOGITS,
    NEG_INF,
    NONE,
    SKIP,
    exp,
    gumbel,
    kernel,
    numbers_of,
    real_logits,
    shift,
    tempered,
    times,
    total,
)
from bgkernels.backends.triton.state import (
    INDEX,
    NOWHERE,
    SAMPLE,
    empty,
    gathered,
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
    """Return a program's columns, from a multiple of BLOCK: Triton widens loads if it sees that."""
    span = blocks * BLOCK
    return split * span, tl.minimum(split * span + span, width)


@triton.jit
def hold(rows, local, t_stop, caps, inv_t, first_column, score, TEACHER: tl.constexpr,
         SHARED: tl.constexpr, MAPS: tl.constexpr):  # fmt: skip
    """Read the ``held`` tuple of a column of the tile, empty where the column is NONE.

    ``rows`` and ``caps`` are those of student and teacher.
    """
    present, in_pair = local >= 0, (local >= 0) & (local < t_stop)
    z = real_logits(tl.load(rows[0] + local, mask=present, other=0.0), caps[0], MAPS[0])
    v = tl.full((), NEG_INF, tl.float32)
    if TEACHER:
        v = real_logits(tl.load(rows[1] + local, mask=in_pair, other=0.0), caps[1], MAPS[1])
        v = tempered(v, inv_t, SHARED)
    return (
        tl.where(present, score, NEG_INF),
        tl.where(present, z, NEG_INF),
        tl.where(in_pair, v, NEG_INF),
        tl.where(present, local + first_column, NONE),
    )


@triton.jit
def load_logits(row, columns, stop, cap, MAP: tl.constexpr):
    """Load real logits of a block; from ``stop`` on, anything: a fill value would cost moves."""
    return real_logits(tl.load(row + columns, mask=columns < stop), cap, MAP)


@triton.jit
def is_clean(begin, stop, local, BLOCK: tl.constexpr):
    """Tell whether a block is whole and without the label, as most are."""
    return (begin + BLOCK <= stop) & ((local < begin) | (local >= begin + BLOCK))


@triton.jit
def first_at(x, m, columns):
    """Return the lowest of ``columns`` where ``x`` is ``m``."""
    return tl.min(tl.where(x == m, columns, NOWHERE), 0)


@triton.jit
def reduce_pair(u, v, columns, before, SHAPE: tl.constexpr):
    """Return ``s, t, argmax`` of a block of columns, and ``u-m_s, v-m_t``; -inf takes no part.

    Sums are those of each lane, see :func:`total`.

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
    s = (m_s, total(e_s, SHAPE), total(times(e_s, du), SHAPE), total(times(e_s, x), SHAPE))
    t = (m_t, total(e_t, SHAPE), total(times(e_t, dv), SHAPE), -total(times(e_t, x), SHAPE))
    return s, t, (at_s, at_t), du, dv


@triton.jit
def reduce_ce(z, SHAPE: tl.constexpr):
    """Return ``m_c, d_c`` of a block of columns."""
    m = tl.max(z, 0)
    return m, total(exp(z - shift(m)), SHAPE)


@triton.jit
def best_column(noisy, columns, first_column, held):
    """Return score and column of the block's best label; the column is NONE if ``held`` wins."""
    best = tl.max(noisy, 0)
    column = tl.full((), NONE, tl.int32)
    if best >= held[0]:
        at = first_at(noisy, best, columns)
        if (best > held[0]) | (held[3] == NONE) | (at + first_column < held[3]):
            column = tl.where(at == NOWHERE, NONE, at)
    return best, column


@triton.jit
def reduce_block(
    z, v, z_sum, columns, first_column, so_far, numbers, SHARED: tl.constexpr,
    EXTRAS: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """Return the state of a block of compared columns; -inf in both models takes no part."""
    u, v = tempered(z, numbers[0], SHARED), tempered(v, numbers[0], SHARED)
    s, t, at, du, dv = reduce_pair(u, v, columns, (so_far[0][0], so_far[1][0]), SHAPE)
    pair, sums = (u, v, du, dv), ()
    for i in tl.static_range(len(EXTRAS)):
        sums = sums + (absorb_extra(i, numbers, pair, (s[0], t[0]), EXTRAS, SHAPE),)
    at_s = tl.where(at[0] == NONE, NONE, at[0] + first_column)
    at_t = tl.where(at[1] == NONE, NONE, at[1] + first_column)
    m_c, d_c = tl.full((), NEG_INF, tl.float32), tl.zeros_like(z_sum)
    if not SHARED:
        m_c, d_c = reduce_ce(z, SHAPE)
    return s, t, (at_s, at_t), (m_c, d_c, z_sum), (), sums


@kernel(LOGITS)
def absorb_kernel(
    s_ptr, s_stride, t_ptr, t_stride, code_ptr, code_stride, centres_ptr, centres_stride,
    labels_ptr, floats_ptr, ints_ptr,
    rows, width, compared, blocks, first_row, first_column, key, inv_t, s_cap, t_cap, parameters,
    HAS_TEACHER: tl.constexpr, SHARED: tl.constexpr, RULE: tl.constexpr, LOGIT_SUM: tl.constexpr,
    MAPS: tl.constexpr, EXTRAS: tl.constexpr, COLUMNS: tl.constexpr, RESUME: tl.constexpr,
    CODED: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Absorb a range of columns of one row, into its state or beside it.

    ``s_ptr (rows, width)``, ``t_ptr (rows, compared)``, ``labels_ptr (rows,)``; with RESUME the
    state ``(·, rows)`` is read and written, else ``(splits, ·, rows)`` is written. With CODED,
    ``code_ptr (rows, width)`` and ``centres_ptr (rows, 2·blocks)`` are written too.
    """
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    label = tl.load(labels_ptr + row)
    if label == SKIP:
        return
    stride = tl.cast(rows, tl.int64)
    floats = floats_ptr + split * COLUMNS * stride + row
    ints = ints_ptr + split * 3 * stride + row
    word_row, centre_row = code_ptr + row * code_stride, centres_ptr + row * centres_stride
    logits, caps = (s_ptr + row * s_stride, t_ptr + row * t_stride), (s_cap, t_cap)
    numbers, first_column = (
        numbers_of(inv_t, parameters, tl.float32),
        tl.cast(first_column, tl.int32),
    )
    start, stop = column_range(split, blocks, width, BLOCK)
    pair_stop = start
    if HAS_TEACHER:
        pair_stop = tl.maximum(start, tl.minimum(stop, compared))

    SHAPE: tl.constexpr = (BLOCK // LANES, LANES)
    local, z_sum = tl.full((), NONE, tl.int32), tl.zeros((LANES,), tl.float32)
    lanes, rest = empty(z_sum, EXTRAS), empty(tl.full((), 0.0, tl.float32), EXTRAS)
    if RESUME:
        rest = load_state(floats, ints, stride, None, EXTRAS, tl.float32)
    held = rest[4]
    if RULE == INDEX:
        here = (label >= first_column + start) & (label < first_column + stop)
        local = tl.where(here, label - first_column, NONE).to(tl.int32)
        labelled = hold(logits, local, pair_stop, caps, numbers[0], first_column, 0.0,
                        HAS_TEACHER, SHARED, MAPS)  # fmt: skip
        held = merge_label(held, labelled)[0]

    if HAS_TEACHER:
        for begin in range(start, pair_stop, BLOCK):
            columns = begin + tl.arange(0, BLOCK)
            z = load_logits(logits[0], columns, pair_stop, caps[0], MAPS[0])
            v = load_logits(logits[1], columns, pair_stop, caps[1], MAPS[1])
            if CODED:
                store_pair(word_row, centre_row, columns, begin, pair_stop, z, v, CODED, BLOCK)
            if RULE != INDEX:
                noisy = v
                if RULE == SAMPLE:
                    noisy += gumbel(columns + first_column, first_row + row, key)
                noisy = tl.where(columns < pair_stop, noisy, NEG_INF)
                score, local = best_column(noisy, columns, first_column, held)
                best = hold(logits, local, pair_stop, caps, numbers[0], first_column, score,
                            True, SHARED, MAPS)  # fmt: skip
                held, loser = merge_label(held, best)
            if not is_clean(begin, pair_stop, local, BLOCK):
                keep = (columns < pair_stop) & (columns != local)
                z, v = tl.where(keep, z, NEG_INF), tl.where(keep, v, NEG_INF)
            if LOGIT_SUM:
                keep = (columns < pair_stop) & (columns != local)
                z_sum = total(tl.where(keep, z, 0.0), SHAPE)
            block = reduce_block(z, v, z_sum, columns, first_column, lanes, numbers, SHARED,
                                 EXTRAS, SHAPE)  # fmt: skip
            lanes = merge_sums(lanes, block, lanes[4], numbers, EXTRAS)
            if RULE != INDEX:
                if loser[2] != NONE:
                    column = one_column(loser, loser[2] != NONE, numbers, SHARED, EXTRAS)
                    rest = merge_sums(rest, column, held, numbers, EXTRAS)
    if not SHARED:
        s, t, at, ce, empty_label, sums = lanes
        for begin in range(pair_stop, stop, BLOCK):
            columns = begin + tl.arange(0, BLOCK)
            z = load_logits(logits[0], columns, stop, caps[0], MAPS[0])
            if CODED:
                tl.store(word_row + columns, z.to(tl.int32, bitcast=True), mask=columns < stop)
            if not is_clean(begin, stop, local, BLOCK):
                z = tl.where((columns < stop) & (columns != local), z, NEG_INF)
            if LOGIT_SUM:
                keep = (columns < stop) & (columns != local)
                z_sum = total(tl.where(keep, z, 0.0), SHAPE)
            ce = merge_ce(ce, reduce_ce(z, SHAPE) + (z_sum,))
        lanes = (s, t, at, ce, empty_label, sums)
    state = merge_sums(rest, gathered(lanes, EXTRAS), held, numbers, EXTRAS)
    store_state(floats, ints, stride, None, state, EXTRAS)


@kernel()
def merge_kernel(
    floats_ptr, ints_ptr, part_floats_ptr, part_ints_ptr, labels_ptr, rows, splits, inv_t,
    parameters, SHARED: tl.constexpr, RULE: tl.constexpr, EXTRAS: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Merge ``(splits, ·, rows)`` partial states into the state ``(·, rows)``."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = row < rows
    mask &= tl.load(labels_ptr + row, mask=mask, other=SKIP) != SKIP
    stride = tl.cast(rows, tl.int64)
    numbers = numbers_of(inv_t, parameters, tl.float32)
    total = load_state(floats_ptr + row, ints_ptr + row, stride, mask, EXTRAS, tl.float32)
    for split in range(splits):
        floats = part_floats_ptr + split * COLUMNS * stride + row
        ints = part_ints_ptr + split * 3 * stride + row
        state = load_state(floats, ints, stride, mask, EXTRAS, tl.float32)
        total = merge(total, state, numbers, RULE, SHARED, EXTRAS)
    store_state(floats_ptr + row, ints_ptr + row, stride, mask, total, EXTRAS)
