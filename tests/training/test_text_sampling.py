"""Draws are the distribution's, each row's own, and shared by those that are given one seed."""

from __future__ import annotations

import pytest
import torch

from bgkernels.training.sampling import PLACES, Sampler, row_seeds

CPU = torch.device("cpu")


def draws(logits: torch.Tensor, rows: int, position: int = 0, temperature: float = 1.0):
    sampler = Sampler(row_seeds(0, rows), logits.shape[-1], temperature, CPU)
    return sampler(logits.expand(rows, -1), position)


@pytest.mark.parametrize("position", [0, PLACES - 1, PLACES + 3])
@pytest.mark.parametrize("vocab, temperature", [(1, 1.0), (2, 1.0), (50, 0.7), (64, 2.0), (65, 1)])
def test_frequencies(vocab, temperature, position):
    rows = 4000
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(vocab))
    expected = (logits / temperature).softmax(-1) * rows
    found = draws(logits, rows, position, temperature).bincount(minlength=vocab)
    assert ((found - expected) ** 2 / expected).sum() < vocab + 5 * (2 * vocab) ** 0.5


def test_a_column_of_no_mass_is_not_drawn():
    logits = torch.full((30,), -torch.inf)
    logits[[3, 4, 29]] = 0.0
    assert set(draws(logits, 300).tolist()) == {3, 4, 29}


def test_positions_are_independent():
    one, two = (draws(torch.zeros(8), 4000, position) for position in (5, 6))
    pairs = (one * 8 + two).bincount(minlength=64)
    assert ((pairs - 62.5) ** 2 / 62.5).sum() < 64 + 5 * 128**0.5


def test_a_position_is_the_same_in_any_order():
    logits = torch.randn(20, 100, generator=torch.Generator().manual_seed(0))
    sampler = Sampler(row_seeds(3, 20), 100, 1.0, CPU)
    positions = [0, PLACES, 1, 2 * PLACES, PLACES - 1]
    first = [sampler(logits, position) for position in positions]
    again = [Sampler(row_seeds(3, 20), 100, 1.0, CPU)(logits, p) for p in reversed(positions)]
    assert all(map(torch.equal, first, reversed(again)))


def test_alike_distributions_draw_alike():
    """Independent draws of 100 columns would agree once in some forty times."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(100, generator=generator)
    near = logits + 0.05 * torch.randn(100, generator=generator)
    rows = 4000
    distance = float((logits.softmax(-1) - near.softmax(-1)).abs().sum() / 2)
    differing = (draws(logits, rows) != draws(near, rows)).double().mean()
    assert distance * 0.9 < differing < 4 * distance
