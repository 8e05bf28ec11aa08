"""Pass 1 and pass 2 beside a copy of memory, per backend and dtype, from logits that miss cache."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import primitives
from benchmarks.limits import Memcpy


@pytest.fixture(scope="module")
def memcpy_rate() -> float:
    """GB/s, reads and writes counted, in this run."""
    copy = Memcpy()
    (seconds,) = primitives.interleaved([copy], 5)
    return copy.bytes / seconds / 1e9


VARIANTS = [(b, d) for d in primitives.DTYPES for b in primitives.usable(d)]


@pytest.mark.parametrize("which", primitives.PASSES)
@pytest.mark.parametrize("routing", primitives.ROUTINGS)
@pytest.mark.parametrize(("backend", "dtype"), VARIANTS)
def test_pass(
    benchmark: Any, memcpy_rate: float, backend: str, dtype: str, routing: str, which: str
) -> None:
    benchmark.group = f"{which}, {routing} routing, {dtype}"
    work = primitives.passes(backend, dtype, routing)[primitives.PASSES.index(which)]
    rounds = 2 if backend in primitives.ROWS else 10
    benchmark.pedantic(work.run, rounds=rounds, warmup_rounds=1)
    benchmark.extra_info["bytes"] = work.bytes
    if benchmark.stats:  # absent with --benchmark-disable
        rate = work.bytes / benchmark.stats.stats.median / 1e9
        shares = {"memcpy GB/s": memcpy_rate, "share of memcpy": rate / memcpy_rate}
        benchmark.extra_info |= {"GB/s": rate} | shares


def test_memcpy(benchmark: Any) -> None:
    copy = Memcpy()
    benchmark.pedantic(copy.run, rounds=10, warmup_rounds=1)
    benchmark.extra_info["bytes"] = copy.bytes
