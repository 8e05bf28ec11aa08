"""The generator behind sampled labels: known answers, and the same numbers wherever it is asked."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bgkernels.rows.sampling import gumbel, gumbel_at, key_of, philox
from bgkernels.rows.spec import RowSpec
from tests import oracle
from tests.problems import CPU
from tests.situations import COLUMNS, absorbed, codes, columns, ranges


def test_philox_gives_the_known_answers() -> None:
    """Of Random123, for counters and keys of zeros, of ones, and of digits of pi."""
    cases = {
        (0, 0, 0): 0xFF1DAE59,
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF): 0x2C3F628B,
        (0x243F6A88, 0x85A308D3, 0x13198A2E): 0xDD7CE038,
    }
    for (column, row, key), word in cases.items():
        assert philox(torch.tensor([column]), torch.tensor([row]), key).item() == word


def test_a_seed_of_64_bits_counts_whole() -> None:
    keys = [key_of(seed) for seed in (1, 1 << 32, (1 << 32) + 2, 1 << 63, -1)]
    assert keys == [1, 1, 3, 1 << 31, 0] and all(0 <= key < 1 << 32 for key in keys)


def test_a_block_is_its_points_and_any_other_cut() -> None:
    whole = gumbel(5, 7, 100, 30, 11, CPU)
    rows, places = torch.arange(5, 12)[:, None], torch.arange(100, 130)[None]
    assert torch.equal(whole, gumbel_at(places, rows, 11))
    parts = [gumbel(5, 7, start, 10, 11, CPU) for start in (100, 110, 120)]
    assert torch.equal(whole, torch.cat(parts, 1))
    below = torch.cat([gumbel(5, 3, 100, 30, 11, CPU), gumbel(8, 4, 100, 30, 11, CPU)])
    assert torch.equal(whole, below) and not torch.equal(whole, gumbel(5, 7, 100, 30, 12, CPU))


def test_numbers_are_finite_and_gumbel() -> None:
    x = gumbel(0, 200, 0, 200, 3, CPU).double()
    assert x.dtype == torch.float64 and x.isfinite().all() and x.max() < 16.7
    assert abs(x.mean() - 0.5772) < 0.02 and abs(x.var() - torch.pi**2 / 6) < 0.05


@pytest.mark.parametrize("seed", [7, (7 << 40) + 5])
def test_a_state_holds_the_label_that_the_oracle_draws(seed: int, backend: str) -> None:
    z, v = (x.float() for x in columns("normal", 1))
    spec = RowSpec(COLUMNS, COLUMNS, label_rule="sample", seed=seed)
    expected = oracle.gumbel_label(v, seed)
    expected[2] = -1  # skipped
    for edges in ([], [9], [1, 17, 30]):
        state = absorbed((z, v, codes("sample", 0), spec), ranges(edges), backend)
        assert torch.equal(state["label"], expected)
    best = absorbed((z, v, codes("argmax", 0), replace(spec, label_rule="argmax")), ranges([9]))
    assert torch.equal(best["label"], v.argmax(1).index_fill(0, torch.tensor([2]), -1))


def test_samples_follow_the_teacher() -> None:
    p = torch.tensor([0.6, 0.0, 0.3, 0.1])
    draws = (p.log() + gumbel(0, 4000, 0, 4, 1 << 40, CPU)).argmax(1)
    share = draws.bincount(minlength=4) / 4000
    assert share[1] == 0 and (share - p).abs().max() < 0.03
