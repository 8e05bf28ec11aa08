"""This generator draws ``teacher_sample``: the same tokens in every backend and chunking.

Philox2x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with the
column and the row as its counter and the seed as its key. A label is drawn by Gumbel-max:
``argmax_j z_t[j] - log(-log(uniform_j))`` is a sample of ``softmax(z_t)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIER, _WEYL, _WORD, ROUNDS = 0xD256D193, 0x9E3779B9, 0xFFFFFFFF, 10


def key_of(seed: int) -> int:
    """Fold a 64-bit seed into the 32-bit key."""
    return (seed ^ (seed >> 32)) & _WORD


def philox(columns: Tensor, rows: Tensor, key: int) -> Tensor:
    """Return the first word of Philox2x32-10, int64 in [0, 2³²), for broadcast int64 counters."""
    c0, c1 = columns & _WORD, rows & _WORD
    for _ in range(ROUNDS):
        product = c0 * _MULTIPLIER  # wraps modulo 2⁶⁴; its 64 bits are all that is used
        c0, c1 = ((product >> 32) & _WORD) ^ key ^ c1, product & _WORD
        key = (key + _WEYL) & _WORD
    return c0


def gumbel(
    first_row: int, rows: int, first_column: int, columns: int, seed: int, device: torch.device
) -> Tensor:
    """Return standard Gumbel numbers ``(rows, columns)``, fp32, of a block of rows and columns."""
    c = torch.arange(first_column, first_column + columns, device=device)
    r = torch.arange(first_row, first_row + rows, device=device)
    return gumbel_at(c[None, :], r[:, None], seed)


def gumbel_at(columns: Tensor, rows: Tensor, seed: int) -> Tensor:
    """Return standard Gumbel numbers, fp32, of broadcast int64 columns and rows.

    The uniform is ``(k + ½)·2⁻²³``: never 0 or 1, and exact in fp32, so that the largest value is
    16.6.
    """
    bits = philox(columns, rows, key_of(seed))
    uniform = ((bits >> 9).float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))
