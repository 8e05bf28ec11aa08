"""The second read of pass 1 adds to sums that need both normalisers first.

Statistics of the first read have no sums here. Grids and arguments are as in :mod:`.absorb`.
"""

import triton
import triton.language as tl

from bgkernels.backends.triton.absorb import column_range
from bgkernels.backends.triton.code import load_pair
from bgkernels.backends.triton.extras import gather_extra, read_extra
from bgkernels.backends.triton.math import LOGITS, NEG_INF, SKIP, kernel, numbers_of, tempered
from bgkernels.backends.triton.state import load_extras, store_extras


@triton.jit
def added(a, b):
    """Add two tuples, number by number."""
    out = ()
    for i in tl.static_range(len(b)):
        out = out + (a[i] + b[i],)
    return out


@triton.jit
def no_sums(EXTRAS: tl.constexpr, LANES: tl.constexpr):
    """Return the sums of no column of one row, for each lane."""
    sums = ()
    for i in tl.static_range(len(EXTRAS)):
        sums = sums + (zeros(EXTRAS[i][3], LANES),)
    return sums


@triton.jit
def zeros(count: tl.constexpr, LANES: tl.constexpr):
    """Return a tuple of that many zeros, for each lane."""
    out = ()
    for _ in tl.static_range(count):
        out = out + (tl.zeros((LANES,), tl.float32),)
    return out


@kernel(LOGITS)
def reread_kernel(
    s_ptr, s_stride, t_ptr, t_stride, code_ptr, code_stride, centres_ptr, centres_stride,
    labels_ptr, lse_s_ptr, lse_t_ptr, sums_ptr,
    rows, width, blocks, inv_t, s_cap, t_cap, parameters,
    SHARED: tl.constexpr, MAPS: tl.constexpr, EXTRAS: tl.constexpr, COLUMNS: tl.constexpr,
    RESUME: tl.constexpr, CODED: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Sum over a range of columns of one row.

    ``lse_s_ptr, lse_t_ptr (rows,)`` are fp64. With RESUME the sums are added to those of the state
    ``(·, rows)``, else written to ``(splits, ·, rows)``.
    """
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(labels_ptr + row) == SKIP:
        return
    stride = tl.cast(rows, tl.int64)
    out = sums_ptr + split * COLUMNS * stride + row
    exact_s, exact_t = tl.load(lse_s_ptr + row), tl.load(lse_t_ptr + row)
    lse_s, lse_t = exact_s.to(tl.float32), exact_t.to(tl.float32)
    rest_s, rest_t = (exact_s - lse_s).to(tl.float32), (exact_t - lse_t).to(tl.float32)
    numbers = numbers_of(inv_t, parameters, tl.float32)
    start, stop = column_range(split, blocks, width, BLOCK)
    s_row, t_row = s_ptr + row * s_stride, t_ptr + row * t_stride
    word_row, centre_row = code_ptr + row * code_stride, centres_ptr + row * centres_stride
    lanes = no_sums(EXTRAS, LANES)
    for begin in range(start, stop, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        z, v = load_pair(s_row, t_row, word_row, centre_row, columns, begin, stop, s_cap, t_cap,
                         MAPS, CODED, BLOCK)  # fmt: skip
        lp = tl.where(columns < stop, tempered(z, numbers[0], SHARED) - lse_s - rest_s, NEG_INF)
        lq = tl.where(columns < stop, tempered(v, numbers[0], SHARED) - lse_t - rest_t, NEG_INF)
        new = ()
        for i in tl.static_range(len(EXTRAS)):
            block = read_extra(i, numbers, lp, lq, EXTRAS, (BLOCK // LANES, LANES))
            new = new + (added(lanes[i], block),)
        lanes = new
    total = ()
    for i in tl.static_range(len(EXTRAS)):
        total = total + (gather_extra(i, lanes[i], EXTRAS),)
    if RESUME:
        before, new = load_extras(out, stride, None, EXTRAS, tl.float32), ()
        for i in tl.static_range(len(EXTRAS)):
            new = new + (added(before[i], total[i]),)
        total = new
    store_extras(out, stride, None, total, EXTRAS)


@kernel()
def add_kernel(
    sums_ptr, part_ptr, labels_ptr, rows, splits, EXTRAS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Add ``(splits, ·, rows)`` sums of the second read to those of the state ``(·, rows)``."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = row < rows
    mask &= tl.load(labels_ptr + row, mask=mask, other=SKIP) != SKIP
    stride = tl.cast(rows, tl.int64)
    total = load_extras(sums_ptr + row, stride, mask, EXTRAS, tl.float32)
    for split in range(splits):
        sums = part_ptr + split * COLUMNS * stride + row
        more = load_extras(sums, stride, mask, EXTRAS, tl.float32)
        new = ()
        for i in tl.static_range(len(EXTRAS)):
            new = new + (added(total[i], more[i]),)
        total = new
    store_extras(sums_ptr + row, stride, mask, total, EXTRAS)
