"""Tiles kept in four bytes a pair: what a step and its planner see of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import bgkernels as bg
from bgkernels.backends.code import Code
from bgkernels.backends.native import products
from bgkernels.streaming import driver, planner
from bgkernels.streaming.kept import Codes
from bgkernels.streaming.planner import Plan, Workload
from tests.conftest import Tiling
from tests.problems import DTYPES, Loss, labels, make, ways
from tests.yardstick import distances

INF, NAN = math.inf, math.nan


Coding = Callable[..., list[Plan]]


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Coding:
    """``kept(chunk, width, count, coded)`` plans so many kept tiles; what it returns, it fills."""

    def force(chunk: int, width: int, count: int = 99, coded: bool = True) -> list[Plan]:
        plans: list[Plan] = []

        def plan(work: Workload, budget: int | None) -> Plan:
            tiles = -(-work.columns // width)
            held = min(count, tiles)
            slots = held - (work.reads == 1)
            twice = work.statistics and (work.backward or work.reads > 1)
            codes = slots * coded if work.codable and twice else 0
            plans.append(Plan(work.rows, work.columns, chunk, width, held, 0, coded=codes))
            return plans[-1]

        monkeypatch.setattr(driver, "plan", plan)
        driver.PLANS.clear()
        return plans

    return force


Heads = tuple[Tensor, Tensor, Tensor]
"""Hidden states, the student's head, the teacher's."""


def heads(gap: float, std: float = 3.0, dtype: torch.dtype = torch.bfloat16) -> Heads:
    rows, hidden, vocab = 96, 64, 3000
    w = torch.randn(vocab, hidden)
    noise = torch.randn(vocab, hidden)
    w_t = noise if gap >= 1 else w + gap * noise
    scale = std / math.sqrt(hidden)
    x, w, w_t = (t.to(dtype) for t in (torch.randn(rows, hidden), scale * w, scale * w_t))
    return x, w, w_t


def exact_gradients(data: Heads, temperature: float) -> tuple[Tensor, ...]:
    """Of the sum over tokens of the forward KL divergence, times T², in float64."""
    x, w, w_t = (t.double() for t in data)
    leaves = x.requires_grad_(), w.requires_grad_()
    student = (x @ w.t() / temperature).log_softmax(1)
    teacher = (x.detach() @ w_t.t() / temperature).log_softmax(1)
    loss = (teacher.exp() * (teacher - student)).sum() * temperature**2
    return torch.autograd.grad(loss, leaves)


def gradients(data: Heads, temperature: float = 1.0, **options: Any) -> tuple[Tensor, ...]:
    x, w, w_t = data
    leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
    target = torch.zeros(len(x), dtype=torch.long)
    options = {"routing": "soft", "reduction": "sum", "temperature": temperature} | options
    loss = bg.linear_hybrid_distillation(*leaves, bg.LinearTeacher(x, w_t), target, **options)
    return torch.autograd.grad(loss, leaves)


def assert_as_exact_as_kept_in_fp32(
    data: Heads, temperature: float, kept: Coding, tilings: list[tuple[int, int, int]]
) -> None:
    exact = exact_gradients(data, temperature)
    for tiling in tilings:
        kept(*tiling, coded=False)
        plain = distances(gradients(data, temperature), exact)
        plans = kept(*tiling)
        for error, yard in zip(distances(gradients(data, temperature), exact), plain, strict=True):
            assert error <= max(1.1 * yard, 2.5e-3), (tiling, error, yard)
        assert all(p.coded for p in plans)


TILINGS = [(96, 512, 99), (96, 640, 3), (40, 1000, 99)]


@pytest.mark.parametrize("multiplied", ways("bf16"), indirect=True)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("std", [3.0, 12.0])
@pytest.mark.parametrize("gap", [1.0, 0.1, 0.01, 1e-3])
def test_the_gradient_is_as_exact_as_with_fp32_tiles(
    gap: float, std: float, temperature: float, multiplied: str, kept: Coding
) -> None:
    """However near the student is to its teacher."""
    assert_as_exact_as_kept_in_fp32(heads(gap, std), temperature, kept, TILINGS)


def _no_centre(code: Code) -> None:
    code.centres.zero_()


def _flipped_gap(code: Code) -> None:
    code.words.bitwise_xor_(-(2**31))


def _rounded_apart(code: Code) -> None:
    """Both logits in fp16 each, as wide as a pair of differences."""
    code.write(*(x.half().float() for x in code.read(code.words.shape[1])))


@pytest.mark.parametrize("mutate", [_no_centre, _flipped_gap, _rounded_apart])
def test_wrong_codes_do_not_pass(
    mutate: Callable[[Code], None], kept: Coding, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = Codes.keep

    def mutant(codes: Codes, i: int) -> None:
        keep(codes, i)
        columns = codes.plan.tiles()[i]
        code = codes.code(i, columns.stop - columns.start)
        if code is not None:
            mutate(code)

    monkeypatch.setattr(Codes, "keep", mutant)
    with pytest.raises(AssertionError):
        assert_as_exact_as_kept_in_fp32(heads(0.01), 1.0, kept, TILINGS[:1])


@pytest.mark.parametrize("mode", ["fused", "recompute"])
@pytest.mark.parametrize("divergence", list(bg.divergences.registry))
def test_every_divergence_of_coded_tiles(divergence: str, mode: str, kept: Coding) -> None:
    """With padding, masked columns, ignored tokens, caps and temperature, in several chunks.

    The gradient of total variation jumps where both models say the same: there, eleven bits may
    take the other side.
    """
    least = 5e-3 if divergence == "total_variation" else 2.5e-3
    problem = make(
        hidden=(16, 24), vocab=(1300, 1210), target=labels((3, 16), 1210),
        student_cap={"logit_scale": 0.5, "logit_softcap": 20.0}, teacher_cap={"logit_scale": -0.7},
    )  # fmt: skip
    loss, dtype = Loss(divergence, options={"temperature": 1.5}), torch.bfloat16
    problem = problem.to(dtype)
    exact = problem.to(torch.float64).dense(loss)
    for chunk, width, count in ((48, 512, 99), (17, 300, 3)):
        errors = []
        for coded in (False, True):
            plans = kept(chunk, width, count, coded)
            ours = problem.ours(loss, mode=mode)
            errors.append(distances(tuple(ours), tuple(exact)))
            assert any(p.coded for p in plans) == coded or mode == "recompute"
        for plain, error in zip(*errors, strict=True):
            assert error <= max(1.1 * plain, least), (chunk, width, error, plain)


@pytest.mark.parametrize("backend", ["native", "eager"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_bad_rows_get_what_fp32_tiles_give_them(dtype: str, backend: str, kept: Coding) -> None:
    """NaN, and nothing of it reaches other rows."""
    x, w, w_t = heads(0.1, dtype=DTYPES[dtype])
    for value in (NAN, INF):
        x[3, 0] = value
        results = []
        for coded in (False, True):
            kept(96, 512, coded=coded)
            results.append(gradients((x, w, w_t), backend=backend))
        for plain, ours in zip(*results, strict=True):
            assert torch.equal(plain.isnan(), ours.isnan()) and ours.isnan().any()
            plain, ours = plain.nan_to_num(), ours.nan_to_num()
            assert (ours - plain).double().norm() <= 2.5e-3 * plain.double().norm()


def test_masked_columns_get_no_gradient(kept: Coding) -> None:
    """Where a bias of -inf rules them out, by one model or both."""
    x, w, w_t = heads(0.1)
    b, b_t = (torch.zeros(len(w), dtype=torch.bfloat16) for _ in range(2))
    b[500:700], b_t[500:700] = -INF, -INF
    b_t[2900:2950] = -INF
    results = []
    for coded in (False, True):
        kept(96, 512, coded=coded)
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        loss = bg.linear_hybrid_distillation(
            *leaves, bg.LinearTeacher(x, w_t, b_t), torch.zeros(96, dtype=torch.long),
            linear_bias=b, reduction="sum",
        )  # fmt: skip
        results.append(torch.autograd.grad(loss, leaves))
    for plain, ours in zip(*results, strict=True):
        assert ours.isfinite().all()
        assert (ours - plain).norm() <= 2.5e-3 * plain.norm()
    assert not results[1][1][500:700].any() and results[1][1][2900:2950].any()


@pytest.mark.parametrize("divergence", ["forward_kl", "generalized_jsd"])
@pytest.mark.parametrize("width", [100, 250, 512])
def test_codes_lent_by_the_gradient_of_the_weight_change_no_bit(
    divergence: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, lent = heads(0.1), []

    def plan(lends: bool) -> Callable[[Workload, int | None], Plan]:
        def planned(work: Workload, _: int | None) -> Plan:
            found = planner._fit(work, work.rows, width, 1 << 40, True)
            assert found is not None and found.coded
            lent.append(found.lent)
            return found if lends else Plan(**vars(found) | {"lent": 0})

        return planned

    results = []
    for lends in (True, False):
        monkeypatch.setattr(driver, "plan", plan(lends))
        driver.PLANS.clear()
        results.append(gradients(data, divergence=divergence))
    assert min(lent) >= 1, lent
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_rank_may_have_fewer_tiles_than_the_plan_keeps(kept: Coding) -> None:
    """The plan is that of the rank with most columns."""
    data = heads(0.1)
    kept(96, 512)
    expected = gradients(data)
    planned = driver.plan

    def larger(work: Workload, budget: int | None) -> Plan:
        p = planned(work, budget)
        return Plan(**vars(p) | {"kept": p.kept + 2, "coded": p.coded + 2})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "plan", larger)
        driver.PLANS.clear()
        assert all(torch.equal(a, b) for a, b in zip(gradients(data), expected, strict=True))


def works(*data: Tensor, **options: Any) -> list[Workload]:
    """What the planner is asked of a step."""
    asked: list[Workload] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "plan", lambda w, b: asked.append(w) or planner.plan(w, b))
        driver.PLANS.clear()
        gradients(data, **options)
    return asked


def test_only_pairs_of_16_bit_heads_are_coded(tiling: Tiling) -> None:
    x, w, w_t = heads(0.1)
    assert all(work.codable for work in works(x, w, w_t))
    assert not any(work.codable for work in works(*(t.float() for t in (x, w, w_t))))


def test_a_budget_holds_twice_the_tiles() -> None:
    """Where fp32 tiles do not fit; where they do, nothing is lost by what is chosen."""
    work = Workload(
        rows=1024, columns=151_936, compared=151_936, hidden_s=896, hidden_t=1536, logit_bytes=8,
        tile_bytes=2, weight_bytes=0, row_bytes=2000, weight_sum_bytes=0, weight_grad_bytes=1792,
        grad_products=2, codable=True, packing=2 << 20,
    )  # fmt: skip
    for budget in (1 << 29, 1 << 27):
        p = planner.plan(work, budget)
        plain = planner.plan(Workload(**vars(work) | {"codable": False}), budget)
        assert p.bytes <= budget and p.coded == p.kept - 1
        share, before = (q.kept / len(q.tiles()) for q in (p, plain))
        assert share >= min(1.0, 1.7 * before) or share == 1
    for budget in (1 << 30, 1 << 29):
        assert planner.plan(work, budget).kept == len(planner.plan(work, budget).tiles())


def test_a_pair_takes_a_word_and_a_row_two_more_in_256_columns() -> None:
    p = Plan(64, 4096, 64, 1024, 4, 0, pair_bytes=8, coded=3)
    assert p.slot_bytes == 64 * 4 * (1024 + 8)
    assert Plan(64, 4096, 64, 1024, 4, 0, pair_bytes=8).slot_bytes == 64 * 1024 * 8


@pytest.mark.parametrize("way", ways("bf16"))
def test_the_planner_counts_what_products_pack(way: str) -> None:
    """Blocked products need no scratch beside dW, but a buffer of packed operands."""
    with products.using(way):
        (work,) = works(*heads(0.1))
    blocked = way == "brgemm"
    assert work.packing == blocked * min(4 * torch.get_num_threads(), 32) << 20
    assert work.weight_bytes == (0 if blocked else 4 if way == "cblas" else 8)
