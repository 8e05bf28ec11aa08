"""These elementary functions of the kernels take scalars and blocks, in fp32 or fp64."""

import inspect
import math
from collections.abc import Callable

import triton
import triton.language as tl

from bgkernels.rows import arithmetic, sampling

NEG_INF = tl.constexpr(float("-inf"))
NONE, SKIP = tl.constexpr(arithmetic.NONE), tl.constexpr(arithmetic.SKIP)
RAW, SCALED, CAPPED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # maps to real logits
MULTIPLIER, WEYL = tl.constexpr(0xD256D193), tl.constexpr(0x9E3779B9)
ROUNDS = tl.constexpr(sampling.ROUNDS)
LOG2E = tl.constexpr(math.log2(math.e))
LOGITS = (
    "out_ptr", "out_stride", "s_ptr", "s_stride", "t_ptr", "t_stride", "code_ptr", "code_stride",
    "width", "compared",
)  # fmt: skip
"""Arguments whose divisibility by 16 is compiled into a kernel of columns: loads depend on it."""


def kernel(specialised: tuple[str, ...] = ()) -> Callable:
    """Decorate a kernel that is compiled once, whatever arguments other than these are."""

    def decorate(function):
        parameters = inspect.signature(function).parameters.values()
        names = [p.name for p in parameters if p.annotation is not tl.constexpr]
        others = [name for name in names if name not in specialised]
        return triton.jit(function, do_not_specialize=others)

    return decorate


@triton.jit
def shift(m):
    """Return the centre that belongs to a maximum: itself, or 0 for an empty state."""
    return tl.where(m == NEG_INF, 0.0, m)


@triton.jit
def exp(x):
    """Return ``e^x``; in fp32 through base 2, whose instruction flushes denormals."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        return tl.exp2(x * LOG2E)


@triton.jit
def number(pair, DTYPE: tl.constexpr):
    """Return a number that was passed as what fp32 holds of it, and the rest."""
    value = tl.cast(pair[0], DTYPE)
    if tl.float32 != DTYPE:
        value += tl.cast(pair[1], DTYPE)
    return value


@triton.jit
def numbers_of(inv_t, parameters, DTYPE: tl.constexpr):
    """Return ``1/T``, and the three parameters of each extra statistic."""
    values = ()
    for i in tl.static_range(len(parameters)):
        a, b, c = parameters[i]
        values = values + ((number(a, DTYPE), number(b, DTYPE), number(c, DTYPE)),)
    return number(inv_t, DTYPE), values


@triton.jit
def at_least_0(x):
    """Return the larger of a number and 0; a NaN stays a NaN."""
    return tl.where(x < 0, 0.0, x)


@triton.jit
def log_prob(rest, logit, lse):
    """Return the log-probability of a column, from the probability of all others."""
    return tl.where(rest < 0.5, log1p(-rest), logit - lse)


@triton.jit
def times(weight, x):
    """Return ``weight · x``, 0 · (±inf) = 0; multiplied last, so that sums become FMAs."""
    return weight * tl.where(weight == 0, 0.0, x)


@triton.jit
def below(m_x, m):
    """Return how far a maximum lies below the common one: 0 where both are -inf."""
    return tl.where(m_x == m, 0.0, m_x - m)


@triton.jit
def tanh(x):
    """Return the tangent, an odd polynomial near 0, where ``1 - e^(-2|x|)`` cancels."""
    y = x * x
    near = x + x * y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835))))
    e = exp(-2 * tl.abs(x))
    far = (1 - e) / (1 + e)
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))


@triton.jit
def expm1(x, e):
    """Return ``e^x - 1`` for x <= 0 and ``e = e^x``: Taylor where the difference cancels."""
    near = 1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040)))))
    return tl.where(x > -0.35, x + x * x * near, e - 1)


@triton.jit
def log1p(x):
    """Return ``log(1 + x)``, x <= 0; near 0, the rounding of ``1 + x`` is mended."""
    w = 1 + x
    return tl.log(w) + (x - (w - 1))


@triton.jit
def philox(column, row, key):
    """Return a word of Philox2x32-10, as in :mod:`bgkernels.rows.sampling`, for any integers."""
    c0, key = column.to(tl.uint32), tl.cast(key, tl.uint32)
    c1 = tl.cast(row, tl.uint32) + tl.zeros_like(c0)
    multiplier = tl.full(c0.shape, MULTIPLIER, tl.uint32)
    for _ in tl.static_range(ROUNDS):
        high = tl.umulhi(c0, multiplier)
        low = c0 * multiplier
        c0 = high ^ key ^ c1
        c1 = low
        key = key + tl.full((), WEYL, tl.uint32)
    return c0


@triton.jit
def gumbel(column, row, key):
    """Return standard Gumbel numbers of a block, as in :mod:`bgkernels.rows.sampling`."""
    uniform = ((philox(column, row, key) >> 9).to(tl.float32) + 0.5) * (1 / 8388608)
    return -tl.log(-tl.log(uniform))


@triton.jit
def real_logits(raw, cap, MAP: tl.constexpr):
    """Map raw head outputs to real logits in fp32; ``cap`` is ``(scale, cap)``."""
    x = raw.to(tl.float32)
    if MAP != RAW:
        x = x * tl.cast(cap[0], tl.float32)
    if MAP == CAPPED:
        bound = tl.cast(cap[1], tl.float32)
        x = bound * tanh(x * (1 / bound))
    return x


@triton.jit
def tempered(x, inv_t, SHARED: tl.constexpr):
    """Turn real into tempered logits; a shared softmax has temperature 1."""
    if not SHARED:
        x = x * inv_t
    return x


@triton.jit
def sign(x):
    """Return -1, 0 or 1; a NaN stays a NaN."""
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))


@triton.jit
def total(x, SHAPE: tl.constexpr):
    """Return the sums of a block of columns, one for each lane; of a single column, itself.

    ``SHAPE`` is ``(columns a lane, lanes)``, or empty for a single column. A lane is a thread, and
    adds up the columns that it has loaded, whichever they are: nothing is exchanged.
    """
    if len(SHAPE) > 0:
        x = tl.sum(tl.reshape(x, SHAPE, can_reorder=True), 0)
    return x


@triton.jit
def largest(x, SHAPE: tl.constexpr):
    """Return the maximum of a block of columns; of a single column, itself."""
    if len(SHAPE) > 0:
        x = tl.max(x, 0)
    return x
