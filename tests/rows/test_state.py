"""The state is a commutative monoid, however a row is cut and in whatever order it is read."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bgkernels.rows.state import RowState, empty, merge
from tests.conformance import sums_of
from tests.problems import CPU, DTYPES, cells, normal
from tests.situations import (
    COLUMNS,
    INF,
    ROWS,
    Situation,
    absorbed,
    cuts,
    ranges,
    situations,
    statistics,
)


def neutral(situation: Situation) -> RowState:
    """The state of no column."""
    z, *_, spec = situation
    return empty(ROWS, spec, dtype=z.dtype, device=CPU)


def assert_same(a: RowState, b: RowState, tolerance: float = 1e-11) -> None:
    assert torch.equal(a.ints, b.ints)
    for i, name in sums_of(a.spec):
        torch.testing.assert_close(
            a.floats[i], b.floats[i], rtol=tolerance, atol=tolerance, equal_nan=True,
            msg=lambda message, name=name: f"{name}: {message}",
        )  # fmt: skip


def of_parts(situation: Situation, edges: list[int]) -> list[RowState]:
    """A state for each column range, with something in the sums of the second read too."""
    states = [absorbed(situation, [part]) for part in ranges(edges)]
    for k, state in enumerate(states):
        for i, extra in enumerate(state.spec.extras):
            if extra.second_read:
                state.extra(i).copy_(normal(*state.extra(i).shape, seed=10 * k + i))
    return states


@given(situations(), st.tuples(st.integers(1, 19), st.integers(20, COLUMNS - 1)))
def test_merge_is_associative_and_commutative(situation: Situation, edges: tuple[int, int]) -> None:
    states = of_parts(situation, list(edges))
    expected = merge(states[0], merge(states[1], states[2]))
    for a, b, c in permutations(states):
        assert_same(merge(merge(a, b), c), expected)


@given(situations())
def test_the_empty_state_is_neutral(situation: Situation) -> None:
    (state,), nothing = of_parts(situation, []), neutral(situation)
    for merged in (merge(state, nothing), merge(nothing, state)):
        assert_same(merged, state, 0)
    assert_same(merge(nothing, nothing), nothing, 0)


@given(situations())
def test_maxima_are_the_greatest_logits_but_the_label_s(situation: Situation) -> None:
    z, v, _, spec = situation
    state = absorbed(situation, ranges([7, 22]))
    held_out = torch.arange(COLUMNS) == state["label"][:, None]
    for side, x in (("s", z), ("t", v)):
        m, at = x.masked_fill(held_out, -INF)[:, : spec.compared].max(1)
        m, at = m / spec.temperature, at.masked_fill(m == -INF, -1)
        m[2], at[2] = -INF, -1  # the row that is skipped
        torch.testing.assert_close(state[f"m_{side}"], m)
        assert torch.equal(state[f"argmax_{side}"], at)


@pytest.mark.parametrize("backend", [backend for backend, _ in cells("fp32")])
@given(situations())
def test_skipped_rows_are_left_alone(backend: str, situation: Situation) -> None:
    z, v, labels, spec = situation
    z[2], v[2] = math.nan, INF
    situation = (z.float(), v.float(), labels, spec)
    state, nothing = absorbed(situation, ranges([11]), backend), neutral(situation)
    assert torch.equal(state.floats[:, 2], nothing.floats[:, 2])
    assert torch.equal(state.ints[:, 2], nothing.ints[:, 2])
    _, out = statistics(situation, ranges([11]), backend)
    stats = out.row_stats(-5)
    assert stats.label[2] == -5 and stats.valid.tolist() == [True, True, False, True, True, True]
    assert not out.values[:, 2].any()


@pytest.mark.parametrize(("backend", "dtype"), cells("fp64", "fp32"))
@given(situations(), cuts, st.randoms(use_true_random=False))
def test_tile_splits_change_nothing(
    backend: str, dtype: str, situation: Situation, edges: list[int], order: object
) -> None:
    z, v, labels, spec = situation
    situation = (z.to(DTYPES[dtype]), v.to(DTYPES[dtype]), labels, spec)
    parts = ranges(edges)
    order.shuffle(parts)  # type: ignore[attr-defined]
    (_, whole), (_, cut) = (statistics(situation, x, backend) for x in (ranges([]), parts))
    assert torch.equal(whole.ints, cut.ints)
    tolerance = 1e-10 if dtype == "fp64" else 1e-4
    torch.testing.assert_close(
        cut.values, whole.values, rtol=tolerance, atol=tolerance, equal_nan=True
    )
