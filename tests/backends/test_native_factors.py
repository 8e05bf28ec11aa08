"""Primitives on logits that they multiply themselves, against the eager backend in float64.

Factors are small integers and binary fractions: every sum is exact in fp32, and both see the same.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bgkernels.backends.base import Code, Factors, Tile
from bgkernels.backends.code import row_words
from bgkernels.backends.native import NativeBackend
from bgkernels.rows.arithmetic import SKIP
from bgkernels.rows.spec import RowSpec
from bgkernels.rows.state import empty
from tests.backends.cases import CASES, LABELS, PADDED, PAIRS, WIDTH, labels_of
from tests.conformance import Case, check
from tests.conftest import needs_brgemm

BF16 = torch.bfloat16
pytestmark = needs_brgemm


def factors(rows: int, columns: int, depth: int, seed: int) -> Factors:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randint(-2, 3, (rows, depth), generator=g)
    weight = torch.randint(-4, 5, (columns, depth), generator=g) / (8 if depth < 100 else 32)
    return Factors(hidden.to(BF16), weight.to(BF16))


class Multiplying(NativeBackend):
    """It has the logits of tiles as factors alone."""

    def __init__(self, student: Factors, teacher: Factors | None) -> None:
        self.student, self.teacher = student, teacher

    def _multiplied(self, tile: Tile) -> Tile:
        def part(x: Factors, like: Tensor) -> Factors:
            columns = slice(tile.first_column, tile.first_column + like.shape[1])
            return Factors(x.hidden, x.weight[columns])

        def shape(like: Tensor) -> Tensor:
            return torch.full((1, like.shape[1]), float("nan")).expand(like.shape)

        student, teacher = part(self.student, tile.student), None
        if self.teacher is not None and tile.teacher is not None:
            teacher = part(self.teacher, tile.teacher)
        blank = None if tile.teacher is None else shape(tile.teacher)
        return replace(tile, student=shape(tile.student), teacher=blank, factors=(student, teacher))

    def absorb_(self, state: Any, tile: Tile, *args: Any) -> None:
        super().absorb_(state, self._multiplied(tile), *args)

    def vjp(self, out: Tensor, tile: Tile, *args: Any) -> None:
        super().vjp(out, self._multiplied(tile), *args)


def made(
    spec: RowSpec, labels: list[int], depths: tuple[int, int] = (48, 80), cuts: tuple[int, ...] = ()
) -> tuple[Multiplying, Case]:
    rows = len(labels)
    s = factors(rows, spec.columns, depths[0], 1)
    t = factors(rows, spec.compared, depths[1], 2) if spec.compared else None
    logits = [None if x is None else (x.hidden.double() @ x.weight.double().t()).float()
              for x in (s, t)]  # fmt: skip
    assert logits[0] is not None
    return Multiplying(s, t), Case(spec, logits[0], logits[1], torch.tensor(labels), cuts)


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_everything_against_float64(name: str, cut: bool) -> None:
    """Every kind of statistic; whole, and cut into tiles."""
    spec, _ = CASES[name]
    backend, case = made(spec, labels_of(spec), cuts=(70, PADDED + 2) if cut else ())
    check(backend, case)


@pytest.mark.parametrize("depths", [(2, 1), (33, 48), (1100, 1057)])
def test_depths_that_are_odd_tiny_or_added_up_in_parts(depths: tuple[int, int]) -> None:
    check(*made(RowSpec(WIDTH, PADDED, 2.0, extras=PAIRS), LABELS, depths))


@pytest.mark.parametrize("rows", [1, 7, 64, 65, 200])
def test_rows_around_blocks(rows: int) -> None:
    labels = [SKIP if i % 9 == 4 else i * 5 % WIDTH for i in range(rows)]
    check(*made(RowSpec(WIDTH, WIDTH), labels), out=BF16)


@pytest.mark.parametrize("columns", [1, 255, 1024, 1025, 2100])
def test_columns_around_spans(columns: int) -> None:
    check(*made(RowSpec(columns, columns), [0, columns - 1, columns // 2] * 5), out=BF16)


def test_strided_operands() -> None:
    backend, case = made(RowSpec(WIDTH, WIDTH), LABELS)
    hidden, weight, _ = backend.student
    apart = torch.full((len(LABELS), 3 * hidden.shape[1]), float("nan"), dtype=BF16)
    apart[:, ::3] = hidden
    turned = weight.t().contiguous().t()
    check(Multiplying(Factors(apart[:, ::3], turned), backend.teacher), case)


def test_one_model_may_be_given() -> None:
    """The teacher's logits lie in memory beside the student's factors."""
    backend, case = made(RowSpec(WIDTH, PADDED), LABELS)

    class Given(Multiplying):
        def _multiplied(self, tile: Tile) -> Tile:
            return replace(super()._multiplied(tile), teacher=tile.teacher)

    check(Given(backend.student, None), case)


def test_the_number_of_threads_changes_no_bit() -> None:
    labels = torch.arange(150) * 7 % WIDTH
    backend, case = made(RowSpec(WIDTH, WIDTH), labels.tolist())
    (tile,), before, states = case.tiles(), torch.get_num_threads(), []
    for threads in (1, 2, 5, 16):
        torch.set_num_threads(threads)
        try:
            states.append(empty(150, case.spec, dtype=torch.float32, device=labels.device))
            backend.absorb_(states[-1], tile, labels, case.spec)
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(states[0].floats, x.floats) for x in states)
    assert all(torch.equal(states[0].ints, x.ints) for x in states)


def test_codes_are_those_of_logits_in_memory() -> None:
    """They are written where logits are multiplied, and in pass 2 nothing is."""
    spec, labels = RowSpec(2100, 2000), torch.arange(70)
    backend, case = made(spec, labels.tolist())
    (tile,), words = case.tiles(), []
    for b in (backend, NativeBackend()):
        memory = torch.zeros(70, row_words(2100))
        code = Code(memory[:, :2100].view(torch.int32), memory[:, 2100:], 256)
        state = empty(70, spec, dtype=torch.float32, device=labels.device)
        b.absorb_(state, replace(tile, code=code), labels, spec)
        words.append((code.words.clone(), code.centres[:, :16].clone()))
    assert all(torch.equal(a, b) for a, b in zip(*words, strict=True))
