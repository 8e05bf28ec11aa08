"""Whole steps whose tiles are kept in codes that a backend's primitives write and read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import bgkernels as bg
from bgkernels.streaming import driver
from bgkernels.streaming.planner import Plan, Workload

ROWS, HIDDEN, VOCAB, COMPARED, WIDTH = 12, 16, 330, 317, 128
CASES: dict[str, dict[str, object]] = {
    "forward": {"routing": "soft"},
    "jsd": {"divergence": "generalized_jsd", "temperature": 2.0},
    "capped": {"logit_softcap": 20.0, "divergence": "reverse_kl", "label_smoothing": 0.1},
}


def plans(monkeypatch: pytest.MonkeyPatch, chunk: int, count: int, coded: bool) -> list[Plan]:
    """Tiles of 128 columns, of which ``count`` are kept; what is returned is filled."""
    asked: list[Plan] = []

    def plan(work: Workload, budget: int | None) -> Plan:
        assert work.codable
        tiles = -(-work.columns // WIDTH)
        held = min(count, tiles)
        codes = (held - (work.reads == 1)) * coded
        asked.append(Plan(work.rows, work.columns, chunk, WIDTH, held, 0, coded=codes))
        return asked[-1]

    monkeypatch.setattr(driver, "plan", plan)
    driver.PLANS.clear()
    return asked


def gradients(
    backend: str, device: torch.device, options: dict[str, object], gap: float = 1e-2
) -> tuple[Tensor, ...]:
    """The loss and its gradients, of two models that are nearly equal."""
    torch.manual_seed(0)
    x, w, noise = torch.randn(ROWS, HIDDEN), torch.randn(VOCAB, HIDDEN), torch.randn(VOCAB, HIDDEN)
    x, w, w_t = (t.to(device, torch.bfloat16) for t in (x, w, w + gap * noise))
    target = torch.arange(ROWS, device=device)
    target[4] = -100
    leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
    loss = bg.linear_hybrid_distillation(
        *leaves, bg.LinearTeacher(x, w_t[:COMPARED]), target, backend=backend, mode="fused",
        **options,
    )  # fmt: skip
    return (loss.detach(), *torch.autograd.grad(loss, leaves))


def check(backend: str, device: torch.device, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one chunk with all tiles kept, and in several with some: nothing is restored."""
    for chunk, count in ((ROWS, 9), (5, 2)):
        results = []
        for coded in (False, True):
            asked = plans(monkeypatch, chunk, count, coded)
            results.append(gradients(backend, device, CASES[name]))
            assert bool(asked[0].coded) == coded
        plain, ours = results  # the second read, of jsd, is of codes as well
        # A divergence of 5e-4 that may be summed in another order.
        torch.testing.assert_close(ours[0], plain[0], rtol=1e-4, atol=0)
        for g, exact in zip(ours[1:], plain[1:], strict=True):
            assert (g - exact).double().norm() <= 2.5e-3 * exact.double().norm()
