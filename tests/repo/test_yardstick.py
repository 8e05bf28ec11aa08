"""The self-test of the tolerance rule: wrong gradients fail it, honest ones pass."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from tests import oracle
from tests.yardstick import assert_close, projection, rel_max, row_errors

INF = float("inf")


def rand(*shape: int, seed: int, std: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return std * torch.randn(*shape, generator=generator, dtype=torch.float64)


FAINT = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-10}
"""Weights of tokens whose gradient is too small for a tensor's largest error and projection."""
FEW = 5
"""How many tokens are faint."""


def step(dtype: torch.dtype, divergence: str, faint: float, rows: int = 96) -> list[Tensor]:
    """Loss, dX and dW of a linear head in `dtype`, from inputs that bf16 holds exactly."""
    x, y = (rand(rows, 48, seed=i, std=1.0).bfloat16().to(dtype) for i in (0, 1))
    w, v = (rand(512, 48, seed=i, std=0.3).bfloat16().to(dtype) for i in (2, 3))
    z, t = oracle.real_logits(x.requires_grad_(), w.requires_grad_()), oracle.real_logits(y, v)
    wide = torch.promote_types(dtype, torch.float32)
    target, weight = torch.arange(rows) * 5, torch.ones(rows)
    weight[:FEW] = faint
    loss = oracle.hybrid_loss(
        z.to(wide), t.to(wide), target, divergence=divergence, token_weight=weight
    )
    return [loss.detach(), *torch.autograd.grad(loss, (x, w))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", ["forward_kl", "jeffreys", "total_variation"])
def test_the_tolerance_fails_wrong_gradients(dtype: torch.dtype, divergence: str) -> None:
    eps = torch.finfo(dtype).eps
    ref, yardstick = (step(x, divergence, FAINT[dtype]) for x in (torch.float64, dtype))
    for r, honest in zip(ref, yardstick, strict=True):
        assert_close(honest, r, honest, eps)
        assert_close(r.to(honest.dtype), r, honest, eps)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", ["forward_kl", "jeffreys", "total_variation"])
def test_the_tolerance_fails_a_wrong_row(dtype: torch.dtype, divergence: str) -> None:
    """However small it is: the other two measures see nothing in the rows of faint tokens."""
    eps, scale = torch.finfo(dtype).eps, FAINT[dtype]
    (_, *ref), (_, *yardstick) = (step(x, divergence, scale) for x in (torch.float64, dtype))
    for r, honest in zip(ref, yardstick, strict=True):
        faintest = int(r.norm(dim=1).argmin())
        for i in {faintest, *range(FEW), *range(FEW, len(r), 16)}:
            for fault, factor in {"zeroed": 0.0, "negated": -1.0, "10 % more": 1.1}.items():
                mutant = honest.clone()
                mutant[i] *= factor
                with pytest.raises(AssertionError, match=r"largest error|projection|error of row"):
                    assert_close(mutant, r, honest, eps)
                    pytest.fail(f"row {i} of {len(r)} {fault} passed")  # not an AssertionError
    mutant = yardstick[0].clone()
    mutant[2] = 0
    with pytest.raises(AssertionError, match=r"error of row 2 1\.000"):
        assert_close(mutant, ref[0], yardstick[0], eps)


def test_row_errors() -> None:
    ref = torch.tensor([[3.0, 4.0], [3e-5, 4e-5], [0, 0], [math.nan, 1], [3e-20, 0]]).double()
    ours = torch.tensor([[3.0, 4.0], [3e-5, 0], [1e-9, 0], [math.nan, 1.5], [6e-20, 0]]).double()
    least = 1e-12 * 5.0  # nothing counts below eps² of the largest
    expected = torch.tensor([0, 0.8, 1e-9 / least, 0.5, 3e-20 / least]).double()
    errors = row_errors(ours.reshape(5, 1, 2), ref.reshape(5, 1, 2), 1e-6)
    torch.testing.assert_close(errors, expected)
    zero = torch.zeros(2, 3)
    assert not row_errors(zero, zero, 1e-6).any()


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
