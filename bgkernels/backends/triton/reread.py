"""Pass 1, second read: sums of statistics that need both normalisers first.

``EXTRAS`` are ``(kind, variant, first, count)`` as in the state; statistics of the first read have
no sums here.
"""

# mypy: ignore-errors
# ruff: noqa: RUF005
# See math; the conventions of grids and arguments are those of absorb.

import triton
import triton.language as tl

from bgkernels.backends.triton.absorb import column_range, load_logits
from bgkernels.backends.triton.extras import read_extra
from bgkernels.backends.triton.math import NEG_INF, SKIP, number, numbers, tempered
from bgkernels.backends.triton.state import load_columns


@triton.jit
def added(a, b):
    """The sums of two parts."""
    out = ()
    for i in tl.static_range(len(b)):
        out = out + (a[i] + b[i],)
    return out


@triton.jit
def load_sums(ptr, stride, mask, EXTRAS: tl.constexpr):
    """Sums of the second read."""
    sums = ()
    for i in tl.static_range(len(EXTRAS)):
        x = load_columns(ptr, stride, EXTRAS[i][2], EXTRAS[i][3], mask, tl.float32)
        sums = sums + (x,)
    return sums


@triton.jit
def no_sums(EXTRAS: tl.constexpr):
    """Those of no column of one row."""
    sums = ()
    for i in tl.static_range(len(EXTRAS)):
        sums = sums + (zeros(EXTRAS[i][3]),)
    return sums


@triton.jit
def zeros(count: tl.constexpr):
    """A tuple of them."""
    out = ()
    for _ in tl.static_range(count):
        out = out + (tl.full((), 0.0, tl.float32),)
    return out


@triton.jit
def store_sums(ptr, stride, mask, sums, EXTRAS: tl.constexpr):
    """The inverse of :func:`load_sums`."""
    for i in tl.static_range(len(EXTRAS)):
        for k in tl.static_range(len(sums[i])):
            tl.store(ptr + (EXTRAS[i][2] + k) * stride, sums[i][k], mask=mask)


@triton.jit(
    do_not_specialize=[
        "labels_ptr", "lse_s_ptr", "lse_t_ptr", "sums_ptr", "rows", "blocks", "inv_t", "s_cap",
        "t_cap", "parameters",
    ]
)  # fmt: skip
def reread_kernel(
    s_ptr, s_stride, t_ptr, t_stride, labels_ptr, lse_s_ptr, lse_t_ptr, sums_ptr,
    rows, width, blocks, inv_t, s_cap, t_cap, parameters,
    SHARED: tl.constexpr, S_MAP: tl.constexpr, T_MAP: tl.constexpr, EXTRAS: tl.constexpr,
    COLUMNS: tl.constexpr, RESUME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pairwise sums over a range of columns of one row.

    ``lse_s_ptr, lse_t_ptr (rows,)`` are fp64. With RESUME the sums are added to those of the state
    ``(·, rows)``, else written to ``(splits, ·, rows)``.
    """
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(labels_ptr + row) == SKIP:
        return
    stride = tl.cast(rows, tl.int64)
    out = sums_ptr + split * COLUMNS * stride + row
    wide_s, wide_t = tl.load(lse_s_ptr + row), tl.load(lse_t_ptr + row)
    lse_s, lse_t = wide_s.to(tl.float32), wide_t.to(tl.float32)
    rest_s, rest_t = (wide_s - lse_s).to(tl.float32), (wide_t - lse_t).to(tl.float32)
    inv_t, parameters = number(inv_t, tl.float32), numbers(parameters, tl.float32)
    start, stop = column_range(split, blocks, width, BLOCK)
    s_row, t_row = s_ptr + row * s_stride, t_ptr + row * t_stride
    total = no_sums(EXTRAS)
    if RESUME:
        total = load_sums(out, stride, None, EXTRAS)
    for begin in range(start, stop, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        z = load_logits(s_row, columns, stop, s_cap, S_MAP)
        v = load_logits(t_row, columns, stop, t_cap, T_MAP)
        lp = tl.where(columns < stop, tempered(z, inv_t, SHARED) - lse_s - rest_s, NEG_INF)
        lq = tl.where(columns < stop, tempered(v, inv_t, SHARED) - lse_t - rest_t, NEG_INF)
        new = ()
        for i in tl.static_range(len(EXTRAS)):
            new = new + (added(total[i], read_extra(parameters[i], lp, lq, EXTRAS[i][0])),)
        total = new
    store_sums(out, stride, None, total, EXTRAS)


@triton.jit(do_not_specialize=["sums_ptr", "part_ptr", "labels_ptr", "rows", "splits"])
def add_kernel(
    sums_ptr, part_ptr, labels_ptr, rows, splits,
    EXTRAS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add ``(splits, ·, rows)`` sums of the second read to those of the state ``(·, rows)``."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = row < rows
    mask &= tl.load(labels_ptr + row, mask=mask, other=SKIP) != SKIP
    stride = tl.cast(rows, tl.int64)
    total = load_sums(sums_ptr + row, stride, mask, EXTRAS)
    for split in range(splits):
        part = load_sums(part_ptr + split * COLUMNS * stride + row, stride, mask, EXTRAS)
        new = ()
        for i in tl.static_range(len(EXTRAS)):
            new = new + (added(total[i], part[i]),)
        total = new
    store_sums(sums_ptr + row, stride, mask, total, EXTRAS)
