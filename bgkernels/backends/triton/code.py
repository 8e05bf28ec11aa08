"""Coded tiles are written by pass 1 beside its sums, and read by what comes after it.

:class:`bgkernels.backends.base.Code` says what they hold. CODED is the number of columns that share
centres, of which a block of pass 1 is a multiple; 0 where tiles are not coded.
"""

import triton
import triton.language as tl

from bgkernels.backends.triton.math import NEG_INF, real_logits, shift


@triton.jit
def half_bits(x):
    """Return the bits of a number in fp16, in the lower half of a word."""
    return x.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit
def half(bits):
    """Return the number whose bits in fp16 are in the lower half of a word."""
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def store_pair(word_row, centre_row, columns, begin, stop, z, v, CODED: tl.constexpr,
               BLOCK: tl.constexpr):  # fmt: skip
    """Code a block of compared columns, the label's too."""
    inside = columns < stop
    z, v = tl.where(inside, z, NEG_INF), tl.where(inside, v, NEG_INF)
    c_s, c_t = shift(tl.max(z, 0)), shift(tl.max(v, 0))
    du, dv = z - c_s, v - c_t
    gap = tl.where((z == NEG_INF) & (v == NEG_INF), 0.0, du - dv)
    word = half_bits(tl.where(du > dv, du, dv)) | (half_bits(gap) << 16)
    tl.store(word_row + columns, word, mask=inside)
    blocks = begin // CODED + tl.arange(0, BLOCK // CODED)
    present, zeros = blocks * CODED < stop, tl.zeros((BLOCK // CODED,), tl.float32)
    tl.store(centre_row + 2 * blocks, zeros + c_s, mask=present)
    tl.store(centre_row + 2 * blocks + 1, zeros + c_t, mask=present)


@triton.jit
def load_pair(s_row, t_row, word_row, centre_row, columns, begin, stop, s_cap, t_cap,
              MAPS: tl.constexpr, CODED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Load both models' real logits of a block; from ``stop`` on, anything."""
    inside = columns < stop
    if CODED:
        word = tl.load(word_row + columns, mask=inside, other=0)
        if BLOCK <= CODED:
            c_s = tl.load(centre_row + 2 * (begin // CODED))
            c_t = tl.load(centre_row + 2 * (begin // CODED) + 1)
        else:
            c_s = tl.load(centre_row + 2 * (columns // CODED), mask=inside, other=0.0)
            c_t = tl.load(centre_row + 2 * (columns // CODED) + 1, mask=inside, other=0.0)
        most, gap = half(word), half(word >> 16)
        return c_s + (most + tl.minimum(gap, 0.0)), c_t + (most - tl.maximum(gap, 0.0))
    else:
        z = real_logits(tl.load(s_row + columns, mask=inside), s_cap, MAPS[0])
        return z, real_logits(tl.load(t_row + columns, mask=inside), t_cap, MAPS[1])


@triton.jit
def load_alone(s_row, word_row, columns, stop, s_cap, MAPS: tl.constexpr, CODED: tl.constexpr):
    """Load the student's real logits where it has no teacher; from ``stop`` on, anything."""
    inside = columns < stop
    if CODED:
        return tl.load(word_row + columns, mask=inside).to(tl.float32, bitcast=True)
    else:
        return real_logits(tl.load(s_row + columns, mask=inside), s_cap, MAPS[0])
