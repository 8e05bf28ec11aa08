"""The fused loss beside dense torch and the bare products, at a shape for quick looks."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.accuracy import check
from benchmarks.cases import Case, Problem
from benchmarks.entries import ENTRIES
from benchmarks.primitives import usable

OURS = [f"{mode}-32-{b}" for mode in ("fused", "recompute") for b in usable("float32")]


@pytest.mark.parametrize("name", ["limit", *OURS, "dense", "compiled", "paper"])
def test_step(benchmark: Any, name: str) -> None:
    case = Case("quick look", 256, 256, 384, 8192)
    benchmark.group = f"step, {case.title}"
    found = check(name, case)
    assert found.passed, found  # a wrong result is not timed
    step = ENTRIES[name].start(Problem.of(case))
    benchmark.pedantic(step, rounds=5, warmup_rounds=1)
    benchmark.extra_info |= {"about": ENTRIES[name].about, "flops": case.flops}
