"""What every GPU backend is held to on a real device, beside conformance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import bgkernels as bg
from bgkernels.backends.base import Backend
from bgkernels.rows.extras import Mixture, Tempered, Tilt
from bgkernels.rows.spec import FIELDS, RowSpec
from bgkernels.streaming import driver
from bgkernels.streaming.planner import Plan
from tests.conformance import Case, Result, settled, statistics

DEVICE = torch.device("cuda:0")
SIZES = [(70_000, 32_768), (9_000, 248_320)]
"""Rows and columns: more rows, and more elements, than small integers count."""
PLANS = (
    Plan(512, 20_000, 512, 4096, 1, 0),
    Plan(512, 20_000, 128, 4096, 3, 0, coded=2),
    Plan(512, 20_000, 128, 4096, 3, 0, groups=3, coded=2, deferred=3, deposited=1),
)


def on_device(rows: int, vocab: int, device: torch.device = DEVICE) -> Case:
    """Normal logits in bf16, made where they are used."""
    s, t = (
        torch.empty(rows, vocab, dtype=torch.bfloat16, device=device).normal_(std=3)
        for _ in range(2)
    )
    labels = torch.randint(vocab, (rows,), device=device)
    extras = (Tilt(0, 0.1), Mixture(0.5), Tempered(2.0))
    return Case(RowSpec(vocab, vocab, extras=extras), s, t, labels)


def primitives(b: Backend, case: Case) -> tuple[Result, Tensor]:
    """Statistics, and the gradient of Σ KL(t ‖ s) + CE over the student's logits."""
    result = statistics(b, case)
    labels, grads = settled(case.labels, result), torch.zeros_like(result.values)
    for name in ("kl_ts", "nll"):
        grads[FIELDS.index(name)].fill_(1.0)
    coefficients = b.fold(result.values, grads, labels, case.spec)
    b.vjp(case.student, case.tiles()[0], coefficients, labels, case.spec)
    return result, case.student


def some_rows_are_as_alone(b: Backend, rows: int, vocab: int) -> None:
    """Rows among very many are what they are among few."""
    case = on_device(rows, vocab)
    some = torch.tensor([0, 1, 8_999, 65_535, 65_536, rows - 1], device=DEVICE).clamp_max(rows - 1)
    assert case.teacher is not None
    few = replace(case, student=case.student[some], teacher=case.teacher[some])
    few.labels = case.labels[some]
    result, gradient = primitives(b, case)
    expected, ref = primitives(b, few)
    for name in ("label", "argmax_s", "argmax_t"):
        assert torch.equal(result[name][some], expected[name])
    torch.testing.assert_close(result.values[:, some], expected.values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient[some], ref, rtol=2e-2, atol=1e-6)


def without_waiting(step: Callable[[], object]) -> None:
    """Run a step that has run before; it fails where the host waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def nothing_waits(backend: str, **options: Any) -> None:
    """A step, forward and backward, once it is loaded or compiled, synchronises nothing."""
    x, w, h, w_t = (
        torch.randn(n, d, dtype=torch.bfloat16, device=DEVICE)
        for n, d in ((512, 256), (8000, 256), (512, 384), (8000, 384))
    )
    x.requires_grad_()
    w.requires_grad_()
    options = {"target": torch.randint(8000, (512,), device=DEVICE), **options}

    def step() -> None:
        teacher = bg.LinearTeacher(h, w_t)
        bg.linear_hybrid_distillation(x, w, teacher, backend=backend, **options).backward()

    step()
    without_waiting(step)


def a_step_replays(backend: str) -> None:
    """A captured step, forward and backward: in one chunk, in several, with deferred gradients."""
    x, w, h, w_t = (
        torch.randn(n, d, dtype=torch.bfloat16, device=DEVICE)
        for n, d in ((512, 256), (20_000, 256), (512, 384), (20_000, 384))
    )
    leaves, target = [x.requires_grad_(), w.requires_grad_()], torch.randint(20_000, (512,))
    target = target.to(DEVICE)

    def step() -> tuple[Tensor, ...]:
        loss = bg.linear_hybrid_distillation(
            *leaves, bg.LinearTeacher(h, w_t), target, backend=backend, mode="fused"
        )
        return (loss.detach(), *torch.autograd.grad(loss / 3, leaves))

    for plan in PLANS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(driver, "plan", lambda work, budget, plan=plan: plan)
            driver.PLANS.clear()
            expected = step()
            without_waiting(step)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                replayed = step()
            graph.replay()
            assert all(torch.equal(x, y) for x, y in zip(replayed, expected, strict=True))
    driver.PLANS.clear()


def another_device_serves(b: Backend) -> None:
    """Tensors on a device that is not current, which stays so."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    primitives(b, on_device(64, 1000, torch.device("cuda:1")))
    assert torch.cuda.current_device() == 0


def a_graph_replays(b: Backend) -> None:
    """Both passes, captured, do the same again."""
    case = on_device(300, 5000)
    original = case.student.clone()
    primitives(b, case)  # loads or compiles the kernels
    expected = case.student.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        primitives(b, case)
    case.student.copy_(original)
    graph.replay()
    assert torch.equal(case.student, expected)
