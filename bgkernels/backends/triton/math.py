"""The two primitives in Triton: :mod:`bgkernels.rows.state` and the VJP line, function for function.

The small functions work on scalars, on blocks of columns and on blocks of rows alike: one
:func:`merge` joins the blocks of a row, the programs that share a row, and the tiles of a
vocabulary. Inside a kernel a state is the tuple ``(s, t, argmax, ce, held, tilts)`` with
``s = (m, d, h, k)`` and its mirror ``t``, ``argmax = (argmax_s, argmax_t)``,
``ce = (m_c, d_c, z_sum)``, ``held = (score, z_y, v_y, label)``, and ``(m, d, k, q)`` a tilt.
"""

# mypy: ignore-errors
# ruff: noqa: RUF005, SIM108
# Triton compiles these functions: their types are its own, and it knows no starred tuples and no
# conditional expressions of tuples.

import math

import triton
import triton.language as tl

from bgkernels.rows import sampling, state

NEG_INF = tl.constexpr(float("-inf"))
NONE = tl.constexpr(state.NONE)
NOWHERE = tl.constexpr(2**31 - 1)  # beyond every column
INDEX, ARGMAX, SAMPLE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # label rules
RAW, SCALED, CAPPED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # maps to real logits
# Kinds of tilt by the signs of (a, b): any, (+, +), (0, +), (+, 0).
ANY, BOTH, TEACHER, STUDENT = (tl.constexpr(i) for i in range(4))
MULTIPLIER, WEYL = tl.constexpr(0xD256D193), tl.constexpr(0x9E3779B9)
ROUNDS = tl.constexpr(sampling.ROUNDS)
LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def shift(m):
    """The centre that belongs to a maximum: itself, or 0 for an empty state."""
    return tl.where(m == NEG_INF, 0.0, m)


@triton.jit
def exp(x):
    """Through base 2, whose instruction flushes denormals; the one behind ``tl.exp`` mends them."""
    return tl.exp2(x * LOG2E)


@triton.jit
def times(weight, x):
    """``weight · x`` with 0 · (±inf) = 0; multiplied last, so that sums of products become FMAs."""
    return weight * tl.where(weight == 0, 0.0, x)


@triton.jit
def below(m_x, m):
    """How far a maximum lies below the common one: 0 where both are -inf."""
    return tl.where(m_x == m, 0.0, m_x - m)


@triton.jit
def tilted(tilt, u, v, KIND: tl.constexpr):
    """``a·u + b·v``, or -inf where both models mask the column; less work for tamer signs."""
    a, b = tl.cast(tilt[0], tl.float32), tl.cast(tilt[1], tl.float32)
    if KIND == TEACHER:
        return b * v
    if KIND == STUDENT:
        return a * u
    if KIND == BOTH:
        return a * u + b * v
    return tl.where((u == NEG_INF) & (v == NEG_INF), NEG_INF, times(a, u) + times(b, v))


@triton.jit
def tanh(x):
    """As Triton has none: odd polynomial near 0, where ``1 - e^(-2|x|)`` cancels."""
    y = x * x
    near = x + x * y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835))))
    e = exp(-2 * tl.abs(x))
    far = (1 - e) / (1 + e)
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))


@triton.jit
def expm1(x, e):
    """``e^x - 1`` for x <= 0, given ``e = e^x``: Taylor where the difference cancels."""
    near = 1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040)))))
    return tl.where(x > -0.35, x + x * x * near, e - 1)


@triton.jit
def log1p(x):
    """``log(1 + x)`` for x <= 0. The rounding of ``1 + x`` matters, and is mended, near 0 only."""
    w = 1 + x
    return tl.log(w) + (x - (w - 1))


@triton.jit
def philox(column, row, key):
    """First word of Philox2x32-10, as in :mod:`bgkernels.rows.sampling`; integers of any width."""
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
    """Standard Gumbel numbers of a block, as in :mod:`bgkernels.rows.sampling`."""
    uniform = ((philox(column, row, key) >> 9).to(tl.float32) + 0.5) * (1 / 8388608)
    return -tl.log(-tl.log(uniform))


@triton.jit
def real_logits(raw, cap, MAP: tl.constexpr):
    """Raw head outputs to real logits in fp32; ``cap = (scale, cap)``."""
    x = raw.to(tl.float32)
    if MAP != RAW:
        x = x * tl.cast(cap[0], tl.float32)
    if MAP == CAPPED:
        bound = tl.cast(cap[1], tl.float32)
        x = bound * tanh(x * (1 / bound))
    return x


@triton.jit
def tempered(x, inv_t, SHARED: tl.constexpr):
    """Real to tempered logits; a shared softmax has temperature 1."""
    if not SHARED:
        x = x * inv_t
    return x


@triton.jit
def mixture_terms(lp, lq, omega):
    """``p_t/m``, ``log(p_s/m)`` and ``log(p_t/m)`` for ``m = omega·p_t + (1-omega)·p_s``.

    Written from the side of the larger probability, so that no exponential overflows. NaN where a
    column is masked in both models: their factors are 0 there.
    """
    omega = tl.cast(omega, tl.float32)
    delta = lq - lp
    teacher = delta > 0
    x = -tl.abs(delta)
    e = exp(x)
    larger = -log1p(tl.where(teacher, 1 - omega, omega) * expm1(x, e))
    ratio = tl.where(teacher, 1.0, e) * exp(larger)
    return ratio, larger + tl.minimum(-delta, 0.0), larger + tl.minimum(delta, 0.0)


@triton.jit
def empty(like, TILTS: tl.constexpr):
    """The neutral element, in the shape of the int32 ``like``."""
    zero, none = tl.zeros_like(like).to(tl.float32), tl.zeros_like(like) + NONE
    inf = zero + NEG_INF
    side, sums = (inf, zero, zero, zero), ()
    for _ in tl.static_range(TILTS):
        sums = sums + (side,)
    return side, side, (none, none), (inf, zero, zero), (inf, inf, inf, none), sums


@triton.jit
def recentred(side, own, other):
    """``d, h, k`` when the maxima of its own and of the other side lie that far below."""
    _, d, h, k = side
    weight = exp(own)
    return weight * d, times(weight, h + times(d, own)), times(weight, k + times(d, own - other))


@triton.jit
def merge_side(a, b, own_a, own_b, other_a, other_b):
    """``m, d, h, k`` of one model, for maxima that lie that far below the common ones."""
    x, y = recentred(a, own_a, other_a), recentred(b, own_b, other_b)
    return tl.maximum(a[0], b[0]), x[0] + y[0], x[1] + y[1], x[2] + y[2]


@triton.jit
def merge_argmax(m_a, at_a, m_b, at_b):
    """The column of the larger maximum, the lower column of equal ones."""
    tie = (m_a == m_b) & (at_a != NONE) & (at_b != NONE)
    return tl.where(tie, tl.minimum(at_a, at_b), tl.where(m_a > m_b, at_a, at_b))


@triton.jit
def merge_ce(a, b):
    """``m_c, d_c, z_sum``."""
    m = tl.maximum(a[0], b[0])
    d = exp(below(a[0], m)) * a[1] + exp(below(b[0], m)) * b[1]
    return m, d, a[2] + b[2]


@triton.jit
def merge_tilt(a, b, move_a, move_b, MOMENTS: tl.constexpr):
    """The moments ``k, q`` are of ``(u-m_s) - (v-m_t)``, whose origin moves by ``move``."""
    m = tl.maximum(a[0], b[0])
    w_a, w_b = exp(below(a[0], m)), exp(below(b[0], m))
    d, k, q = w_a * a[1] + w_b * b[1], a[2], a[3]
    if MOMENTS:
        k = times(w_a, a[2] + times(a[1], move_a)) + times(w_b, b[2] + times(b[1], move_b))
        q_a = a[3] + times(a[2], 2 * move_a) + times(a[1], move_a * move_a)
        q_b = b[3] + times(b[2], 2 * move_b) + times(b[1], move_b * move_b)
        q = times(w_a, q_a) + times(w_b, q_b)
    return m, d, k, q


@triton.jit
def merge_sums(a, b, held, MOMENTS: tl.constexpr, TILTS: tl.constexpr):
    """Everything but the label, which is given."""
    s_a, t_a, at_a, ce_a, _, tilts_a = a
    s_b, t_b, at_b, ce_b, _, tilts_b = b
    m_s, m_t = tl.maximum(s_a[0], s_b[0]), tl.maximum(t_a[0], t_b[0])
    ds_a, ds_b = below(s_a[0], m_s), below(s_b[0], m_s)
    dt_a, dt_b = below(t_a[0], m_t), below(t_b[0], m_t)
    tilts = ()
    for i in tl.static_range(TILTS):
        x = merge_tilt(tilts_a[i], tilts_b[i], ds_a - dt_a, ds_b - dt_b, MOMENTS[i])
        tilts = tilts + (x,)
    return (
        merge_side(s_a, s_b, ds_a, ds_b, dt_a, dt_b),
        merge_side(t_a, t_b, dt_a, dt_b, ds_a, ds_b),
        (
            merge_argmax(s_a[0], at_a[0], s_b[0], at_b[0]),
            merge_argmax(t_a[0], at_a[1], t_b[0], at_b[1]),
        ),
        merge_ce(ce_a, ce_b),
        held,
        tilts,
    )


@triton.jit
def merge_label(a, b):
    """``held`` of the union, and ``(z, v, label)`` of the loser; ties go to the lower column."""
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
def one_column(column, tilts, inv_t, SHARED: tl.constexpr, KINDS: tl.constexpr,
               TILTS: tl.constexpr):  # fmt: skip
    """The state of a single compared column ``(z, v, index)``; empty where the index is NONE."""
    z, v, at = column
    present = at != NONE
    u = tl.where(present, tempered(z, inv_t, SHARED), NEG_INF)
    v = tl.where(present, v, NEG_INF)
    du, dv = u - shift(u), v - shift(v)
    e_s, e_t = exp(du), exp(dv)
    _, _, _, ce, held, _ = empty(at, 0)
    ce = (ce[0], ce[1], tl.where(present, z, 0.0))
    if not SHARED:
        ce = (tl.where(present, z, NEG_INF), tl.where(present, exp(z - shift(z)), 0.0), ce[2])
    sums = ()
    for i in tl.static_range(TILTS):
        w = tilted(tilts[i], u, v, KINDS[i])
        zero = tl.zeros_like(w)
        sums = sums + ((w, exp(w - shift(w)), zero, zero),)
    s = (u, e_s, times(e_s, du), times(e_s, du - dv))
    t = (v, e_t, times(e_t, dv), times(e_t, dv - du))
    return s, t, (at, at), ce, held, sums


@triton.jit
def merge(a, b, tilts, inv_t, RULE: tl.constexpr, SHARED: tl.constexpr, KINDS: tl.constexpr,
          MOMENTS: tl.constexpr, TILTS: tl.constexpr):  # fmt: skip
    """The state of the union of two disjoint sets of columns; the label that loses is absorbed."""
    held, loser = merge_label(a[4], b[4])
    out = merge_sums(a, b, held, MOMENTS, TILTS)
    if RULE != INDEX:
        one = one_column(loser, tilts, inv_t, SHARED, KINDS, TILTS)
        out = merge_sums(out, one, held, MOMENTS, TILTS)
    return out


@triton.jit
def first_at(x, m, columns):
    """The lowest of ``columns`` where ``x`` is ``m``."""
    return tl.min(tl.where(x == m, columns, NOWHERE), 0)


@triton.jit
def reduce_pair(u, v, columns, before):
    """``s, t, argmax`` of a block of columns, and ``(u-m_s) - (v-m_t)``; -inf takes no part.

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
    return s, t, (at_s, at_t), x


@triton.jit
def reduce_tilt(u, v, x, m_s, m_t, tilt, KIND: tl.constexpr, MOMENTS: tl.constexpr):
    """``(m, d, k, q)`` of a block of columns."""
    w = tilted(tilt, u, v, KIND)
    if KIND >= TEACHER:  # or STUDENT
        m = tilted(tilt, m_s, m_t, KIND)  # rounding is monotone: this is the maximum of w
    else:
        m = tl.max(w, 0)
    e = exp(w - shift(m))
    k, q = tl.zeros_like(m), tl.zeros_like(m)
    if MOMENTS:
        k, q = tl.sum(times(e, x), 0), tl.sum(times(e, x * x), 0)
    return m, tl.sum(e, 0), k, q


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
def sign(x):
    """-1, 0 or 1; a NaN stays a NaN."""
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))


@triton.jit
def pair_sums(lp, lq, omega):
    """Terms of one mixture, to be summed over columns."""
    p, q = exp(lp), exp(lq)
    ratio, log_s, log_t = mixture_terms(lp, lq, omega)
    return times(q, log_t), times(p, log_s), times(p, ratio)


@triton.jit
def vjp_line(lp, lq, a, b, c, d):
    """``e^lp·(A + B·lp - C·lq) - D·e^lq``: the gradient over compared columns."""
    p = exp(lp)
    # Where p is not 0, lp is finite, so that lq alone needs the rule 0·(±inf) = 0.
    slope = tl.where(p == 0, 0.0, b * lp - times(c, lq))
    return (a + slope) * p - times(d, exp(lq))


@triton.jit
def vjp_tilt(u, v, tilt, coefficients, KIND: tl.constexpr, MOMENTS: tl.constexpr):
    """``e^(a·u+b·v-lse)·(P0 + P1·x + P2·x²)`` with ``x = u - v``."""
    lse, terms, p1, p2 = coefficients
    weight = exp(tilted(tilt, u, v, KIND) - lse)
    if MOMENTS:
        x = u - v
        terms = terms + (p1 + p2 * x) * x
    return times(weight, terms)


@triton.jit
def vjp_mixture(lp, lq, omega, y, first: tl.constexpr):
    """``e^lp·(Y0 + Y1·p_t/m + Y2·log(p_s/m))``."""
    ratio, log_ratio, _ = mixture_terms(lp, lq, omega)
    return times(exp(lp), y[first] + y[first + 1] * ratio + y[first + 2] * log_ratio)
