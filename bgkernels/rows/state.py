"""The running state of a pair of logits rows: a commutative monoid under :func:`merge`.

Notation, for one row: ``z`` are the student's *real* logits (after scale and soft-cap),
``u = z / T`` and ``v`` the tempered logits of student and teacher. Over the columns seen so far,
**except the label's**, the state holds, for the student,

    m_s = max u        d_s = Σ e^(u-m_s)        h_s = Σ e^(u-m_s) (u-m_s)        k_s = Σ e^(u-m_s)
    ((u-m_s) - (v-m_t))

the mirror image ``m_t, d_t, h_t, k_t`` for the teacher, ``m_c, d_c`` for the student's own
cross-entropy (all its columns, at temperature 1) and ``z_sum = Σ z``. Every sum is centred at its
own maximum, so a common offset of the logits costs no digit.

The label's column is *held out*: the state carries its index, score and both logits. A given index,
the teacher's argmax and a Gumbel-max sample are one rule with three scores, and the loser of a
merge is absorbed like any column. Holding it out keeps ``1 - p[label]`` exact where ``p[label]``
approaches one (see :func:`bgkernels.rows.stats.finalize`).

The ``-inf`` rule, stated once: an empty state has shift 0, and 0 · (±inf) = 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from bgkernels.rows.spec import RowSpec, Tilt

FLOATS = ("m_s", "d_s", "h_s", "k_s", "m_t", "d_t", "h_t", "k_t",
          "m_c", "d_c", "z_sum", "score", "z_y", "v_y")  # fmt: skip
INTS = ("label", "argmax_s", "argmax_t")
TILT = ("m", "d", "k", "q")
NONE, SKIP = -1, -2
"""Label codes: not known before the pass (argmax, sample), and a row that takes no part."""

NEG_INF = float("-inf")


@dataclass
class RowState:
    """State columns of many rows, one contiguous vector a column.

    Args:
        floats: ``(14 + 4·tilts, rows)`` in the order of ``FLOATS``, then ``TILT`` for each tilt.
        ints: ``(3, rows)`` int64 in the order of ``INTS``.
    """

    floats: Tensor
    ints: Tensor
    columns: dict[str, Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        names = (*zip(FLOATS, self.floats, strict=False), *zip(INTS, self.ints, strict=True))
        self.columns = dict(names)

    def __getitem__(self, name: str) -> Tensor:
        return self.columns[name]

    def precise(self) -> RowState:
        """The same state in fp64, where the device has it: a few numbers a row cost nothing."""
        has = self.floats.device.type != "mps"
        return RowState(self.floats.double() if has else self.floats, self.ints)

    def tilt(self, i: int) -> Tensor:
        """``(4, rows)`` columns ``m, d, k, q`` of the ``i``-th tilt."""
        start = len(FLOATS) + len(TILT) * i
        return self.floats[start : start + len(TILT)]


def empty(rows: int, tilts: int, *, dtype: torch.dtype, device: torch.device) -> RowState:
    """The neutral element, for ``rows`` rows."""
    floats = torch.zeros(len(FLOATS) + len(TILT) * tilts, rows, dtype=dtype, device=device)
    maxima = [FLOATS.index(n) for n in ("m_s", "m_t", "m_c", "score", "z_y", "v_y")]
    maxima += [len(FLOATS) + len(TILT) * i for i in range(tilts)]
    for i in maxima:  # an index list would be copied to the device, and waited for
        floats[i].fill_(NEG_INF)
    return RowState(floats, torch.full((len(INTS), rows), NONE, dtype=torch.int64, device=device))


def shift(m: Tensor) -> Tensor:
    """The centre that belongs to a maximum: itself, or 0 for an empty state."""
    return torch.where(m == NEG_INF, 0.0, m)


def times(weight: Tensor, x: Tensor) -> Tensor:
    """``weight · x`` with 0 · (±inf) = 0; a NaN weight stays a NaN."""
    return torch.where(weight == 0, 0.0, weight * x)


def scaled(a: float, x: Tensor) -> Tensor:
    """``a · x`` with 0 · (±inf) = 0, for a number ``a``."""
    return torch.zeros_like(x) if a == 0 else x * a


def tilted(tilt: Tilt, u: Tensor, v: Tensor) -> Tensor:
    """``a·u + b·v``, or -inf (no weight) where both models mask the column, whatever a and b."""
    w = scaled(tilt.a, u) + scaled(tilt.b, v)
    if min(tilt.a, tilt.b) < 0 or tilt.a == tilt.b == 0:
        return torch.where((u == NEG_INF) & (v == NEG_INF), NEG_INF, w)
    return w


def merge(a: RowState, b: RowState, spec: RowSpec) -> RowState:
    """The state of the union of two disjoint sets of columns.

    Associative and commutative up to rounding.
    """
    # A tie goes to the lower column, as in torch.argmax.
    lower = (a["label"] != NONE) & ((a["label"] < b["label"]) | (b["label"] == NONE))
    a_wins = (a["score"] > b["score"]) | ((a["score"] == b["score"]) & lower)
    out = merge_sums(a, b)
    for name in ("score", "z_y", "v_y", "label"):
        out[name].copy_(torch.where(a_wins, a[name], b[name]))
    if spec.label_rule == "index":
        return out
    label, z_y, v_y = (torch.where(a_wins, b[name], a[name]) for name in ("label", "z_y", "v_y"))
    return absorb_column(out, label, z_y, v_y, spec)


def absorb_column(state: RowState, column: Tensor, z: Tensor, v: Tensor, spec: RowSpec) -> RowState:
    """``state`` with one more column a row, none where ``column`` is NONE.

    ``z`` is the real student logit, ``v`` the tempered teacher logit.
    """
    one = empty(len(z), len(spec.tilts), dtype=z.dtype, device=z.device)
    compared = (column >= 0) & (column < spec.compared)
    u = torch.where(compared, z / spec.temperature, NEG_INF)
    v = torch.where(compared, v, NEG_INF)
    du, dv = u - shift(u), v - shift(v)
    e_s, e_t = du.exp(), dv.exp()
    values = {
        "m_s": u, "d_s": e_s, "h_s": times(e_s, du), "k_s": times(e_s, du - dv),
        "m_t": v, "d_t": e_t, "h_t": times(e_t, dv), "k_t": times(e_t, dv - du),
        "argmax_s": torch.where(compared, column, NONE),
        "argmax_t": torch.where(compared, column, NONE),
    }  # fmt: skip
    present = column >= 0
    if not spec.shared_softmax:
        values["m_c"] = torch.where(present, z, NEG_INF)
        values["d_c"] = torch.where(present, (z - shift(z)).exp(), 0.0)
    values["z_sum"] = torch.where(present, z, 0.0)
    for name, value in values.items():
        one[name].copy_(value)
    for i, tilt in enumerate(spec.tilts):
        w = tilted(tilt, u, v)
        one.tilt(i)[0].copy_(w)
        one.tilt(i)[1].copy_((w - shift(w)).exp())
    out = merge_sums(state, one)
    for name in ("score", "z_y", "v_y", "label"):
        out[name].copy_(state[name])
    return out


def merge_sums(a: RowState, b: RowState) -> RowState:
    """The part of :func:`merge` that leaves the label alone."""
    out = RowState(torch.empty_like(a.floats), torch.empty_like(a.ints))
    delta = {}
    for side in "st":
        m = torch.maximum(a[f"m_{side}"], b[f"m_{side}"])
        delta[side] = [torch.where(x[f"m_{side}"] == m, 0.0, x[f"m_{side}"] - m) for x in (a, b)]
        out[f"m_{side}"].copy_(m)
        lower = torch.minimum(a[f"argmax_{side}"], b[f"argmax_{side}"])
        winner = torch.where(
            a[f"m_{side}"] > b[f"m_{side}"], a[f"argmax_{side}"], b[f"argmax_{side}"]
        )
        tie = (a[f"m_{side}"] == b[f"m_{side}"]) & (lower != NONE)
        out[f"argmax_{side}"].copy_(torch.where(tie, lower, winner))
    for side, other in ("st", "ts"):
        parts = []
        for x, d_own, d_other in zip((a, b), delta[side], delta[other], strict=True):
            weight = d_own.exp()
            d = x[f"d_{side}"]
            h = x[f"h_{side}"] + times(d, d_own)
            k = x[f"k_{side}"] + times(d, d_own - d_other)
            parts.append((weight * d, times(weight, h), times(weight, k)))
        for name, left, right in zip("dhk", *parts, strict=True):
            out[f"{name}_{side}"].copy_(left + right)
    m_c = torch.maximum(a["m_c"], b["m_c"])
    out["m_c"].copy_(m_c)
    d_c = [torch.where(x["m_c"] == m_c, 0.0, x["m_c"] - m_c).exp() * x["d_c"] for x in (a, b)]
    out["d_c"].copy_(d_c[0] + d_c[1])
    out["z_sum"].copy_(a["z_sum"] + b["z_sum"])
    difference = [d_s - d_t for d_s, d_t in zip(delta["s"], delta["t"], strict=True)]
    for i in range((a.floats.shape[0] - len(FLOATS)) // len(TILT)):
        _merge_tilt(out.tilt(i), (a.tilt(i), b.tilt(i)), difference)
    return out


def _merge_tilt(out: Tensor, parts: tuple[Tensor, Tensor], difference: list[Tensor]) -> None:
    """Merge ``(4, rows)`` tilt columns.

    ``k`` and ``q`` are moments of ``(u-m_s) - (v-m_t)``, whose origin moves by ``difference``.
    """
    m = torch.maximum(parts[0][0], parts[1][0])
    out.zero_()
    out[0] = m
    for (m_x, d, k, q), move in zip(parts, difference, strict=True):
        weight = torch.where(m_x == m, 0.0, m_x - m).exp()
        out[1] += weight * d
        out[2] += times(weight, k + times(d, move))
        out[3] += times(weight, q + times(k, 2 * move) + times(d, move * move))
