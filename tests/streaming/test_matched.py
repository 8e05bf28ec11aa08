"""A teacher with a vocabulary of its own, against dense torch in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import bgkernels as bg
from tests.conftest import Tiling
from tests.problems import DTYPES, Loss, runs, widest
from tests.streaming.matched import Unlike, unlike
from tests.yardstick import assert_each_close

RESTS = ("bucket", "drop")
DIVERGENCES, POLICIES = list(bg.divergences.registry), list(bg.routing.registry)
PAIRS = [(d, "static") for d in DIVERGENCES] + [("forward_kl", r) for r in POLICIES]


def check(problem: Unlike, loss: Loss, dtype: str, runs: list[dict[str, Any]]) -> None:
    mine = problem.to(DTYPES[dtype])
    ref = mine.to(torch.float64).dense(loss)
    yard = ref if dtype == "fp64" else mine.dense(loss)
    for run in runs:
        got = mine.ours(loss, **run)
        eps = torch.finfo(DTYPES[dtype]).eps
        assert_each_close(["loss", *mine.student], got, ref, yard, eps, run)


SETTINGS = [
    pytest.param(rest, ("linear", "logits", "mixed")[i % 3], 1.7 if i % 2 else 1.0, pair,
                 id="-".join((rest, *pair)))
    for i, pair in enumerate(PAIRS)
    for rest in RESTS
]  # fmt: skip
"""Each pair with a kind of models and a temperature."""


@pytest.mark.parametrize(("backend", "dtype"), widest())
@pytest.mark.parametrize(("rest", "kind", "temperature", "pair"), SETTINGS)
def test_every_divergence_and_policy(
    rest: str, kind: str, temperature: float, pair: tuple[str, str], backend: str, dtype: str,
    tiling: Tiling,
) -> None:  # fmt: skip
    tiling(chunk=13, width=48)
    loss = Loss(*pair, options={"temperature": temperature, "label_smoothing": 0.1})
    check(unlike(kind, rest), loss, dtype, runs(backend, loss))
