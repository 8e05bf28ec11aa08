"""Gradients of tiles that wait for the last chunk of rows give what sums over chunks give."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import bgkernels as bg
from bgkernels.backends.native import products
from bgkernels.streaming import driver, planner
from bgkernels.streaming.cost import estimate
from bgkernels.streaming.planner import Plan, Workload
from tests.problems import WIDEN, ways

ROWS, HIDDEN, VOCAB, WIDTH, CHUNK = 23, 12, 301, 64, 5
TILES = -(-VOCAB // WIDTH)
Tensors = dict[str, Tensor]
Planner = Callable[[Workload], Plan]


def tensors(dtype: torch.dtype, gap: float = 1.0) -> Tensors:
    x, w, b = torch.randn(ROWS, HIDDEN), torch.randn(VOCAB, HIDDEN), torch.randn(VOCAB)
    labels = torch.randint(VOCAB, (ROWS,))
    labels[::7] = -100
    t = {"x": x, "w": w, "b": b, "t": w + gap * torch.randn_like(w)}
    return {name: value.to(dtype) for name, value in t.items()} | {"y": labels}


def linear(t: Tensors) -> bg.LinearTeacher:
    return bg.LinearTeacher(t["x"], t["t"])


def top(t: Tensors) -> bg.TopKTeacher:
    values, columns = (t["x"] @ t["t"].T).log_softmax(-1).topk(9)
    return bg.TopKTeacher(columns, values)


def mixed(t: Tensors) -> bg.MixtureTeacher:
    return bg.MixtureTeacher([linear(t), bg.LinearTeacher(t["x"], t["t"].flip(0))], [0.3, 0.7])


def deferred(count: int, lends: bool = True, coded: bool = False) -> Planner:
    """Plans of five chunks and five tiles, of which ``count`` are deferred."""

    def plan(work: Workload) -> Plan:
        slot = work.rows * WIDTH * work.gradient_bytes
        free = planner._lent(work, TILES, WIDTH, slot) if work.weight_grad_bytes else 0
        deposited = min(free, count - (count < TILES)) * lends
        codes = (count - (work.reads == 1)) * coded
        return Plan(
            ROWS, VOCAB, CHUNK, WIDTH, count, 0, groups=TILES - count + 1, coded=codes,
            deferred=count, deposited=deposited,
        )  # fmt: skip

    return plan


def whole(work: Workload) -> Plan:
    return Plan(ROWS, VOCAB, ROWS, WIDTH, 1, 0)


def stepped(t: Tensors, plan: Planner, teacher: Any = linear, **options: Any) -> list[Tensor]:
    """The loss of a step, and its gradients: of the head into ``weight_grad`` where it is given."""
    leaves = [t[name].clone().requires_grad_() for name in "xwb"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "plan", lambda work, budget: plan(work))
        driver.PLANS.clear()
        loss = bg.linear_hybrid_distillation(
            leaves[0], leaves[1], teacher and teacher(t), t["y"], linear_bias=leaves[2],
            mode="fused", **options,
        )  # fmt: skip
        loss.backward()
    driver.PLANS.clear()
    return [x for x in (loss.detach(), *(leaf.grad for leaf in leaves)) if x is not None]


KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "forward": (linear, {}),
    "read twice": (linear, {"divergence": "generalized_jsd", "temperature": 2.0}),
    "hard labels": (None, {"routing": "hard"}),
    "top": (top, {"routing": "soft"}),
    "mixture": (mixed, {}),
}


@pytest.mark.parametrize("count", range(1, TILES + 1))
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradients_are_those_of_a_single_chunk(kind: str, count: int) -> None:
    t, (teacher, options) = tensors(torch.float64), KINDS[kind]
    expected = stepped(t, whole, teacher, **options)
    for ours, ref in zip(stepped(t, deferred(count), teacher, **options), expected, strict=True):
        torch.testing.assert_close(ours, ref, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("count", [2, TILES])
@pytest.mark.parametrize("way", [way for way in ways("bf16") if way != WIDEN])
def test_the_head_gradient_is_rounded_once(way: str, count: int) -> None:
    """In 16 bits, with codes, of a teacher that is nearly the student: as one chunk without."""
    t = tensors(torch.bfloat16, gap=1e-2)
    with products.using(way):
        expected = stepped(t, whole)
        ours = stepped(t, deferred(count, coded=True))
    for x, exact in zip(ours, expected, strict=True):
        assert (x - exact).double().norm() <= 2.5e-3 * exact.double().norm()


@pytest.mark.parametrize("count", [1, 3, TILES])
def test_gradients_that_wait_in_the_gradient_of_the_weight_change_no_bit(count: int) -> None:
    t, asked = tensors(torch.float64), list[Plan]()

    def watched(work: Workload) -> Plan:
        asked.append(deferred(count)(work))
        return asked[-1]

    pairs = zip(stepped(t, watched), stepped(t, deferred(count, lends=False)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert asked[0].deposited == {1: 0, 3: 2, TILES: 2}[count]


@pytest.mark.parametrize("count", [2, TILES])
def test_a_sum_of_the_caller_is_added_to_once(count: int) -> None:
    t = tensors(torch.float64)
    _, dx, dw, _ = stepped(t, whole)
    start = torch.randn(VOCAB, HIDDEN, dtype=torch.float64)
    total = start.clone()
    _, ours, _ = stepped(t, deferred(count), weight_grad=total)
    torch.testing.assert_close(ours, dx, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(total - start, dw, rtol=1e-9, atol=1e-12)


def test_the_loss_is_differentiated_once_a_chunk() -> None:
    """Though columns are walked again: what is remembered is a number of each row."""
    calls, policy = list[int](), bg.routing.entropy()

    def counted(stats: bg.RowStats) -> Any:
        calls.append(len(stats.label))
        return policy.weights(stats)

    stepped(tensors(torch.float64), deferred(2), routing=replace(policy, weights=counted))
    assert calls == [5, 5, 5, 5, 3]


HEADLINE = Workload(
    rows=8192, columns=128_256, compared=128_256, hidden_s=4096, hidden_t=4096, logit_bytes=8,
    tile_bytes=2, weight_bytes=0, row_bytes=4 * 4096 + 500, weight_sum_bytes=4 * 128_256 * 4096,
    weight_grad_bytes=2 * 4096, grad_products=2, device="cuda", input_sum_bytes=4 * 8192 * 4096,
    codable=True, gradient_bytes=2, deferrable=True,
)  # fmt: skip


@given(
    gib=st.floats(0.25, 4),
    rows=st.integers(300, 20_000),
    hidden=st.sampled_from([512, 2048, 4096]),
    reads=st.sampled_from([1, 2]),
    owned=st.booleans(),
)
def test_a_plan_fits_what_it_counts(
    gib: float, rows: int, hidden: int, reads: int, owned: bool
) -> None:
    """By hand: tiles in work, codes of a chunk, gradients of all rows, and dX."""
    work = replace(
        HEADLINE, rows=rows, hidden_s=hidden, reads=reads, input_sum_bytes=4 * rows * hidden,
        row_bytes=4 * hidden + 500, weight_grad_bytes=2 * hidden * (not owned), weight_owned=owned,
        weight_sum_bytes=4 * 128_256 * hidden * (not owned),
    )  # fmt: skip
    budget = int(gib * 2**30)
    for chunk, width in ((256, 16_128), (1024, 8064), (128, 4096)):
        p = planner._fit_deferred(work, chunk, width, budget, True)
        if p is None:
            continue
        tiles, slot = len(p.tiles()), 2 * rows * width

        def told(count: int, lent: int, p: Plan = p, tiles: int = tiles, slot: int = slot) -> int:
            dx = 4 * hidden * (p.chunk if count == tiles else rows)
            codes = (count - (reads == 1)) * p.slot_bytes
            return 8 * p.chunk * p.width + codes + (count - lent) * slot + dx + 500 * p.chunk

        assert abs(told(p.deferred, p.deposited) - p.bytes) <= 8 and p.bytes <= budget
        assert 1 <= p.deferred == p.kept <= tiles and not p.lent
        assert p.coded == p.kept - (reads == 1)
        for k, i in enumerate(range(tiles - p.deposited, tiles)):  # each before its own place
            assert (k + 1) * slot <= p.tiles()[i].start * work.weight_grad_bytes
        if p.deferred < tiles:
            assert p.deposited < p.deferred  # those that remain take turns in another place
            most = work.weight_grad_bytes * (tiles - 1) * width // slot
            assert told(p.deferred + 1, min(most, p.deferred + (p.deferred + 1 == tiles))) > budget
        first = tiles - p.deferred
        order = [i for group in p.tile_groups() for i in group]
        assert order == [*range(first, tiles), *reversed(range(first))]


def test_deferring_pays_where_a_sum_in_fp32_does_not_fit() -> None:
    for gib, most in ((1, 0.3), (2, 0.01)):
        ours, plain = (
            planner.plan(replace(HEADLINE, deferrable=may), gib << 30) for may in (True, False)
        )
        assert ours.deferred and not plain.deferred
        assert estimate(HEADLINE, ours).total < 0.93 * estimate(HEADLINE, plain).total
        assert ours.repeated(2) < most


@pytest.mark.parametrize("mebibytes", [4, 6, 12])
def test_a_step_allocates_what_its_plan_counts(mebibytes: int) -> None:
    """In fp32, without codes; beside the two gradients, and some numbers of each row."""
    rows, vocab, plans = 256, 8192, list[Plan]()
    x, w = (torch.randn(n, 64, requires_grad=True) for n in (rows, vocab))
    teacher = bg.LinearTeacher(torch.randn(rows, 64), torch.randn(vocab, 64))
    loss_of, labels = bg.linear_hybrid_distillation, torch.arange(rows)

    def plan(work: Workload, _: int | None) -> Plan:
        p = planner._fit_deferred(replace(work, deferrable=True), 64, 1024, mebibytes << 20)
        assert p is not None
        plans.append(p)
        return p

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "plan", plan)
        driver.PLANS.clear()
        loss_of(x, w, teacher, labels, mode="fused")
        with torch.profiler.profile(profile_memory=True) as seen:
            loss_of(x, w, teacher, labels, mode="fused")
    driver.PLANS.clear()
    assert seen.profiler is not None and seen.profiler.kineto_results is not None
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    peak = max(itertools.accumulate(sizes)) - x.nbytes - w.nbytes
    assert plans[0].deposited == 1 and (plans[0].deferred == 8) == (mebibytes == 12)
    assert 0.95 * plans[0].bytes <= peak <= 1.03 * plans[0].bytes
