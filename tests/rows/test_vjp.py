"""Pass 2 writes the vector-Jacobian product of the statistics, each by itself and all at once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bgkernels.backends import BACKENDS
from bgkernels.rows.spec import DIFFERENTIABLE, FIELDS
from tests.gradients import LABELS, SPECS, check
from tests.problems import DTYPES, Failures, cells, normal
from tests.situations import EXTRAS, columns, ranges, statistics

ON = pytest.mark.parametrize(("backend", "dtype"), cells("fp64", "fp32"))


@ON
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("style", ["normal", "offset"])
def test_fields_have_the_derivatives_of_dense_rows(
    style: str, name: str, backend: str, dtype: str
) -> None:
    if SPECS[name].student.cap and style == "offset":
        style = "ties"  # a soft-cap flattens an offset, and with it every gradient
    z, v = (x.to(DTYPES[dtype]) for x in columns(style, 3))
    spec = replace(SPECS[name], logit_sum=True)
    with Failures() as failures:
        check((z, v, LABELS, spec), backend, DIFFERENTIABLE, failures)


@ON
def test_the_fold_is_linear(backend: str, dtype: str) -> None:
    """In the derivatives; those of fields without a gradient are not read."""
    z, v = (x.to(DTYPES[dtype]) for x in columns("normal", 3))
    spec = replace(SPECS["warm"], extras=EXTRAS)
    _, out = statistics((z, v, LABELS, spec), ranges([9]), backend)
    a, b = (normal(*out.values.shape, seed=seed) for seed in (1, 2))
    fold = BACKENDS[backend].fold

    def folded(grads: torch.Tensor) -> torch.Tensor:
        coefficients = fold(out.values, grads, LABELS, spec)
        return torch.cat([coefficients[3:13], *(coefficients[x][1:] for x in spec.factors)])

    # The rows left out are normalisers, which no derivative moves.
    torch.testing.assert_close(folded(2 * a - b), 2 * folded(a) - folded(b))
    c = a.clone()
    fixed = [i for i, name in enumerate(FIELDS) if name not in DIFFERENTIABLE]
    c[fixed] = torch.nan
    torch.testing.assert_close(folded(c), folded(a))
