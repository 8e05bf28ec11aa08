"""Small problems for the defects of similar losses, and what rounding does to their gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import bgkernels as bg
from tests import oracle

N, D, D_T, V = 24, 16, 12, 500
EPS, ULP = torch.finfo(torch.float32).eps, 2.0**-9
"""Of fp32; and by how much rounding to bf16 moves a number, relative to it."""
NEAR = 64 * EPS
"""Relative distance of fp32 sums that were added up in another order."""


def pair(noise: float, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A student and a teacher of one width, whose logits differ by ``noise`` of their size."""
    x, w = torch.randn(N, D), torch.randn(V, D) * scale / math.sqrt(D)
    h = x + noise * torch.randn(N, D)
    t = {"x": x, "w": w, "h": h, "w_t": w.clone()}
    return {name: v.bfloat16().to(dtype) for name, v in t.items()} | {"y": torch.randint(V, (N,))}


def run(t: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and the gradients of input and weight."""
    x, w = (t[n].detach().requires_grad_() for n in "xw")
    teacher = bg.LinearTeacher(t["h"], t["w_t"])
    loss = bg.linear_hybrid_distillation(x, w, teacher, t["y"], **options)
    return (loss, *torch.autograd.grad(loss.sum(), (x, w)))


def dense(t: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The same by the oracle in float64."""
    x, w = (t[n].detach().double().requires_grad_() for n in "xw")
    loss = oracle.hybrid_loss(x @ w.t(), t["h"].double() @ t["w_t"].double().t(), t["y"], **options)
    return (loss, *torch.autograd.grad(loss.sum(), (x, w)))


def both(logits: Tensor, teacher: Tensor, y: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Loss and gradient from logits."""
    z = logits.detach().clone().requires_grad_()
    loss = bg.hybrid_distillation(z, bg.LogitsTeacher(teacher), y, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), z)[0]


def of_rounded_logits(t: dict[str, Tensor], **options: Any) -> tuple[Tensor, ...]:
    """Gradients of input and weight in float64, at logits that were rounded to fp32."""
    x, w = (t[n].detach().double().requires_grad_() for n in "xw")
    z = x @ w.t()
    z = z + ((t["x"] @ t["w"].t()).double() - z).detach()
    loss = oracle.hybrid_loss(z, (t["h"] @ t["w_t"].t()).double(), t["y"], **options)
    return torch.autograd.grad(loss, (x, w))


def of_narrow_tiles(t: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """By how much the gradients move where those of tiles are rounded to bf16, at most."""
    x, w, h, w_t = (t[n].double() for n in ("x", "w", "h", "w_t"))
    z = (x @ w.t()).requires_grad_()
    (d,) = torch.autograd.grad(oracle.hybrid_loss(z, h @ w_t.t(), t["y"]), z)
    return ULP * (d.abs() @ w.abs()).max(), ULP * (d.abs().t() @ x.abs()).max()
