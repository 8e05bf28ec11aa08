"""Every divergence × policy × teacher × mode × backend × dtype against the oracle.

The registries are walked, so a new entry is enrolled by existing.
"""

from __future__ import annotations

from itertools import product

import pytest

import bgkernels as bg
from bgkernels.backends import BACKENDS
from tests import oracle
from tests.conftest import Tiling
from tests.mutants import FAULTS, Mutant
from tests.problems import (
    DTYPES,
    OF_DIVERGENCE,
    OF_ROUTING,
    Failures,
    Loss,
    cells,
    conform,
    make,
    runs,
)

DIVERGENCES, POLICIES = list(bg.divergences.registry), list(bg.routing.registry)

ON = pytest.mark.parametrize(("backend", "dtype"), cells("fp64", "fp32", "bf16"))


def cell(failures: Failures, kind: str, loss: Loss, backend: str, dtype: str) -> None:
    name = (
        kind,
        loss.divergence,
        *loss.of_divergence.values(),
        loss.routing,
        *loss.of_routing.values(),
    )
    with failures.cell(*name):
        conform(make(kind), loss, DTYPES[dtype], runs(backend, loss))


def test_the_oracle_knows_every_entry() -> None:
    assert set(DIVERGENCES) == set(oracle.DIVERGENCES)
    assert set(POLICIES) == set(oracle.POLICIES)
    assert set(OF_DIVERGENCE) <= set(DIVERGENCES) and set(OF_ROUTING) <= set(POLICIES)


@ON
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_pair(divergence: str, backend: str, dtype: str, tiling: Tiling) -> None:
    """Of the two kinds of student and three dtypes, each pair meets two."""
    tiling(chunk=25, width=192)
    turn = DIVERGENCES.index(divergence) + list(DTYPES).index(dtype)
    with Failures() as failures:
        for i, (routing, kind) in enumerate(product(POLICIES, ("linear", "logits"))):
            if (i + turn) % 3 == 0:
                cell(failures, kind, Loss(divergence, routing), backend, dtype)


@ON
@pytest.mark.parametrize("divergence", OF_DIVERGENCE)
def test_parameters_of_divergences(
    divergence: str, backend: str, dtype: str, tiling: Tiling
) -> None:
    tiling(chunk=48, width=128, kept=2)
    with Failures() as failures:
        for i, params in enumerate(OF_DIVERGENCE[divergence], list(DTYPES).index(dtype)):
            kind = ("mixed", "logits")[i % 2]
            cell(failures, kind, Loss(divergence, "static", params), backend, dtype)


@pytest.mark.parametrize(("backend", "dtype"), cells("fp16"))
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_fp16(divergence: str, backend: str, dtype: str, tiling: Tiling) -> None:
    tiling(chunk=25, width=192)
    with Failures() as failures:
        for kind, routing in product(("linear", "logits"), ("entropy", "risk_guided")):
            cell(failures, kind, Loss(divergence, routing), backend, dtype)


@pytest.mark.parametrize(("backend", "dtype"), cells("fp32", "bf16"))
@pytest.mark.parametrize("kind", ["linear", "logits"])
def test_wrong_gradients_fail(
    kind: str, backend: str, dtype: str, tiling: Tiling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tolerance itself: what conforms must not conform once its gradient is spoilt."""
    tiling(chunk=25, width=192)
    problem, loss = make(kind), Loss("jeffreys", "static")
    faults = {"none": lambda out, tile: None, **FAULTS}
    for (fault, spoil), mode in product(faults.items(), ("fused", "recompute")):
        name = f"{backend}, {fault}"  # one for each, since a name stands for a backend for good
        monkeypatch.setitem(BACKENDS, name, Mutant(BACKENDS[backend], spoil))
        run = {"backend": name, "mode": mode}
        if fault == "none":
            conform(problem, loss, DTYPES[dtype], [run])
            continue
        with pytest.raises(AssertionError, match=r"largest error|projection|error of row"):
            conform(problem, loss, DTYPES[dtype], [run])
            pytest.fail(f"{fault} passed")  # not an AssertionError
