"""A caller's own sum of the gradient of the head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bgkernels as bg
from bgkernels.streaming import driver
from bgkernels.streaming.planner import Plan, Workload

ROWS, HIDDEN, VOCAB = 13, 8, 150


def tensors(dtype: torch.dtype) -> tuple[Tensor, Tensor, bg.LinearTeacher, Tensor]:
    x, w, h, v = (torch.randn(n, d) for n, d in ((13, 8), (150, 8), (13, 6), (150, 6)))
    x, w, h, v = (t.to(dtype) for t in (x, w, h, v))
    return x.requires_grad_(), w.requires_grad_(), bg.LinearTeacher(h, v), torch.arange(ROWS)


@pytest.fixture(params=[ROWS, 4], ids=["one chunk", "four"])
def plans(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Workload]:
    asked: list[Workload] = []

    def plan(work: Workload, budget: int | None) -> Plan:
        asked.append(work)
        return Plan(work.rows, work.columns, request.param, 64, 1, 0)

    monkeypatch.setattr(driver, "plan", plan)
    driver.PLANS.clear()
    return asked


@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize("mode", ["fused", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_is_added(
    dtype: torch.dtype, mode: str, backend: str, plans: list[Workload]
) -> None:
    """To what is there, step after step; nothing is planned for a sum beside it."""
    x, w, *rest = tensors(dtype)
    options: dict[str, Any] = {"mode": mode, "backend": backend}
    bg.linear_hybrid_distillation(x, w, *rest, **options).backward()
    dx, dw = x.grad, w.grad
    assert dx is not None and dw is not None
    x.grad = w.grad = None
    start = 0.01 * torch.randn(VOCAB, HIDDEN)  # so that its own rounding is none
    total = start.clone()
    for step in (1, 2):
        bg.linear_hybrid_distillation(x, w, *rest, **options, weight_grad=total).backward()
        assert w.grad is None and torch.equal(x.grad / step, dx)
        eps = 1e-6 if dtype == torch.float32 else 8e-3
        assert (total - start - step * dw.float()).norm() <= eps * step * dw.float().norm()
    ours = [work for work in plans if work.weight_owned]
    assert ours and not any(work.weight_sum_bytes or work.weight_grad_bytes for work in ours)


def test_factors_that_come_after_the_forward_pass() -> None:
    x, w, *rest = tensors(torch.float32)
    totals = [torch.zeros(VOCAB, HIDDEN) for _ in range(2)]
    loss = bg.linear_hybrid_distillation(x, w, *rest, mode="recompute", weight_grad=totals[0])
    (loss / 3).backward()
    divided = bg.linear_hybrid_distillation(x, w, *rest, num_items=3 * ROWS, weight_grad=totals[1])
    divided.backward()
    torch.testing.assert_close(totals[0], totals[1])
    loss = bg.linear_hybrid_distillation(x, w, *rest, weight_grad=totals[0])
    with pytest.raises(RuntimeError, match=r"`weight_grad`.*0.333333 times.*recompute"):
        (loss / 3).backward()
    loss = bg.linear_hybrid_distillation(x, w, *rest, weight_grad=totals[0])
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"holds the gradient of this loss already"):
        loss.backward()


def test_fp16_waits_for_its_loss_scale() -> None:
    """Fused mode cannot know it, so the sum is added to in backward."""
    x, w, *rest = tensors(torch.float16)
    total = torch.zeros(VOCAB, HIDDEN)
    loss = bg.linear_hybrid_distillation(x, w, *rest, weight_grad=total)
    assert not total.any()
    (1024 * loss).backward()
    assert total.any() and w.grad is None
    with pytest.raises(ValueError, match="loss scale is known in backward only"):
        bg.linear_hybrid_distillation(x, w, *rest, weight_grad=total, mode="fused")


def test_nothing_is_added_where_no_gradient_is_asked_for() -> None:
    x, w, *rest = tensors(torch.float32)
    total = torch.zeros(VOCAB, HIDDEN)
    with torch.no_grad():
        bg.linear_hybrid_distillation(x, w, *rest, weight_grad=total)
    assert not total.any()


def test_a_module_and_a_plan_take_it() -> None:
    x, w, *rest = tensors(torch.bfloat16)
    total = torch.zeros(VOCAB, HIDDEN)
    bg.LinearHybridDistillationLoss()(x, w, *rest, weight_grad=total).backward()
    assert total.any()
    assert bg.plan(x, w, *rest, weight_grad=total).mode == "fused"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(VOCAB, HIDDEN, dtype=torch.bfloat16), "contiguous and torch.float32"),
        (torch.zeros(VOCAB, HIDDEN + 1), r"`weight_grad`.*linear_weight"),
        (torch.zeros(HIDDEN, VOCAB).t(), "contiguous"),
        (torch.zeros(VOCAB, HIDDEN, requires_grad=True), "must not require grad"),
    ],
    ids=["dtype", "shape", "strides", "leaf"],
)
def test_a_sum_that_does_not_fit(wrong: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bg.linear_hybrid_distillation(*tensors(torch.float32), weight_grad=wrong)


def test_a_frozen_head_has_no_sum() -> None:
    x, w, *rest = tensors(torch.float32)
    with pytest.raises(ValueError, match="`linear_weight` must"):
        bg.linear_hybrid_distillation(x, w.detach(), *rest, weight_grad=torch.zeros(VOCAB, HIDDEN))
