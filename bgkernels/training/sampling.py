"""Tokens drawn from logits by random numbers that a seed and a place in the text name."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

PLACES = 64
"""Positions whose random numbers are made at once."""


def row_seeds(seed: int, rows: int) -> list[int]:
    """A seed for each row of a batch.

    Args:
        seed: of the batch.
        rows: how many.

    Example:
        >>> row_seeds(1, 2)
        [1000003, 1000004]
    """
    return [_mixed(seed, row) for row in range(rows)]


def _mixed(seed: int, number: int) -> int:
    return (seed * 1_000_003 + number) % 2**63


class Sampler:
    """Draws a token of each row; what a row draws at a position depends on no other row.

    By the Gumbel-max trick, twice: the columns are cut into ``√vocab`` blocks, of which one is
    drawn by its mass, and of it a column. So a sample takes ``2·√vocab`` random numbers, not
    ``vocab``. Samples of two distributions by the same numbers differ where these do.

    Args:
        seeds: one a row.
        vocab: columns of the logits.
        temperature: 0 takes the largest.
        device: of the logits.

    Example:
        >>> draw = Sampler([3, 4], vocab=10, temperature=1.0, device=torch.device("cpu"))
        >>> draw(torch.eye(2, 10) * 1e3, position=7)
        tensor([0, 1])
    """

    def __init__(
        self, seeds: list[int], vocab: int, temperature: float, device: torch.device
    ) -> None:
        self.seeds, self.vocab, self.temperature = seeds, vocab, temperature
        self.width = math.isqrt(vocab - 1) + 1
        self.blocks = -(-vocab // self.width)
        self.generator = torch.Generator(device)
        self.first_block = torch.arange(len(seeds), device=device) * self.blocks
        self.known = -1
        self.gumbel: tuple[Tensor, Tensor]

    def __call__(self, logits: Tensor, position: int) -> Tensor:
        """Draw.

        Args:
            logits: ``(rows, vocab)``.
            position: of the new tokens, from the beginning of the text.

        Returns:
            ``(rows,)`` int64.
        """
        if not self.temperature:
            return logits.argmax(-1)
        if self.temperature != 1:
            logits = logits / self.temperature
        if unused := self.blocks * self.width - self.vocab:
            logits = nn.functional.pad(logits, (0, unused), value=-math.inf)
        of_block, of_column = self._gumbel(position)
        mass = logits.softmax(-1).view(-1, self.blocks, self.width).sum(-1)
        block = (mass.log() + of_block).argmax(-1)
        inside = logits.reshape(-1, self.width).index_select(0, block + self.first_block)
        return block * self.width + (inside + of_column).argmax(-1)

    def _gumbel(self, position: int) -> tuple[Tensor, Tensor]:
        """``(rows, blocks)`` and ``(rows, width)`` standard Gumbel numbers of a position."""
        part, place = divmod(position, PLACES)
        if part != self.known:
            uniform = torch.stack([self._uniform(_mixed(seed, part)) for seed in self.seeds], 1)
            gumbel = uniform.log_().neg_().log_().neg_()
            self.known, self.gumbel = part, gumbel.split([self.blocks, self.width], -1)
        of_block, of_column = self.gumbel
        return of_block[place], of_column[place]

    def _uniform(self, seed: int) -> Tensor:
        """``(PLACES, blocks + width)`` of one row."""
        generator = self.generator.manual_seed(seed)
        size = PLACES, self.blocks + self.width
        return torch.rand(size, generator=generator, device=generator.device)
