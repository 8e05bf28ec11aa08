"""The self-test of the tolerance rule: wrong gradients fail it, honest ones pass."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from tests import oracle
from tests.yardstick import assert_close, projection, rel_max

INF = float("inf")


def rand(*shape: int, seed: int, std: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return std * torch.randn(*shape, generator=generator, dtype=torch.float64)


def step(dtype: torch.dtype, divergence: str, rows: int = 96, hidden: int = 48) -> list[Tensor]:
    """Loss, dX and dW of a linear head in `dtype`, from inputs that bf16 holds exactly."""
    x, y = (rand(rows, hidden, seed=i, std=1.0).bfloat16().to(dtype) for i in (0, 1))
    w, v = (rand(512, hidden, seed=i, std=0.3).bfloat16().to(dtype) for i in (2, 3))
    z = oracle.real_logits(x.requires_grad_(), w.requires_grad_())
    target = torch.arange(rows) * 5
    loss = oracle.hybrid_loss(z, oracle.real_logits(y, v), target, divergence=divergence)
    return [loss.detach(), *torch.autograd.grad(loss, (x, w))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", ["forward_kl", "jeffreys", "total_variation"])
def test_the_tolerance_fails_wrong_gradients(dtype: torch.dtype, divergence: str) -> None:
    eps = torch.finfo(dtype).eps
    ref, yardstick = step(torch.float64, divergence), step(dtype, divergence)
    for r, honest in zip(ref, yardstick, strict=True):
        assert_close(honest, r, honest, eps)
        assert_close(r.to(dtype), r, honest, eps)
    for r, honest in zip(ref[1:], yardstick[1:], strict=True):
        wrong = {"zeroed": 0 * honest, "negated": -honest, "1 % more": 1.01 * honest.float()}
        wrong["1 % less"] = 0.99 * honest.float()
        for start in range(0, len(honest), 64):
            wrong[f"rows {start} to {start + 64} missing"] = honest.clone()
            wrong[f"rows {start} to {start + 64} missing"][start : start + 64] = 0
        for fault, mutant in wrong.items():
            with pytest.raises(AssertionError):
                assert_close(mutant, r, honest, eps)
                pytest.fail(f"{fault} passed")  # not an AssertionError


def test_the_tolerance_on_special_values() -> None:
    ref = torch.tensor([1.0, math.nan, INF, -INF], dtype=torch.float64)
    assert_close(ref.float(), ref, ref.float(), 1e-7)
    for i, value in itertools.product(range(4), (0.5, math.nan, INF, -INF)):
        mutant = ref.clone()
        mutant[i] = value
        if not torch.equal(mutant.nan_to_num(7), ref.nan_to_num(7)):
            with pytest.raises(AssertionError):
                assert_close(mutant, ref, ref, 1e-7)
    zero = torch.zeros(3, dtype=torch.float64)
    assert_close(zero + 3e-7, zero, zero, 1e-7)
    assert_close(zero + 1e-3, zero, zero + 1e-3, 1e-7)
    for bad in (zero + 1e-5, zero + math.nan):
        with pytest.raises(AssertionError):
            assert_close(bad, zero, zero, 1e-7)
    with pytest.raises(AssertionError):
        assert_close(zero + 3e-6, zero, zero, 1e-7, zero_scale=0.1)
    with pytest.raises(AssertionError):
        assert_close(zero[:1], zero, zero, 1e-7)
    assert projection(zero, zero) == 1 and rel_max(zero[:0], zero[:0]) == 0
    assert_close(zero[:0], zero[:0], zero[:0], 1e-7)
