"""Logits at their worst: offsets, certainty, ties, masks and numbers that are none."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

import bgkernels as bg
from tests.conftest import Tiling
from tests.problems import DTYPES, Failures, Loss, Problem, cells, normal
from tests.yardstick import assert_close

INF = math.inf


def extreme(name: str) -> tuple[Tensor, Tensor]:
    """Logits ``(24, 40)`` of student and teacher."""
    z, t = (normal(24, 40, seed=seed, std=2.0) for seed in (1, 2))
    if name == "offset":
        return z + 300, t + 300
    if name == "opposite offsets":
        return z + 300, t - 300
    if name == "wide":
        return 1e4 * z.sign(), 1e4 * t.sign()
    if name == "one-hot":
        hot = 1e4 * torch.eye(40).double()
        return hot[:24], hot[[*range(12), *range(20, 32)]]
    if name == "all equal":
        return torch.zeros_like(z) + 3, torch.zeros_like(t) - 5
    z[:, [1, 6]] = -INF
    t[:, [1, 6]] = {"masked in both": -INF, "masked where the teacher has nothing": -1e4}[name]
    return z, t


EXTREMES = ["offset", "opposite offsets", "wide", "one-hot", "all equal",
            "masked in both", "masked where the teacher has nothing"]  # fmt: skip


@pytest.mark.parametrize(("backend", "dtype"), cells("fp64", "fp32"))
@pytest.mark.parametrize("name", EXTREMES)
def test_extremes(name: str, backend: str, dtype: str, tiling: Tiling) -> None:
    tiling(chunk=13, width=16, kept=2)
    z, t = extreme(name)
    target = torch.tensor([0, 2, 2, 3, 4, 5, *range(20, 38)])
    problem = Problem({"logits": z}, {"logits": t}, target).to(DTYPES[dtype])
    # An exponent a·u + b·v of hundreds is rounded before its log-sum-exp is taken off.
    exact, eps = problem.to(torch.float64), 4 * torch.finfo(DTYPES[dtype]).eps
    with Failures() as failures:
        for divergence in bg.divergences.registry:
            loss = Loss(divergence, "additive", options={"reduction": "none"})
            ours = problem.ours(loss, backend=backend)
            for part, x, ref, yard in zip(
                ("loss", "gradient"), ours, exact.dense(loss), problem.dense(loss), strict=True
            ):
                with failures.cell(divergence, part):
                    assert ref.isfinite().all(), "the reference is not finite"
                    assert_close(x, ref, yard.where(yard.isfinite(), ref.to(yard)), eps)


@pytest.mark.parametrize("divergence", list(bg.divergences.registry))
def test_a_column_that_only_the_student_masks(divergence: str, backend: str) -> None:
    z, t = (normal(4, 12, seed=seed) for seed in (1, 2))
    z[1, 4] = -INF
    problem = Problem({"logits": z}, {"logits": t}, torch.tensor([0, 1, 2, 3])).to(torch.float32)
    loss = Loss(divergence, "soft", options={"reduction": "none"})
    (ours, gradient), (ref, _) = problem.ours(loss, backend=backend), problem.dense(loss)
    torch.testing.assert_close(ours, ref)
    assert ours.isinf().any() == (divergence in ("forward_kl", "jeffreys", "adaptive_kl"))
    rows = [0, 2, 3, *([1] if ref.isfinite().all() else [])]
    assert gradient[rows].isfinite().all()


@pytest.mark.parametrize("limit", [(0, 0), (0.5, 0), (0, 0.5), (0.5, -0.5)])
def test_limits_of_alpha_beta_are_not_finite_where_one_model_masks(
    limit: tuple[float, float],
) -> None:
    alpha, beta = limit
    z, t = (normal(1, 12, seed=seed) for seed in (1, 2))
    for side in (z, t):
        masked = side.clone()
        masked[0, 4] = -INF
        pair = (masked, t) if side is z else (z, masked)
        problem = Problem({"logits": pair[0]}, {"logits": pair[1]}, torch.tensor([0]))
        loss = Loss("alpha_beta", "soft", {"alpha": alpha, "beta": beta})
        ours, ref = problem.ours(loss)[0], problem.dense(loss)[0]
        assert ours.isfinite() == ref.isfinite(), (ours, ref)


@pytest.mark.parametrize("bad", [math.nan, INF])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("at_label", [False, True])
def test_a_bad_logit_gives_a_nan_loss(bad: float, side: str, at_label: bool, backend: str) -> None:
    """In its row, whatever reads it: each divergence and each policy, though not every pair."""
    z, t = (normal(5, 12, seed=seed).float() for seed in (1, 2))
    target = torch.tensor([0, 3, 7, -100, 2])
    (z if side == "student" else t)[[1, 3], 3 if at_label else 6] = bad
    z[3] = bad  # an ignored row
    turn = 2 * (side == "student") + at_label
    entries = list(product(bg.divergences.registry, bg.routing.registry))
    for divergence, routing in entries[turn::5]:
        policy = bg.routing.registry.get(routing)
        if side == "teacher" and not policy.uses_teacher:
            policy = bg.routing.registry.get("soft")
        options = {"divergence": divergence, "routing": policy, "backend": backend}
        loss = bg.hybrid_distillation(z, bg.LogitsTeacher(t), target, reduction="none", **options)
        sees_the_next = routing == "risk_guided" and side == "student"
        expected = [sees_the_next, True, False, False, False]
        assert loss.isnan().tolist() == expected, (divergence, routing, loss)
        leaf = z.clone().requires_grad_()
        mean = bg.hybrid_distillation(leaf, bg.LogitsTeacher(t), target, **options)
        assert mean.isnan() and not torch.autograd.grad(mean, leaf)[0][3].any()
