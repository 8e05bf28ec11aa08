"""A code keeps the logits of both models in one word of four bytes a (row, column).

The difference of two models that are nearly equal is all that a gradient sees of them, so that it
must not be a difference of rounded logits. With ``du = u - m_s`` and ``dv = v - m_t``, real logits
about centres ``m``, the maxima of a block of columns, a word holds two fp16 numbers:

* ``max(du, dv)``: the likelier model's logit, as exact as its distance from the maximum;
* ``du - dv``: the models' difference, as exact as itself, whatever the logits are.

Half a unit in the last place is 2⁻¹¹ of either number, so that probabilities ``p = e^du``,
``q = e^dv`` relative to their maximum come out wrong by at most ``2⁻¹¹·|ln max|·max`` and
``2⁻¹¹·|ln min/max|·min``, neither of which exceeds 2⁻¹¹/e: 1.8e-4.

A column that one model or both rule out stays ruled out, and one that is more than 65,504 below the
maxima counts as ruled out, which is what its probability says. A row with NaN or +inf has NaN
statistics, and so a NaN gradient, whatever its code is.

Backends write codes in pass 1 and read them in what comes after it. The functions here are the
reference, in torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bgkernels.rows.arithmetic import shift

LEAST_BLOCK = 256
"""Columns that share centres, in any backend, are a multiple of so many."""


@dataclass(frozen=True)
class Code:
    """The code of a tile; where the teacher has no column, a word is the student's logit in fp32.

    Args:
        words: ``(rows, width)`` int32, ``max(du, dv)`` in the lower half, ``du - dv`` in the upper
            one; rows may be strided.
        centres: ``(rows, 2 * blocks)`` fp32, of student and teacher in turn.
        block: columns that share centres.
    """

    words: Tensor
    centres: Tensor
    block: int

    def write(self, z: Tensor, v: Tensor | None) -> None:
        """Code real logits: the student's ``(rows, width)``, the teacher's ``(rows, compared)``."""
        compared = 0 if v is None else v.shape[1]
        for columns, centres in self._blocks(compared):
            assert v is not None
            d = []
            for k, x in enumerate((z[:, columns], v[:, columns])):
                centres[:, k] = shift(x.amax(1))
                d.append(x.float() - centres[:, k, None])
            gap = d[0] - d[1].clamp_min(torch.finfo(torch.float32).min)  # not of two infinities
            words = self.words[:, columns]
            words.copy_(_bits(gap) << 16 | _bits(torch.maximum(*d)))
        self.words[:, compared:] = z[:, compared:].float().contiguous().view(torch.int32)

    def read(self, compared: int) -> tuple[Tensor, Tensor]:
        """Return the real logits it tells, ``(rows, width)`` and ``(rows, compared)``."""
        z = self.words.contiguous().view(torch.float32)
        z, v = z.clone(), z[:, :compared].clone()
        for columns, centres in self._blocks(compared):
            words = self.words[:, columns]
            level, gap = _half(words), _half(words >> 16)
            z[:, columns] = level + gap.clamp_max(0) + centres[:, :1]
            v[:, columns] = level - gap.clamp_min(0) + centres[:, 1:]
        return z, v

    def _blocks(self, compared: int) -> Iterator[tuple[slice, Tensor]]:
        """Columns and centres ``(rows, 2)`` of each block."""
        for i, first in enumerate(range(0, compared, self.block)):
            yield (
                slice(first, min(first + self.block, compared)),
                self.centres[:, 2 * i : 2 * i + 2],
            )


def row_words(columns: int) -> int:
    """Return the words of four bytes that a row of a tile takes at most, its centres too."""
    return columns + 2 * math.ceil(columns / LEAST_BLOCK)


def _bits(x: Tensor) -> Tensor:
    """Return the bits of numbers in fp16, in the lower halves of words."""
    return x.half().view(torch.int16).int() & 0xFFFF


def _half(words: Tensor) -> Tensor:
    """Return the numbers whose bits in fp16 are in the lower halves of words."""
    return words.to(torch.int16).view(torch.float16).float()
