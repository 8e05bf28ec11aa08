"""The running state of a pair of logits rows is a commutative monoid under :func:`merge`.

Notation, for one row: ``z`` are the student's *real* logits (after scale and soft-cap),
``u = z / T`` and ``v`` the tempered logits of student and teacher. Over the columns seen so far,
**except the label's**, the state holds, for the student,

    m_s = max u                        d_s = Σ e^(u-m_s)
    h_s = Σ e^(u-m_s) (u-m_s)          k_s = Σ e^(u-m_s) ((u-m_s) - (v-m_t))

the mirror image ``m_t, d_t, h_t, k_t`` for the teacher, ``m_c, d_c`` for the student's own
cross-entropy (all its columns, at temperature 1) and ``z_sum = Σ z``. Every sum is centred at its
own maximum, so a common offset of the logits costs no digit.

The label's column is *held out*: the state carries its index, score and both logits. A given index,
the teacher's argmax and a Gumbel-max sample are one rule with three scores, and the loser of a
merge is absorbed like any column. Holding it out keeps ``1 - p[label]`` exact where ``p[label]``
approaches one (see :func:`bgkernels.rows.stats.finalize`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bgkernels.rows.arithmetic import NEG_INF, NONE, shift, times
from bgkernels.rows.extras import Moves
from bgkernels.rows.spec import FLOATS, INTS, RowSpec

MAXIMA, LABEL_LOGITS = slice(0, 9, 4), slice(11, 14)
"""Rows that are -inf in an empty state: ``m_s, m_t, m_c``, and ``score, z_y, v_y``."""
LABEL = ("score", "z_y", "v_y", "label")
INDEX = {**{name: i for i, name in enumerate(FLOATS)}, **{n: i for i, n in enumerate(INTS)}}


@dataclass(frozen=True)
class RowState:
    """The state of some rows is two matrices with a column for each of them.

    Args:
        floats: ``(spec.sum_count, rows)`` in the order of ``FLOATS``, then the sums of each extra.
        ints: ``(3, rows)`` int64 in the order of ``INTS``.
        spec: of the rows.
    """

    floats: Tensor
    ints: Tensor
    spec: RowSpec

    def __getitem__(self, name: str) -> Tensor:
        """Return the matrix row of that name, ``(rows,)``."""
        return (self.ints if name in INTS else self.floats)[INDEX[name]]

    def extra(self, i: int) -> Tensor:
        """Return the sums of the ``i``-th extra statistic, ``(sums, rows)``."""
        return self.floats[self.spec.sums[i]]

    def precise(self) -> RowState:
        """Return the same state in fp64, where the device has it: a few numbers a row are cheap."""
        has_double = self.floats.device.type != "mps"
        return RowState(self.floats.double() if has_double else self.floats, self.ints, self.spec)

    def label_logit(self, side: str) -> Tensor:
        """Return the label's tempered logit, -inf where the label is not a compared column."""
        if side == "t":
            return self["v_y"]
        compared = (self["label"] >= 0) & (self["label"] < self.spec.compared)
        return torch.where(compared, self["z_y"] / self.spec.temperature, NEG_INF)


def empty(rows: int, spec: RowSpec, *, dtype: torch.dtype, device: torch.device) -> RowState:
    """Return the state of no column, for ``rows`` rows."""
    floats = torch.zeros(spec.sum_count, rows, dtype=dtype, device=device)
    for place in (MAXIMA, LABEL_LOGITS):  # an index list would be copied to the device
        floats[place].fill_(NEG_INF)
    for extra, place in zip(spec.extras, spec.sums, strict=True):
        if "m" in extra.sums:
            floats[place.start + extra.sums.index("m")].fill_(NEG_INF)
    ints = torch.full((len(INTS), rows), NONE, dtype=torch.int64, device=device)
    return RowState(floats, ints, spec)


def merge(a: RowState, b: RowState) -> RowState:
    """Return the state of the union of two disjoint sets of columns.

    It is associative and commutative up to rounding.
    """
    # A tie goes to the lower column, as in torch.argmax.
    lower = (a["label"] != NONE) & ((a["label"] < b["label"]) | (b["label"] == NONE))
    a_wins = (a["score"] > b["score"]) | ((a["score"] == b["score"]) & lower)
    out = merge_sums(a, b)
    for name in LABEL:
        out[name].copy_(torch.where(a_wins, a[name], b[name]))
    if a.spec.label_rule == "index":
        return out
    label, z_y, v_y = (torch.where(a_wins, b[name], a[name]) for name in ("label", "z_y", "v_y"))
    return absorb_column(out, label, z_y, v_y)


def absorb_column(state: RowState, column: Tensor, z: Tensor, v: Tensor) -> RowState:
    """Return ``state`` with one more column a row, none where ``column`` is NONE.

    Args:
        state: of the other columns; what it says of the label is kept.
        column: ``(rows,)`` int64.
        z: ``(rows,)`` real logits of the student.
        v: ``(rows,)`` tempered logits of the teacher.
    """
    spec = state.spec
    single = empty(len(z), spec, dtype=z.dtype, device=z.device)
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
        single[name].copy_(value)
    for i, extra in enumerate(spec.extras):
        if not extra.second_read:
            single.extra(i).copy_(torch.stack(extra.column(u, v, spec.temperature)))
    out = merge_sums(state, single)
    for name in LABEL:
        out[name].copy_(state[name])
    return out


def merge_sums(a: RowState, b: RowState) -> RowState:
    """Merge all that does not depend on the label; its rows stay uninitialised."""
    spec = a.spec
    out = RowState(torch.empty_like(a.floats), torch.empty_like(a.ints), spec)
    moves: list[list[Tensor]] = [[], []]
    for side in "st":
        _merge_maxima(out, a, b, side)
        for state_moves, x in zip(moves, (a, b), strict=True):
            m = out[f"m_{side}"]
            state_moves.append(torch.where(x[f"m_{side}"] == m, 0.0, x[f"m_{side}"] - m))
    for k, side in enumerate("st"):
        totals = {name: torch.zeros_like(out["d_s"]) for name in "dhk"}
        for x, state_moves in zip((a, b), moves, strict=True):
            move, gap = state_moves[k], state_moves[k] - state_moves[1 - k]
            weight, d = move.exp(), x[f"d_{side}"]
            totals["d"] = totals["d"] + weight * d
            totals["h"] = totals["h"] + times(weight, x[f"h_{side}"] + times(d, move))
            totals["k"] = totals["k"] + times(weight, x[f"k_{side}"] + times(d, gap))
        for name, total in totals.items():
            out[f"{name}_{side}"].copy_(total)
    m_c = torch.maximum(a["m_c"], b["m_c"])
    out["m_c"].copy_(m_c)
    d_c = [torch.where(x["m_c"] == m_c, 0.0, x["m_c"] - m_c).exp() * x["d_c"] for x in (a, b)]
    out["d_c"].copy_(d_c[0] + d_c[1])
    out["z_sum"].copy_(a["z_sum"] + b["z_sum"])
    pairs: list[Moves] = [(s, t) for s, t in moves]
    for i, extra in enumerate(spec.extras):
        extra.merge(out.extra(i), (a.extra(i), b.extra(i)), pairs, spec.temperature)
    return out


def _merge_maxima(out: RowState, a: RowState, b: RowState, side: str) -> None:
    """Write the larger maximum and its column; of equal ones, the lower column."""
    m_a, m_b, at_a, at_b = (x[f"{name}_{side}"] for name in ("m", "argmax") for x in (a, b))
    lower, winner = torch.minimum(at_a, at_b), torch.where(m_a > m_b, at_a, at_b)
    tie = (m_a == m_b) & (lower != NONE)
    out[f"m_{side}"].copy_(torch.maximum(m_a, m_b))
    out[f"argmax_{side}"].copy_(torch.where(tie, lower, winner))
