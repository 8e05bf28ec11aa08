"""Conformance notices any single fault of a backend."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from bgkernels.backends.base import Tile
from bgkernels.backends.native import NativeBackend
from bgkernels.rows.extras import Mixture, Tempered, Tilt, TotalVariation
from bgkernels.rows.spec import COEFFICIENTS, RowSpec
from bgkernels.rows.state import RowState
from tests.conformance import Case, check, make, sums_of

pytest.importorskip("bgkernels.backends.native._C")


class Mutant(NativeBackend):
    """A backend with one fault.

    Args:
        fault: its name.
        row: of the matrix that the fault is in.
    """

    def __init__(self, fault: str, row: int) -> None:
        self.fault, self.row = fault, row

    def absorb_(
        self, state: RowState, tile: Tile, labels: Tensor, spec: RowSpec, *normalisers: Any
    ) -> None:
        before = state.floats.clone()
        super().absorb_(state, tile, labels, spec, *normalisers)
        if self.fault == "forgotten sum" and tile.first_column:
            state.floats[self.row] = before[self.row]

    def finalize(self, state: RowState, labels: Tensor, spec: RowSpec, out: Tensor) -> None:
        super().finalize(state, labels, spec, out)
        if self.fault == "field at a wrong offset":
            out[self.row :] = out[self.row :].roll(1, 0)

    def fold(self, statistics: Tensor, grads: Tensor, labels: Tensor, spec: RowSpec) -> Tensor:
        out = super().fold(statistics, grads, labels, spec)
        if self.fault == "scaled coefficient":
            out[self.row] *= 1.01
        if self.fault == "swapped coefficients":
            out[[self.row, self.row + 1]] = out[[self.row + 1, self.row]]
        if self.fault == "factor at a wrong offset":
            out[self.row :] = out[self.row :].roll(1, 0)
        return out


MUTANT_SPEC = RowSpec(200, 190, 2.0, logit_sum=True, extras=(
    Mixture(0.5), Tilt(0.3, 0.6, True), TotalVariation(), Tempered()))  # fmt: skip
SUMS = [row for row, _ in sums_of(MUTANT_SPEC) if row not in (11, 12, 13)]  # not the label's
FACTORS = [i for i in range(MUTANT_SPEC.factor_count) if COEFFICIENTS[i:][:1] != ("D_y",)]
FAULTS = [
    *(("forgotten sum", row) for row in SUMS),
    *(("scaled coefficient", row) for row in FACTORS),
    *(("swapped coefficients", row) for row in (0, 3, 4, 7, 16, 22)),
    *(("field at a wrong offset", part.start) for part in MUTANT_SPEC.fields),
    *(("factor at a wrong offset", part.start) for part in MUTANT_SPEC.factors),
]


def mutant_case() -> Case:
    """Every maximum rises in the second tile."""
    case = make(MUTANT_SPEC, [3, 150, 20, 195], cuts=(100,))
    assert case.teacher is not None
    case.student[:, 100:] += 9
    case.teacher[:, 100:] += 9
    return case


@pytest.mark.parametrize("fault, row", FAULTS)
def test_faults_are_noticed(fault: str, row: int) -> None:
    """Conformance fails for a backend with any single one."""
    with pytest.raises(AssertionError):
        check(Mutant(fault, row), mutant_case())


def test_no_fault_is_no_failure() -> None:
    check(Mutant("none", 0), mutant_case())
