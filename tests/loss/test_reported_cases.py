"""Calls that people make in mixed precision and of frozen teachers: faults that were reported."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import bgkernels as bg

ROWS, WIDTH, VOCAB = 48, 32, 97
SCALE = 65536.0
"""What ``GradScaler`` starts with."""


def problem(dtype: torch.dtype) -> tuple[Any, ...]:
    """Student states and head, teacher states and head, labels."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((ROWS, WIDTH), (VOCAB, WIDTH), (ROWS, 24), (VOCAB, 24))
    found = [(torch.randn(s, generator=generator) * 0.5).to(dtype) for s in shapes]
    return *found, torch.randint(VOCAB, (ROWS,), generator=generator)


def gradients(x: Any, w: Any, teacher: Any, y: Any, items: int, mode: str) -> tuple[Any, Any]:
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    loss = bg.linear_hybrid_distillation(x, w, teacher, y, num_items=items, mode=mode)
    (loss * SCALE).backward()
    return x.grad, w.grad


@pytest.mark.parametrize("mode", ["auto", "fused", "recompute"])
@pytest.mark.parametrize("items", [8_192, 131_072, 1_000_000])
def test_fp16_under_a_loss_scale(mode: str, items: int) -> None:
    """What a step of many tokens leaves of a token's gradient is small before it is scaled."""
    x, w, h, v, y = problem(torch.float16)
    teacher = bg.LinearTeacher(h, v)
    reference = bg.LinearTeacher(h.double(), v.double())
    expected = gradients(x.double(), w.double(), reference, y, items, "recompute")
    found = gradients(x, w, teacher, y, items, mode)
    for name, got, ref in zip(("input", "weight"), found, expected, strict=True):
        error = (got.double() - ref).norm() / ref.norm()
        assert error <= 1e-3, (name, float(error))


def made_for_inference(kind: str) -> tuple[Any, Any]:
    """A teacher whose tensors were made under ``inference_mode``, and one of the same values."""
    _, _, h, v, _ = problem(torch.float32)
    logits = h @ v.T
    top = logits.log_softmax(-1).topk(8)
    plain = {
        "linear": lambda: bg.LinearTeacher(h.clone(), v.clone()),
        "logits": lambda: bg.LogitsTeacher(logits.clone()),
        "top-k": lambda: bg.TopKTeacher(top.indices.clone(), top.values.clone()),
    }[kind]
    with torch.inference_mode():
        frozen = plain()
    return frozen, plain()


@pytest.mark.parametrize("kind", ["linear", "logits", "top-k"])
@pytest.mark.parametrize(
    "options",
    [{"mode": "fused"}, {"mode": "recompute"}, {"reduction": "none"}],
    ids=["fused", "recompute", "none"],
)
def test_teachers_made_for_inference(kind: str, options: dict[str, str]) -> None:
    x, w, _, _, y = problem(torch.float32)
    found = []
    for teacher in made_for_inference(kind):
        leaf, weight = x.clone().requires_grad_(), w.clone().requires_grad_()
        loss = bg.linear_hybrid_distillation(leaf, weight, teacher, y, **options)
        loss.sum().backward()
        found.append((loss.detach(), leaf.grad, weight.grad))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", ["linear", "logits", "top-k"])
def test_statistics_of_them(kind: str) -> None:
    x, w, _, _, y = problem(torch.float32)
    found = []
    for teacher in made_for_inference(kind):
        leaf = x.clone().requires_grad_()
        stats = bg.linear_row_stats(leaf, w, teacher, y)
        (stats.kl_ts + stats.nll).sum().backward()
        found.append((stats.kl_ts.detach(), leaf.grad))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)
