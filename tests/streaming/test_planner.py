"""The planner: a plan covers its work and fits its budget."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bgkernels as bg
from bgkernels.backends import BACKENDS
from bgkernels.rows.extras import Tilt
from bgkernels.rows.spec import RowSpec
from bgkernels.streaming import driver, gemm
from bgkernels.streaming.cost import COST
from bgkernels.streaming.heads import Needs
from bgkernels.streaming.planner import Plan, Workload, plan
from bgkernels.streaming.problem import Problem
from bgkernels.streaming.shard import Shard

sizes = st.integers(1, 300)


@given(
    rows=sizes,
    columns=st.integers(1, 5000),
    hidden=st.integers(1, 64),
    logit_bytes=st.sampled_from([0, 4, 8]),
    sums=st.booleans(),
    passes=st.sampled_from([(True, False), (True, True), (False, True)]),
    budget=st.integers(10_000, 50_000_000),
)
def test_a_plan_fits_and_covers(
    rows: int, columns: int, hidden: int, logit_bytes: int, sums: bool, passes: tuple[bool, bool],
    budget: int,
) -> None:  # fmt: skip
    work = Workload(
        rows=rows, columns=columns, compared=columns, hidden_s=hidden, hidden_t=hidden,
        logit_bytes=logit_bytes, tile_bytes=2, weight_bytes=4, row_bytes=100,
        weight_sum_bytes=4 * columns * hidden * sums, weight_grad_bytes=2 * hidden * sums,
        input_sum_bytes=4 * rows * hidden * sums, grad_products=2,
        statistics=passes[0], backward=passes[1],
    )  # fmt: skip
    try:
        p = plan(work, budget)
    except ValueError as error:
        least = int(str(error).split("at least ")[1].split()[0])
        assert least > budget
        p = plan(work, least)
        budget = least
    assert p.bytes <= budget
    assert p.lent < p.kept <= len(p.tiles())
    for slot, i in enumerate(range(len(p.tiles()) - p.lent, len(p.tiles()))):
        end = (slot + 1) * p.chunk * p.width * logit_bytes
        assert p.chunk_count == 1 and end <= p.tiles()[i].start * work.weight_grad_bytes
    assert [i for c in p.chunks() for i in range(c.start, c.stop)] == list(range(rows))
    assert [i for c in p.tiles() for i in range(c.start, c.stop)] == list(range(columns))
    assert [i for g in p.tile_groups() for i in g] == list(range(len(p.tiles())))
    widths = [c.stop - c.start for c in p.tiles()]
    assert max(widths) <= max(COST["cpu"].width, 64) + 64
    assert widths[-1] >= min(columns, widths[0] // 2 - 64 * len(widths))


def test_plans_of_the_same_work_are_the_same() -> None:
    work = Workload(
        rows=1024, columns=151_936, compared=151_936, hidden_s=896, hidden_t=1536, logit_bytes=8,
        tile_bytes=0, weight_bytes=8, row_bytes=2000, weight_sum_bytes=0, weight_grad_bytes=1792,
        grad_products=2,
    )  # fmt: skip
    first: Plan = plan(work, 1 << 30)
    assert first == plan(work, 1 << 30)
    assert first.kept == len(first.tiles()), "a gigabyte holds what 1,024 tokens need"


def test_a_tight_budget_lends_the_gradient_of_the_weight() -> None:
    """Its end is written last, so its beginning holds tiles at no cost."""
    work = Workload(
        rows=32, columns=151_936, compared=151_936, hidden_s=896, hidden_t=1536, logit_bytes=8,
        tile_bytes=0, weight_bytes=0, row_bytes=2000, weight_sum_bytes=0, weight_grad_bytes=1792,
        grad_products=2,
    )  # fmt: skip
    p = plan(work, 8 << 20)
    assert p.lent >= 2 and p.kept == len(p.tiles())


@pytest.mark.parametrize("product", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("widths", [(640, 1152), (1152, 2560), (2560, 5376)])
def test_a_huge_vocabulary_plans_within_256_mebibytes(
    product: torch.dtype, device: str, widths: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """32,768 tokens of a vocabulary of 262,144: statistics, then the gradients in two walks."""
    rows, vocab = 32_768, 262_144
    monkeypatch.setattr(gemm, "product_dtype", lambda dtype, device: product)
    monkeypatch.setattr(gemm, "logits_dtype", lambda dtype, device: torch.float32)
    heads = [
        tuple(torch.empty(n, d, dtype=torch.bfloat16, device="meta") for n in (rows, vocab))
        for d in widths
    ]
    problem = Problem(
        spec=RowSpec(vocab, vocab, extras=(Tilt(0.0, 0.1),)),
        backend=BACKENDS["native"],
        student=(*heads[0], None),
        teacher=bg.LinearTeacher(*heads[1]),
        labels=torch.empty(rows, device="meta"),
        leading=(rows,),
        shard=Shard((0, vocab)),
    )
    for needs in (Needs(), Needs(input=True), Needs(weight=True)):
        work = driver.workload(problem, needs, statistics=not needs.any, backward=needs.any)
        assert plan(replace(work, device=device), 256 << 20).bytes <= 256 << 20


def test_given_logits_are_walked_in_one_chunk() -> None:
    """They lie in memory that is there already: a kept tile takes nothing."""
    for rows, columns in ((1024, 16_384), (256, 151_936)):
        work = Workload(
            rows=rows, columns=columns, compared=columns, hidden_s=0, hidden_t=0, logit_bytes=0,
            tile_bytes=0, weight_bytes=0, row_bytes=504, weight_sum_bytes=0, weight_grad_bytes=0,
            grad_products=1,
        )  # fmt: skip
        p = plan(work, 128 << 20)
        assert (p.chunk, p.slot_bytes, p.kept) == (rows, 0, len(p.tiles()))
