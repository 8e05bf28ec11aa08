"""What runs once a call beside the passes: the planner, routing and divergences, top-k captures."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import bgkernels as bg
from benchmarks.cases import Case, Problem
from benchmarks.entries import ENTRIES
from bgkernels.streaming.planner import Workload, plan

ROWS, VOCAB = 8192, 4096
MIB = 1 << 20


@pytest.fixture(scope="module")
def stats() -> bg.RowStats:
    """Statistics of many rows."""
    s, t = torch.randn(ROWS, VOCAB), torch.randn(ROWS, VOCAB)
    labels = torch.randint(VOCAB, (ROWS,))
    made = bg.hybrid_distillation(
        s, bg.LogitsTeacher(t), labels, routing="entropy", return_stats=True
    )
    return made[1]


def test_memcpy_of_a_column(benchmark: Any) -> None:
    """The limit of the others: one number a row, read and written."""
    source, target = torch.ones(ROWS), torch.ones(ROWS)
    benchmark(target.copy_, source)


def test_planner(benchmark: Any) -> None:
    work = Workload(
        rows=ROWS, columns=151_936, compared=151_936, hidden_s=896, hidden_t=1536, logit_bytes=8,
        tile_bytes=0, weight_bytes=4, row_bytes=4096, weight_sum_bytes=0, weight_grad_bytes=0,
        grad_products=2,
    )  # fmt: skip
    benchmark(plan, work, 512 * MIB)


@pytest.mark.parametrize("who", ["products alone", "all columns", "top 64"])
def test_cached_labels(benchmark: Any, who: str) -> None:
    """A step with cached labels beside the linear teacher's and the products that it needs."""
    form = "step" if who == "all columns" else "top-k"
    problem = Problem.of(Case("small", 256, 256, 384, 8192, form=form))
    entry = "limit" if who == "products alone" else "fused-128"
    benchmark.pedantic(ENTRIES[entry].start(problem), rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("name", ["static", "confidence", "threshold", "top_entropy", "entropy"])
def test_routing(benchmark: Any, stats: bg.RowStats, name: str) -> None:
    benchmark(bg.routing.get(name), stats)


@pytest.mark.parametrize("name", ["forward_kl", "jeffreys", "adaptive_kl"])
def test_divergence(benchmark: Any, stats: bg.RowStats, name: str) -> None:
    benchmark(bg.divergences.get(name), stats)
