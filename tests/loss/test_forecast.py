"""``bg.plan`` foretells what a step does: its walks, and the products that it multiplies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bgkernels as bg
from bgkernels.backends.native import products
from bgkernels.streaming import driver, gemm
from tests.problems import ways

ROWS, HIDDEN, HIDDEN_T, VOCAB = 46, 24, 40, 5000  # no chunk has as many rows as a head columns
Arguments = tuple[Tensor, Tensor, "bg.LinearTeacher | None", Tensor]


def arguments(dtype: torch.dtype, asked: str = "xw") -> Arguments:
    x, w, h, w_t = (
        torch.randn(n, d).to(dtype)
        for n, d in ((ROWS, HIDDEN), (VOCAB, HIDDEN), (ROWS, HIDDEN_T), (VOCAB, HIDDEN_T))
    )
    x.requires_grad_("x" in asked), w.requires_grad_("w" in asked)
    return x, w, bg.LinearTeacher(h, w_t), torch.randint(VOCAB, (ROWS,))


class Step:
    """What a step planned and multiplied."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plans: list[driver.Plan] = []
        self.multiplied = 0.0
        monkeypatch.setattr(gemm, "rate", lambda dtype: 1e9)  # it multiplies to find out
        for name in ("mm", "add_mm_", "mm_narrow"):
            monkeypatch.setattr(gemm, name, self._counted(name, getattr(gemm, name)))
        real = driver.planned

        def planned(*args: Any, **options: Any) -> driver.Plan:
            self.plans.append(real(*args, **options))
            return self.plans[-1]

        monkeypatch.setattr(driver, "planned", planned)

    def _counted(self, name: str, real: Any) -> Any:
        def call(*args: Any) -> Tensor:
            a, b = [x for x in args if isinstance(x, Tensor)][name == "add_mm_" :][:2]
            self.depth = getattr(self, "depth", 0) + 1
            if self.depth == 1:
                hidden = {HIDDEN, HIDDEN_T} & {a.shape[0], a.shape[1], b.shape[1]}
                size = a.shape[0] * a.shape[1] * b.shape[1] / hidden.pop()
                self.multiplied += size / (ROWS * VOCAB)
            try:
                return real(*args)
            finally:
                self.depth -= 1

        return call


@pytest.mark.parametrize("multiplied", ways("bf16"), indirect=True)
@pytest.mark.parametrize("asked", ["xw", "x", "w", ""])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mode": "recompute"},
        {"divergence": "generalized_jsd"},
        {"divergence": "total_variation", "mode": "recompute"},
        {"routing": "top_entropy"},
        {"reduction": "none"},
    ],
    ids=str,
)
def test_the_walks_and_products_of_a_step(
    options: dict[str, Any], asked: str, multiplied: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = arguments(torch.bfloat16, asked)
    for budget in (None, 2_000_000, 1_100_000):
        told = bg.plan(*args, memory_budget=budget, **options)
        with monkeypatch.context() as patch:
            step = Step(patch)
            loss = bg.linear_hybrid_distillation(*args, memory_budget=budget, **options)
            if asked:
                loss.sum().backward()
        used = [p for i, p in enumerate(step.plans) if i == 0 or p is not step.plans[i - 1]]
        assert [w.bytes for w in told.walks] == [p.bytes for p in used]
        assert [(w.kept, w.coded, w.rows) for w in told.walks] == [
            (p.kept, p.coded, p.chunk) for p in used
        ]
        assert told.mode == (
            "evaluation" if not asked else "fused" if len(used) == 1 else "recompute"
        )
        assert budget is None or told.bytes <= budget
        # The last tile may be narrower than the others.
        assert abs(told.products - step.multiplied) <= 0.3, (budget, told)
        assert budget is not None or told.products == pytest.approx(step.multiplied, abs=1e-3)


@pytest.mark.parametrize("way", ways("bf16"))
def test_how_operands_are_multiplied(way: str) -> None:
    with products.using(way):
        told = bg.plan(*arguments(torch.bfloat16))
        assert (told.multiplied, told.reason) == (way, products.reasons(torch.bfloat16))
    assert bg.plan(*arguments(torch.float32)).multiplied == "torch"


def test_nothing_is_computed_and_errors_are_those_of_the_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = arguments(torch.bfloat16)
    step = Step(monkeypatch)
    bg.plan(*args)
    assert not step.multiplied
    with pytest.raises(ValueError, match="`memory_budget` must be at least"):
        bg.plan(*args, memory_budget=1000)
    with pytest.raises(ValueError, match="`temperature`"):
        bg.plan(*args, temperature=0)


def test_a_step_without_a_teacher_has_a_product_less() -> None:
    x, w, _, y = arguments(torch.bfloat16)
    assert bg.plan(x, w, None, y, routing="hard").products == 3


def test_the_expected_time_is_of_all_walks_and_grows_with_their_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gemm, "rate", lambda dtype: 1e9)
    plans = [
        bg.plan(*arguments(torch.float32), mode=mode, memory_budget=budget << 10)
        for mode, budget in (("fused", 1 << 20), ("fused", 700), ("recompute", 1 << 20))
    ]
    most, least, recomputed = (plan.seconds for plan in plans)
    assert plans[1].products > plans[0].products and len(plans[2].walks) > 1
    assert most is not None and least is not None and recomputed is not None
    assert 0 < most < least and most < recomputed
    assert recomputed == sum(walk.seconds or 0.0 for walk in plans[2].walks)
    bare = ROWS * VOCAB * (3 * HIDDEN + HIDDEN_T) / 1e9
    assert bare < most < 10 * bare


def test_the_rate_of_products_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gemm._rate.cache_clear()
    rate = gemm.rate(torch.float32)
    assert rate > 0
    monkeypatch.setattr(gemm, "mm", None)
    assert gemm.rate(torch.float32) == rate
