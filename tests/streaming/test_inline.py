"""Logits that primitives multiply as they read them: what a step and its planner see of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import bgkernels as bg
from bgkernels.backends.base import Factors
from bgkernels.backends.native import NativeBackend, products
from bgkernels.streaming import driver, inline, planner
from bgkernels.streaming.heads import LinearHead
from bgkernels.streaming.planner import Plan, Workload
from tests.conftest import needs_brgemm
from tests.problems import Loss, labels, make
from tests.yardstick import distances

BF16 = torch.bfloat16
pytestmark = needs_brgemm

Planned = Callable[..., list[Plan]]


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(inline, "LEAST_ROWS", 1)
    with products.using("brgemm"):
        driver.PLANS.clear()
        yield
    driver.PLANS.clear()


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Planned:
    """``planned(chunk, width, count)`` codes so many tiles; what it returns, it fills."""

    def force(chunk: int, width: int, count: int) -> list[Plan]:
        plans: list[Plan] = []

        def plan(work: Workload, budget: int | None) -> Plan:
            assert work.inline > 0
            twice = work.statistics and (work.backward or work.reads > 1)
            held = min(count, -(-work.columns // width)) * twice
            plans.append(
                Plan(work.rows, work.columns, chunk, width, held, 0, coded=held, inline=True)
            )
            return plans[-1]

        monkeypatch.setattr(driver, "plan", plan)
        driver.PLANS.clear()
        return plans

    return force


TILINGS = [(48, 512, 99), (48, 700, 0), (17, 300, 3)]
"""All tiles kept, none, some of several chunks."""


@pytest.mark.parametrize("mode", ["fused", "recompute"])
@pytest.mark.parametrize("divergence", list(bg.divergences.registry))
def test_every_divergence(divergence: str, mode: str, planned: Planned) -> None:
    """With biases, padding, ignored tokens, caps and temperature, as exact as logits in memory.

    The gradient of total variation jumps where both models say the same.
    """
    least = 5e-3 if divergence == "total_variation" else 2.5e-3
    problem = make(
        hidden=(16, 24), vocab=(1300, 1210), target=labels((3, 16), 1210),
        student_cap={"logit_scale": 0.5, "logit_softcap": 20.0}, teacher_cap={"logit_scale": -0.7},
    )  # fmt: skip
    loss, problem = Loss(divergence, options={"temperature": 1.5}), problem.to(BF16)
    exact = problem.to(torch.float64).dense(loss)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inline, "LEAST_ROWS", 99)
        yard = distances(tuple(problem.ours(loss, mode=mode)), tuple(exact))
    for tiling in TILINGS:
        plans = planned(*tiling)
        found = distances(tuple(problem.ours(loss, mode=mode)), tuple(exact))
        assert plans and all(p.inline for p in plans)
        for error, plain in zip(found, yard, strict=True):
            assert error <= max(1.1 * plain, least), (tiling, error, plain)


def data(rows: int = 40, vocab: int = 2100, **options: Any) -> Callable[[], tuple[Tensor, ...]]:
    """A step: its loss and gradients."""
    x, w, w_t = torch.randn(rows, 32), torch.randn(vocab, 32) / 4, torch.randn(vocab, 32) / 4
    x, w, w_t = (t.to(BF16) for t in (x, w, w_t))
    target = torch.arange(rows) * 50
    teacher = None if options.pop("alone", False) else bg.LinearTeacher(x, w_t)

    def step(dtype: torch.dtype = BF16) -> tuple[Tensor, ...]:
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, w)]
        theirs = teacher and bg.LinearTeacher(x.to(dtype), w_t.to(dtype))
        backend = "eager" if dtype == torch.float64 else "native"
        loss = bg.linear_hybrid_distillation(*leaves, theirs, target, backend=backend, **options)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    return step


@pytest.mark.parametrize("tiling", [(40, 1024, 99), (40, 700, 1), (13, 500, 0)])
def test_hard_labels_alone(tiling: tuple[int, int, int], planned: Planned) -> None:
    step = data(alone=True, routing="hard")
    exact, plans = step(torch.float64), planned(*tiling)
    assert max(distances(step(), exact)) <= 3e-3
    assert plans


def test_a_wrong_product_does_not_pass(planned: Planned, monkeypatch: pytest.MonkeyPatch) -> None:
    step = data()
    exact, _ = step(torch.float64), planned(40, 700, 1)
    assert max(distances(step(), exact)) <= 3e-3
    factors_of = LinearHead.factors

    def scaled(head: LinearHead, columns: slice) -> Factors:
        hidden, weight, bias = factors_of(head, columns)
        return Factors(1.05 * hidden, weight, bias)

    monkeypatch.setattr(LinearHead, "factors", scaled)
    assert max(distances(step(), exact)) > 1e-2


def test_a_bias_rules_columns_out(monkeypatch: pytest.MonkeyPatch) -> None:
    bias = torch.randn(2100).to(BF16)
    bias[510:540] = -torch.inf
    step, results = data(alone=True, routing="hard", linear_bias=bias), []
    for least in (1, 99):
        monkeypatch.setattr(inline, "LEAST_ROWS", least)
        driver.PLANS.clear()
        results.append(step())
    assert max(distances(results[0], tuple(x.double() for x in results[1]))) <= 2e-3
    assert not results[0][2][510:540].any() and results[0][2].isfinite().all()


def works(**options: Any) -> list[Workload]:
    """What the planner is asked of a step."""
    asked: list[Workload] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "plan", lambda w, b: asked.append(w) or planner.plan(w, b))
        driver.PLANS.clear()
        data(**options)()
    return asked


def test_what_is_multiplied_inline(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(work.inline for work in works())
    assert all(work.inline for work in works(alone=True, routing="hard"))
    assert all(work.inline for work in works(linear_bias=torch.zeros(2100, dtype=BF16)))
    monkeypatch.setattr(inline, "LEAST_ROWS", 41)
    assert not any(work.inline for work in works())
    monkeypatch.setattr(inline, "LEAST_ROWS", 1)
    with products.using("widen"):
        assert not any(work.inline for work in works())
    monkeypatch.setattr(NativeBackend, "multiplies", lambda *_: False)
    assert not any(work.inline for work in works())


def test_plans_have_no_memory_for_logits() -> None:
    """So that a budget holds more tiles, or a smaller one suffices."""
    sizes = {
        "rows": 1024, "columns": 151_936, "compared": 151_936, "hidden_s": 896, "hidden_t": 1536,
        "logit_bytes": 8, "tile_bytes": 2, "weight_bytes": 0, "row_bytes": 2000,
        "weight_sum_bytes": 0, "weight_grad_bytes": 1792, "grad_products": 2, "codable": True,
        "packing": 8 << 20,
    }  # fmt: skip
    multiplied, before = Workload(**sizes, inline=6 << 20), Workload(**sizes)
    for budget in (1 << 30, 1 << 27, 1 << 26):
        p, q = planner.plan(multiplied, budget), planner.plan(before, budget)
        assert p.inline and p.bytes <= budget and p.coded == p.kept
        assert p.kept / len(p.tiles()) >= q.kept / len(q.tiles())
    alone = planner.plan(Workload(**sizes | {"backward": False}, inline=6 << 20), 1 << 24)
    assert alone.kept == 0 and alone.bytes <= 1 << 24
