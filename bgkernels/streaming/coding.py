"""The coding of kept tiles: the logits of both models in one word of four bytes a (row, column).

The difference of two models that are nearly equal is all that a gradient sees of them, so that it
must not be a difference of rounded logits. With ``du = scale·u - m_s`` and ``dv = scale·v - m_t``
about centres ``m``, the maxima of a row's block of columns, two fp16 numbers are kept:

* ``max(du, dv)``: the likelier model's logit, as exact as its distance from the row's maximum;
* ``du - dv``: the models' difference, as exact as itself, whatever the logits are.

Half a unit in the last place is 2⁻¹¹ of either number, so that probabilities ``p = e^du``,
``q = e^dv`` relative to their maximum come out wrong by at most ``2⁻¹¹·|ln max|·max`` and
``2⁻¹¹·|ln min/max|·min``, neither of which exceeds 2⁻¹¹/e: 1.8e-4.

A column that one model or both rule out stays ruled out. What fp16 cannot say is told apart: a
tile with a NaN, with +inf, with finite numbers more than 65,504 apart, or with a maximum far beyond
a soft-cap is not coded at all, and its logits are multiplied again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from bgkernels.backends.native import coding as native
from bgkernels.rows.arithmetic import NEG_INF, SKIP
from bgkernels.rows.spec import Cap

BLOCK = 512
"""Compared columns of a row that share two centres."""
MOST_HALF = 65504.0
MOST_CAPS = 4.0
"""Centres are at most so many soft-caps: there, the cap has flattened all differences."""

Caps = tuple[Cap, Cap]
"""The maps from raw to real logits, of student and teacher."""


def words(columns: int, compared: int) -> int:
    """Words of four bytes that a row of a tile takes."""
    return columns + 2 * math.ceil(compared / BLOCK)


def encode(x: Tensor, v: Tensor | None, caps: Caps, code: Tensor, labels: Tensor) -> bool:
    """Code a tile.

    Args:
        x: ``(rows, width)`` raw outputs of the student, fp32.
        v: ``(rows, compared)`` those of the teacher in the leading columns, or None.
        caps: of both.
        code: ``(rows, words(width, compared))`` fp32; written.
        labels: ``(rows,)`` int64; rows that are ``SKIP`` are left out.

    Returns:
        Whether every row could be coded; if not, ``code`` holds nothing.
    """
    if native.serves(x):
        return native.encode(x, v, caps, code, labels)
    compared, told = 0 if v is None else v.shape[1], labels == SKIP
    failed = torch.zeros_like(told)
    for columns, centres, level, gap in blocks(code, compared):
        assert v is not None
        d = []
        for k, (logits, cap) in enumerate(zip((x, v), caps, strict=True)):
            real = logits[:, columns] * cap.scale
            m = real.nan_to_num(nan=NEG_INF, posinf=math.inf, neginf=NEG_INF).amax(1)
            m = m.masked_fill(m == NEG_INF, 0)
            failed |= m > (MOST_CAPS * cap.cap if cap.cap else 3e38)
            centres[:, k] = m
            d.append(real - m[:, None])
        most, between = torch.maximum(*d), d[0] - d[1]
        between[(d[0] == NEG_INF) & (d[1] == NEG_INF)] = 0
        beyond = ~((most >= -MOST_HALF) | (most == NEG_INF))
        beyond |= ~((between.abs() <= MOST_HALF) | between.isinf())
        failed |= beyond.any(1)
        level.copy_(most)
        gap.copy_(between)
    code[:, words(compared, compared) :] = x[:, compared:]
    return not bool((failed & ~told).any())


def decode(
    code: Tensor, compared: int, cap: Cap, teacher: bool, out: Tensor, labels: Tensor
) -> None:
    """Write one model's raw outputs of a coded tile.

    Args:
        code: of :func:`encode`, which returned True.
        compared: columns of the teacher's tile.
        cap: of that model.
        teacher: which of the two.
        out: ``(rows, width)`` or, of the teacher, ``(rows, compared)``, fp32; written.
        labels: as they were.
    """
    if native.serves(out):
        return native.decode(code, compared, cap, teacher, out, labels)
    for columns, centres, level, gap in blocks(code, compared):
        less = gap.float().mul_(-1 if teacher else 1).clamp_max_(0)
        out[:, columns] = (level.float() + less + centres[:, int(teacher), None]) / cap.scale
    if not teacher:
        out[:, compared:] = code[:, words(compared, compared) :]


def blocks(code: Tensor, compared: int) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Columns, centres ``(rows, 2)``, levels and gaps ``(rows, columns)`` of each block."""
    at = 0
    for first in range(0, compared, BLOCK):
        n = min(BLOCK, compared - first)
        halves = code[:, at + 2 : at + 2 + n].view(torch.float16)
        yield slice(first, first + n), code[:, at : at + 2], halves[:, :n], halves[:, n:]
        at += n + 2
