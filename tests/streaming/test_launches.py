"""What a step starts: two primitives a tile beside its products, and little between the passes.

Counted on a CPU under a dispatch mode. A few of its operations look at values, which a GPU leaves
out: there are no more launches there.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import bgkernels as bg
from bgkernels.backends.native import call
from bgkernels.streaming import driver
from bgkernels.streaming.planner import Plan, Workload

pytest.importorskip("bgkernels.backends.native._C")
ROWS, HIDDEN, VOCAB = 24, 8, 384
PRODUCTS = ("mm", "addmm", "addmm_")
NOTHING_STARTS = ("empty", "detach", "_unsafe_view", "_local_scalar_dense")


class Launches(TorchDispatchMode):
    """Operations that write something, by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and not name.startswith(NOTHING_STARTS):
            self.counts["products" if name in PRODUCTS else "others"] += 1
        return func(*args, **(kwargs or {}))


def counted(
    chunks: int, tiles: int, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> Counter[str]:
    def plan(work: Workload, budget: int | None) -> Plan:
        return Plan(work.rows, work.columns, ROWS // chunks, VOCAB // tiles, tiles, 0)

    mode, run = Launches(), call.Kernels.run

    def counting(self: call.Kernels, primitive: str, *args: Any, **kwargs: Any) -> None:
        mode.counts[primitive] += 1
        run(self, primitive, *args, **kwargs)

    x, w = (torch.randn(n, HIDDEN, requires_grad=True) for n in (ROWS, VOCAB))
    teacher = bg.LinearTeacher(torch.randn(ROWS, 6), torch.randn(VOCAB, 6))
    with monkeypatch.context() as patch:
        patch.setattr(driver, "plan", plan)
        patch.setattr(call.Kernels, "run", counting)
        driver.PLANS.clear()
        with mode:
            bg.linear_hybrid_distillation(
                x, w, teacher, torch.arange(ROWS), mode="fused", backend="native", **options
            )
    driver.PLANS.clear()
    return mode.counts


@pytest.mark.parametrize("divergence", ["forward_kl", "generalized_jsd", "alpha_beta"])
@pytest.mark.parametrize("routing", ["entropy", "confidence", "threshold"])
def test_launches_of_a_chunk(
    divergence: str, routing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a built-in objective: at most 100 between the passes; a tile adds its primitives alone."""
    options = {"divergence": divergence, "routing": routing, "temperature": 2.0}
    counted(2, 3, monkeypatch, **options)  # what is remembered from a first call
    two, four = (counted(n, 3, monkeypatch, **options) for n in (2, 4))
    wide = counted(2, 6, monkeypatch, **options)
    assert (four["others"] - two["others"]) / 2 + 2 <= 100  # beside finalize and fold
    assert wide["others"] == two["others"]
    assert wide["absorb"] == wide["vjp"] == 2 * two["vjp"] == 2 * 6
    assert wide["products"] == 2 * 6 * 4
    second = divergence == "generalized_jsd"
    assert wide["absorb_pairs"] == second * 2 * 6
    assert wide["finalize"] == 2 * (1 + second) and wide["fold"] == 2
