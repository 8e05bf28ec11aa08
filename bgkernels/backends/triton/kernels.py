"""The kernels: rows of logits in, states and gradients out. Arithmetic: :mod:`.triton_math`.

Grids are (rows, splits): the first dimension of a grid may pass 65,535. Offsets of rows are 64-bit,
columns inside a tile 32-bit. Only what changes the code is ``constexpr``. Sizes, temperature,
scales and exponents are run-time values, cast here because some callers pass Python floats as fp64;
but the alignment of logits is compiled in, since 16-byte loads depend on it.
"""

# mypy: ignore-errors
# ruff: noqa: RUF005, SIM102
# See triton_math; and `and` evaluates both sides there.

import triton
import triton.language as tl

from bgkernels.backends.triton.math import (
    CAPPED,
    INDEX,
    NEG_INF,
    NONE,
    RAW,
    SAMPLE,
    TEACHER,
    best_column,
    empty,
    exp,
    gumbel,
    merge,
    merge_ce,
    merge_label,
    merge_sums,
    one_column,
    pair_sums,
    real_logits,
    reduce_ce,
    reduce_pair,
    reduce_tilt,
    sign,
    tempered,
    times,
    vjp_line,
    vjp_mixture,
    vjp_tilt,
)
from bgkernels.rows import state, vjp

SKIP = tl.constexpr(state.SKIP)
FLOATS = tl.constexpr(len(state.FLOATS))
TILT = tl.constexpr(len(state.TILT))
COEFFICIENTS = tl.constexpr(len(vjp.COEFFICIENTS))


@triton.jit
def load_columns(ptr, stride, first: tl.constexpr, count: tl.constexpr, mask=None):
    """A tuple of state or coefficient columns of one row, or of a block of rows."""
    values = ()
    for i in tl.static_range(first, first + count):
        values = values + (tl.load(ptr + i * tl.cast(stride, tl.int64), mask=mask),)
    return values


@triton.jit
def column_range(split, blocks, width, BLOCK: tl.constexpr):
    """The columns of one program, from a multiple of BLOCK: Triton widens loads if it sees that."""
    span = blocks * BLOCK
    return split * span, tl.minimum(split * span + span, width)


@triton.jit
def load_state(floats, ints, stride, mask, TILTS: tl.constexpr):
    """From ``(14 + 4·tilts, rows)`` and ``(3, rows)``; the pointers are those of the row."""
    x = load_columns(floats, stride, 0, FLOATS, mask)
    label, at_s, at_t = load_columns(ints, stride, 0, 3, mask)
    sums = ()
    for i in tl.static_range(TILTS):
        sums = sums + (load_columns(floats, stride, FLOATS + TILT * i, TILT, mask),)
    held = (x[11], x[12], x[13], label.to(tl.int32))
    return x[0:4], x[4:8], (at_s.to(tl.int32), at_t.to(tl.int32)), x[8:11], held, sums


@triton.jit
def store_state(floats, ints, stride, mask, value, TILTS: tl.constexpr):
    """The inverse of :func:`load_state`."""
    s, t, at, ce, held, sums = value
    columns = s + t + ce + (held[0], held[1], held[2])
    for i in tl.static_range(TILTS):
        columns = columns + sums[i]
    for i in tl.static_range(FLOATS + TILT * TILTS):
        tl.store(floats + i * stride, columns[i], mask=mask)
    tl.store(ints, held[3].to(tl.int64), mask=mask)
    tl.store(ints + stride, at[0].to(tl.int64), mask=mask)
    tl.store(ints + 2 * stride, at[1].to(tl.int64), mask=mask)


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
def reduce_block(z, v, z_sum, columns, first_column, total, tilts, inv_t, SHARED: tl.constexpr,
                 KINDS: tl.constexpr, MOMENTS: tl.constexpr, TILTS: tl.constexpr):  # fmt: skip
    """The state of a block of compared columns; those that are -inf in both models take no part."""
    u, v = tempered(z, inv_t, SHARED), tempered(v, inv_t, SHARED)
    s, t, at, x = reduce_pair(u, v, columns, (total[0][0], total[1][0]))
    sums = ()
    for i in tl.static_range(TILTS):
        sums = sums + (reduce_tilt(u, v, x, s[0], t[0], tilts[i], KINDS[i], MOMENTS[i]),)
    at_s = tl.where(at[0] == NONE, NONE, at[0] + first_column)
    at_t = tl.where(at[1] == NONE, NONE, at[1] + first_column)
    m_c, d_c, _ = total[3]
    if SHARED:
        m_c, d_c = tl.full((), NEG_INF, tl.float32), tl.full((), 0.0, tl.float32)
    else:
        m_c, d_c = reduce_ce(z)
    return s, t, (at_s, at_t), (m_c, d_c, z_sum), total[4], sums


@triton.jit(
    do_not_specialize=[
        "labels_ptr", "floats_ptr", "ints_ptr", "rows", "blocks", "first_row", "first_column",
        "key", "inv_t", "s_cap", "t_cap", "tilts",
    ]
)  # fmt: skip
def absorb_kernel(
    s_ptr, s_stride, t_ptr, t_stride, labels_ptr, floats_ptr, ints_ptr,
    rows, width, compared, blocks, first_row, first_column, key, inv_t, s_cap, t_cap, tilts,
    HAS_TEACHER: tl.constexpr, SHARED: tl.constexpr, RULE: tl.constexpr, LOGIT_SUM: tl.constexpr,
    S_MAP: tl.constexpr, T_MAP: tl.constexpr, KINDS: tl.constexpr, MOMENTS: tl.constexpr,
    TILTS: tl.constexpr, RESUME: tl.constexpr, BLOCK: tl.constexpr,
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
    floats = floats_ptr + split * (FLOATS + TILT * TILTS) * stride + row
    ints = ints_ptr + split * 3 * stride + row
    s_row, t_row = s_ptr + row * s_stride, t_ptr + row * t_stride
    inv_t, first_column = tl.cast(inv_t, tl.float32), tl.cast(first_column, tl.int32)
    start, stop = column_range(split, blocks, width, BLOCK)
    pair_stop = start
    if HAS_TEACHER:
        pair_stop = tl.maximum(start, tl.minimum(stop, compared))

    local, z_sum = tl.full((), NONE, tl.int32), tl.full((), 0.0, tl.float32)
    total = empty(local, TILTS)
    if RESUME:
        total = load_state(floats, ints, stride, None, TILTS)
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
            part = reduce_block(z, v, z_sum, columns, first_column, total, tilts, inv_t, SHARED,
                                KINDS, MOMENTS, TILTS)  # fmt: skip
            total = merge_sums(total, part, held, MOMENTS, TILTS)
            if RULE != INDEX:
                if loser[2] != NONE:
                    one = one_column(loser, tilts, inv_t, SHARED, KINDS, TILTS)
                    total = merge_sums(total, one, held, MOMENTS, TILTS)
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
    store_state(floats, ints, stride, None, total, TILTS)


@triton.jit(
    do_not_specialize=[
        "floats_ptr", "ints_ptr", "part_floats_ptr", "part_ints_ptr", "labels_ptr", "rows",
        "splits", "inv_t", "tilts",
    ]
)  # fmt: skip
def merge_kernel(
    floats_ptr, ints_ptr, part_floats_ptr, part_ints_ptr, labels_ptr, rows, splits, inv_t, tilts,
    SHARED: tl.constexpr, RULE: tl.constexpr, KINDS: tl.constexpr, MOMENTS: tl.constexpr,
    TILTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Merge ``(splits, ·, rows)`` partial states into the state ``(·, rows)``."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = row < rows
    mask &= tl.load(labels_ptr + row, mask=mask, other=SKIP) != SKIP
    stride = tl.cast(rows, tl.int64)
    inv_t = tl.cast(inv_t, tl.float32)
    total = load_state(floats_ptr + row, ints_ptr + row, stride, mask, TILTS)
    for split in range(splits):
        floats = part_floats_ptr + split * (FLOATS + TILT * TILTS) * stride + row
        part = load_state(floats, part_ints_ptr + split * 3 * stride + row, stride, mask, TILTS)
        total = merge(total, part, tilts, inv_t, RULE, SHARED, KINDS, MOMENTS, TILTS)
    store_state(floats_ptr + row, ints_ptr + row, stride, mask, total, TILTS)


@triton.jit(
    do_not_specialize=[
        "lse_s_ptr", "lse_t_ptr", "sums_ptr", "rows", "blocks", "inv_t", "s_cap", "t_cap", "omegas",
    ]
)  # fmt: skip
def pairs_kernel(
    s_ptr, s_stride, t_ptr, t_stride, lse_s_ptr, lse_t_ptr, sums_ptr,
    rows, width, blocks, inv_t, s_cap, t_cap, omegas,
    SHARED: tl.constexpr, S_MAP: tl.constexpr, T_MAP: tl.constexpr, MIXTURES: tl.constexpr,
    TOTAL_VARIATION: tl.constexpr, RESUME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pass 1, second read: pairwise sums over a range of columns of one row.

    ``lse_s_ptr, lse_t_ptr (2, rows)``: log-sum-exps, and what fp32 leaves of them.
    With RESUME added to ``sums_ptr (·, rows)``, else written to ``(splits, ·, rows)``.
    """
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    stride = tl.cast(rows, tl.int64)
    COUNT: tl.constexpr = 3 * MIXTURES + 2 * TOTAL_VARIATION
    out = sums_ptr + split * COUNT * stride + row
    lse_s, rest_s = load_columns(lse_s_ptr + row, stride, 0, 2)
    lse_t, rest_t = load_columns(lse_t_ptr + row, stride, 0, 2)
    inv_t = tl.cast(inv_t, tl.float32)
    start, stop = column_range(split, blocks, width, BLOCK)
    s_row, t_row = s_ptr + row * s_stride, t_ptr + row * t_stride
    total = ()
    for _ in tl.static_range(COUNT):
        total = total + (tl.full((), 0.0, tl.float32),)
    if RESUME:
        total = load_columns(out, stride, 0, COUNT)
    for begin in range(start, stop, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        z = load_logits(s_row, columns, stop, s_cap, S_MAP)
        v = load_logits(t_row, columns, stop, t_cap, T_MAP)
        lp = tl.where(columns < stop, tempered(z, inv_t, SHARED) - lse_s - rest_s, NEG_INF)
        lq = tl.where(columns < stop, tempered(v, inv_t, SHARED) - lse_t - rest_t, NEG_INF)
        new = ()
        for i in tl.static_range(MIXTURES):
            terms = pair_sums(lp, lq, omegas[i])
            for k in tl.static_range(3):
                new = new + (total[3 * i + k] + tl.sum(terms[k], 0),)
        if TOTAL_VARIATION:
            p, q = exp(lp), exp(lq)
            half = tl.sum(tl.abs(p - q), 0) * 0.5
            new = new + (total[3 * MIXTURES] + half,)
            new = new + (total[3 * MIXTURES + 1] + tl.sum(p * sign(p - q), 0),)
        total = new
    for i in tl.static_range(COUNT):
        tl.store(out + i * stride, total[i])


@triton.jit
def vjp_store(out_row, columns, stop, local, begin, z, g, lse_c, h, m, h_y, hot, s_cap,
              SHARED: tl.constexpr, S_MAP: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Add the gradient through the cross-entropy, go back through the soft-cap, and store."""
    g += m
    if not SHARED:
        e = exp(z - lse_c)
        ce = times(h, e)
        if (local >= begin) & (local < begin + BLOCK):
            ce = tl.where(columns == local, times(h_y, e), ce)
        g += ce
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
        "row_ptr", "labels_ptr", "tilt_ptr", "pair_ptr", "rows", "blocks", "first_column", "inv_t",
        "s_cap", "t_cap", "tilts", "omegas",
    ]
)  # fmt: skip
def vjp_kernel(
    out_ptr, out_stride, s_ptr, s_stride, t_ptr, t_stride,
    row_ptr, labels_ptr, tilt_ptr, pair_ptr,
    rows, width, compared, blocks, first_column, inv_t, s_cap, t_cap, tilts, omegas,
    HAS_TEACHER: tl.constexpr, SHARED: tl.constexpr, S_MAP: tl.constexpr, T_MAP: tl.constexpr,
    KINDS: tl.constexpr, MOMENTS: tl.constexpr, TILTS: tl.constexpr, MIXTURES: tl.constexpr,
    TOTAL_VARIATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pass 2: the gradient of a range of columns of one row.

    ``out_ptr (rows, width)`` may be ``s_ptr``: an element is read and written by the same program,
    in that order. ``row_ptr (13, rows)``, ``tilt_ptr (4·tilts, rows)``, ``pair_ptr (·, rows)``.
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
    inv_t = tl.cast(inv_t, tl.float32)
    lse_s, lse_t, lse_c, a, b, c, d, h, m, a_y, d_y, h_y, hot = load_columns(
        row_ptr + row, rows, 0, COEFFICIENTS
    )
    of_tilt = ()
    for i in tl.static_range(TILTS):
        of_tilt = of_tilt + (load_columns(tilt_ptr + row, rows, TILT * i, TILT),)
    of_pair = load_columns(pair_ptr + row, rows, 0, 3 * MIXTURES + 2 * TOTAL_VARIATION)
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
            for i in tl.static_range(TILTS):
                if KINDS[i] != TEACHER or MOMENTS[i]:  # else nothing of it depends on the student
                    g += vjp_tilt(u, v, tilts[i], of_tilt[i], KINDS[i], MOMENTS[i])
            for i in tl.static_range(MIXTURES):
                g += vjp_mixture(lp, lq, omegas[i], of_pair, 3 * i)
            if TOTAL_VARIATION:
                p, v0, v1 = exp(lp), of_pair[3 * MIXTURES], of_pair[3 * MIXTURES + 1]
                g += p * (v0 + v1 * sign(p - exp(lq)))
            vjp_store(out_row, columns, pair_stop, local, begin, z, g, lse_c, h, m, h_y, hot,
                      s_cap, SHARED, S_MAP, BLOCK)  # fmt: skip
    if not SHARED:
        for begin in range(pair_stop, stop, BLOCK):
            columns = begin + tl.arange(0, BLOCK)
            z = load_logits(s_row, columns, stop, s_cap, S_MAP)
            vjp_store(out_row, columns, stop, local, begin, z, tl.zeros_like(z), lse_c, h, m, h_y,
                      hot, s_cap, SHARED, S_MAP, BLOCK)  # fmt: skip
