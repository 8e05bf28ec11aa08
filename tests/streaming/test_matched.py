"""A teacher with a vocabulary of its own, against dense torch in float64."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import bgkernels as bg
from bgkernels.backends import BACKENDS
from bgkernels.streaming.teachers import matched_walk
from tests.conftest import Tiling
from tests.mutants import Mutant
from tests.problems import DIVERGENCES, DTYPES, PAIRS, Loss, agree, cells, runs, ways, widest
from tests.streaming.categories import CAPS, multiplied
from tests.streaming.matched import V_S, Unlike, unlike

RESTS = ("bucket", "drop")


def check(problem: Unlike, loss: Loss, dtype: str, runs: list[dict[str, Any]]) -> None:
    agree(
        problem,
        lambda made, **run: made.ours(loss, **run),
        lambda made: made.dense(loss),
        DTYPES[dtype],
        runs,
    )


SETTINGS = [
    pytest.param(rest, ("linear", "logits", "mixed")[i % 3], 1.7 if i % 2 else 1.0, pair,
                 id="-".join((rest, *pair)))
    for i, pair in enumerate(PAIRS)
    for rest in RESTS
]  # fmt: skip
"""Each pair with a kind of models and a temperature."""


@pytest.mark.parametrize(("backend", "dtype"), widest())
@pytest.mark.parametrize(("rest", "kind", "temperature", "pair"), SETTINGS)
def test_every_divergence_and_policy(
    rest: str, kind: str, temperature: float, pair: tuple[str, str], backend: str, dtype: str,
    tiling: Tiling,
) -> None:  # fmt: skip
    tiling(chunk=13, width=48)
    loss = Loss(*pair, options={"temperature": temperature, "label_smoothing": 0.1})
    check(unlike(kind, rest), loss, dtype, runs(backend, loss))


@pytest.mark.parametrize(("backend", "dtype"), cells("bf16", "fp16"))
@pytest.mark.parametrize("multiplied", ways("bf16"), indirect=True)
@pytest.mark.parametrize("rest", RESTS)
def test_16_bits(rest: str, multiplied: str, backend: str, dtype: str, tiling: Tiling) -> None:
    tiling(chunk=13, width=48, kept=1)
    loss = Loss("generalized_jsd", "entropy", options={"temperature": 1.7})
    check(unlike("linear", rest), loss, dtype, runs(backend, loss))


@pytest.mark.parametrize(("backend", "dtype"), widest())
@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("cap", CAPS, ids=str)
def test_details_of_the_heads(
    cap: dict[str, float], rest: str, backend: str, dtype: str, tiling: Tiling
) -> None:
    tiling(chunk=24, width=32, kept=2)
    loss = Loss("generalized_jsd", "weighted_soft", options={"z_loss": 1e-3, "temperature": 1.3})
    mirrored = CAPS[CAPS.index(cap) - 1]
    for caps in ({"student_cap": cap}, {"student_cap": mirrored, "teacher_cap": cap}):
        check(unlike("linear", rest, **caps), loss, dtype, runs(backend, loss))


def same(rest: str, kind: str = "linear", permuted: bool = True) -> tuple[Unlike, Any]:
    """A problem whose teacher numbers the student's vocabulary in another order, and the teacher
    in the student's order."""
    made = unlike(kind, rest)
    column = torch.randperm(V_S) if permuted else torch.arange(V_S)
    ordered = {n: x[..., :V_S] if n in ("logits", "bias") else x for n, x in made.teacher.items()}
    if "weight" in ordered:
        ordered["weight"] = ordered["weight"][:V_S]
    moved = {
        n: torch.empty_like(x).index_copy_(x.ndim - 1 if n != "weight" else 0, column, x)
        if n != "hidden" else x
        for n, x in ordered.items()
    }  # fmt: skip
    made = replace(made, teacher=moved, pairs=torch.stack([torch.arange(V_S), column]))
    (name, rows), *head = ordered.items()
    assert made.positions is not None
    made = replace(made, positions=made.positions.clamp_min(0))
    picked = rows[made.positions]
    inner = bg.LogitsTeacher(picked) if name == "logits" else bg.LinearTeacher(picked, **dict(head))
    return made, inner


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("kind", ["linear", "logits"])
@pytest.mark.parametrize("rest", RESTS)
def test_one_vocabulary_is_the_ordinary_loss(rest: str, kind: str, permuted: bool) -> None:
    made, ordinary = same(rest, kind, permuted)
    for divergence, routing in PAIRS:
        loss = Loss(divergence, routing, options={"temperature": 1.4})
        for got, ref in zip(made.ours(loss), made.ours(loss, ordinary), strict=True):
            torch.testing.assert_close(got, ref, rtol=1e-10, atol=1e-13, msg=f"{divergence}")


@pytest.mark.parametrize("rest", RESTS)
def test_a_shuffled_match_is_seen(rest: str) -> None:
    """Equal models diverge by nothing, until the teacher's ids are shuffled."""
    z = torch.randn(9, 50, dtype=torch.float64)
    ids = torch.randperm(50)[:40]
    teacher = bg.LogitsTeacher(z)
    right, wrong = torch.stack([ids, ids]), torch.stack([ids, ids.roll(1)])
    for divergence in DIVERGENCES:
        values = [
            bg.hybrid_distillation(
                z, bg.MatchedTeacher(teacher, pairs, rest), torch.zeros(9, dtype=torch.int64),
                divergence=divergence, routing="soft",
            )
            for pairs in (right, wrong)
        ]  # fmt: skip
        assert values[0].abs() < 1e-9 and values[1] > 0.01, divergence


BOUNDED = ("forward_kl", "reverse_kl", "jeffreys", "generalized_jsd", "skew_forward_kl",
           "skew_reverse_kl", "renyi", "total_variation")  # fmt: skip


def test_a_coarser_divergence_is_at_most_the_true_one() -> None:
    z, t = torch.randn(2, 64, 50, dtype=torch.float64).mul(2)
    ids, y = torch.randperm(50)[:30], torch.zeros(64, dtype=torch.int64)
    for divergence in BOUNDED:
        options = {"divergence": divergence, "routing": "soft", "reduction": "none"}
        teachers = bg.MatchedTeacher(bg.LogitsTeacher(t), torch.stack([ids, ids]))
        coarse, true = (
            bg.hybrid_distillation(z, x, y, **options) for x in (teachers, bg.LogitsTeacher(t))
        )
        assert (coarse <= true + 1e-12).all() and (coarse > 0).all(), divergence


def test_a_side_without_a_rest_has_none_to_compare() -> None:
    """All of a teacher's columns match: the student's others are left out, and nothing is lost."""
    z, t = torch.randn(5, 12, requires_grad=True), torch.randn(5, 8)
    pairs, y = torch.stack([torch.arange(8), torch.arange(8)]), torch.arange(5)
    for divergence in DIVERGENCES:
        options = {"divergence": divergence, "temperature": 1.4}
        got = bg.hybrid_distillation(z, bg.MatchedTeacher(bg.LogitsTeacher(t), pairs), y, **options)
        ref = bg.hybrid_distillation(z, bg.LogitsTeacher(t), y, **options)
        torch.testing.assert_close(got, ref)
        grads = (torch.autograd.grad(x, z)[0] for x in (got, ref))
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-7)


def test_what_the_caller_sees() -> None:
    made = unlike("logits")
    assert made.positions is not None
    inner, (ours, theirs) = bg.LogitsTeacher(made.teacher["logits"]), made.pairs
    teacher = bg.MatchedTeacher(inner, SimpleNamespace(pairs=made.pairs), positions=made.positions)
    z = made.student["logits"]
    _, s = bg.hybrid_distillation(z, teacher, made.target, temperature=1.5, return_stats=True)
    lp = inner.logits.log_softmax(-1)[made.positions.clamp_min(0)]
    valid, present = made.target != -100, made.positions >= 0
    assert s.vocab == lp.shape[-1] and s.matched is not None
    assert s.matched.tolist() == present.tolist()
    both = valid & present
    torch.testing.assert_close(s.entropy_t[both], -(lp.exp() * lp).sum(-1)[both])
    torch.testing.assert_close(s.max_prob_t[both], lp.exp().amax(-1)[both])
    to_student = torch.full((lp.shape[-1],), -1).index_copy_(0, theirs, ours)
    assert s.argmax_t[both].tolist() == to_student[lp.argmax(-1)][both].tolist()
    to_teacher = torch.full((V_S,), -1).index_copy_(0, ours, theirs)
    column = to_teacher[made.target.clamp_min(0)]
    logp = lp.gather(-1, column.clamp_min(0)[..., None])[..., 0].masked_fill(column < 0, -torch.inf)
    torch.testing.assert_close(s.logp_t[both], logp[both])
    assert not s.entropy_t[~present].any() and not s.kl_ts[~present].any()
    torch.testing.assert_close(s.entropy_s[valid], _entropy(z)[valid])
    torch.testing.assert_close(s.nll[valid], -z.log_softmax(-1).gather(
        -1, made.target.clamp_min(0)[..., None])[..., 0][valid])  # fmt: skip


def _entropy(z: Tensor) -> Tensor:
    lp = z.log_softmax(-1)
    return -(lp.exp() * lp).sum(-1)


def test_statistics_have_gradients() -> None:
    x, w = (torch.randn(n, 6, dtype=torch.float64, requires_grad=True) for n in (5, 20))
    t, ids = torch.randn(5, 30, dtype=torch.float64), torch.randperm(20)[:12]
    teacher = bg.MatchedTeacher(bg.LogitsTeacher(t), torch.stack([ids, ids + 7]))
    s = bg.linear_row_stats(x, w, teacher, torch.arange(5), extras=[bg.TotalVariation()])
    z, others = x @ w.T, torch.ones(20, dtype=torch.bool).index_fill(0, ids, False)
    lp, lq = z.log_softmax(-1), t.log_softmax(-1)
    others_t = torch.ones(30, dtype=torch.bool).index_fill(0, ids + 7, False)
    p = torch.cat([lp[:, ids].exp(), lp[:, others].exp().sum(-1, keepdim=True)], -1)
    q = torch.cat([lq[:, ids + 7].exp(), lq[:, others_t].exp().sum(-1, keepdim=True)], -1)
    kl, tv = (p * (p / q).log()).sum(-1), (p - q).abs().sum(-1) / 2
    for got, ref in ((s.kl_st, kl), (s.total_variation(), tv), (s.entropy_s, _entropy(z))):
        torch.testing.assert_close(got, ref)
        grads = (torch.autograd.grad(a.sum(), (x, w), retain_graph=True) for a in (got, ref))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("leading", [(), (0,), (2, 0), (2, 3)])
def test_any_leading_shape(leading: tuple[int, ...]) -> None:
    z = torch.randn(*leading, 20, requires_grad=True)
    y = torch.zeros(leading, dtype=torch.int64)
    for positions in (None, torch.full(leading, -1), torch.zeros(leading, dtype=torch.int64)):
        rows = leading if positions is None else (3, 2)
        inner = bg.LogitsTeacher(torch.randn(*rows, 30))
        teacher = bg.MatchedTeacher(inner, torch.arange(9).expand(2, 9), positions=positions)
        loss = bg.hybrid_distillation(z, teacher, y, routing="soft")
        (dz,) = torch.autograd.grad(loss, z)
        assert loss.isfinite() and dz.isfinite().all()
        if positions is not None and y.numel() and bool((positions < 0).all()):
            ref = torch.nn.functional.cross_entropy(z.reshape(-1, 20), y.reshape(-1))
            torch.testing.assert_close(loss, ref)


def test_rows_without_a_token_are_not_looked_at() -> None:
    """Hidden states of padding may be NaN; one that a token has is not hidden."""
    x, w = torch.randn(4, 6, requires_grad=True), torch.randn(20, 6, requires_grad=True)
    h = torch.randn(5, 8)
    h[0] = h[3] = torch.nan
    inner = bg.LinearTeacher(h, torch.randn(30, 8))
    pairs, y = torch.arange(15).expand(2, 15), torch.tensor([1, 2, 3, -100])
    for divergence in DIVERGENCES:
        for places, lost in (([1, -1, 2, 3], False), ([1, 0, 2, 4], True)):
            teacher = bg.MatchedTeacher(inner, pairs, positions=torch.tensor(places))
            loss = bg.linear_hybrid_distillation(x, w, teacher, y, divergence=divergence)
            grads = torch.autograd.grad(loss, (x, w))
            assert bool(loss.isnan()) == lost, divergence
            assert lost or all(g.isfinite().all() for g in grads), divergence


def test_a_sum_takes_matched_teachers(tiling: Tiling) -> None:
    tiling(chunk=10, width=40)
    made, loss = unlike("linear"), Loss("generalized_jsd", "confidence")
    ordinary = bg.LogitsTeacher(torch.randn(3, 8, V_S, dtype=torch.float64))
    parts = [made.library_teacher(), ordinary]
    refs = [made.ours(loss, part) for part in parts]
    for order in (1, -1):
        teacher = bg.MixtureTeacher(parts[::order], (0.3, 0.7)[::order])
        for mode in ("fused", "recompute"):
            got = made.ours(loss, teacher, mode=mode)
            for a, b, c in zip(got, *refs, strict=True):
                torch.testing.assert_close(a, 0.3 * b + 0.7 * c, rtol=1e-9, atol=1e-11)


def test_budgets_agree_and_each_column_is_multiplied_once() -> None:
    x, w = torch.randn(50, 8).requires_grad_(), torch.randn(900, 8).requires_grad_()
    pairs = torch.stack([torch.randperm(900)[:700], torch.randperm(1100)[:700]])
    inner = bg.LinearTeacher(torch.randn(50, 12), torch.randn(1100, 12))
    teacher, y = bg.MatchedTeacher(inner, pairs), torch.randint(900, (50,))
    assert bg.plan(x, w, teacher, y).products == 4
    assert multiplied(x, w, teacher, y, 200_000) == 50 * (3 * 8 * 900 + 12 * 1100)


def test_pairs_that_change_are_checked_again() -> None:
    z, inner = torch.randn(2, 9), bg.LogitsTeacher(torch.randn(2, 9))
    pairs, y = torch.arange(4).repeat(2, 1), torch.tensor([1, 2])
    bg.hybrid_distillation(z, bg.MatchedTeacher(inner, pairs), y)
    pairs[1, 0] = 3
    with pytest.raises(ValueError, match="comes twice"):
        bg.hybrid_distillation(z, bg.MatchedTeacher(inner, pairs), y)


FAULTS = {
    "none": lambda out, tile: None,
    "zeroed": lambda out, tile: out.zero_(),
    "negated": lambda out, tile: out.neg_(),
    "1 % more": lambda out, tile: out.mul_(1.01),
    "what begins a kind of columns missing": lambda out, tile: out.mul_(tile.first_column != 0),
    "the last row missing": lambda out, tile: out[-1:].zero_(),
    "the student's others missing": lambda out, tile: out.mul_(tile.student is not tile.teacher),
}


@pytest.mark.parametrize(("backend", "dtype"), widest())
@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_gradients_fail(
    fault: str, backend: str, dtype: str, tiling: Tiling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tolerance itself: what conforms must not conform once its gradient is spoilt."""
    tiling(chunk=13, width=48)
    name = f"{backend}, matched, {fault}"  # a name stands for a backend for good
    monkeypatch.setitem(BACKENDS, name, Mutant(BACKENDS[backend], FAULTS[fault]))  # type: ignore[arg-type]
    problem, loss = unlike("linear"), Loss("jeffreys", "static")
    for run in runs(name, loss):
        if fault == "none":
            check(problem, loss, dtype, [run])
            continue
        with pytest.raises(AssertionError, match=r"largest error|projection|error of row"):
            check(problem, loss, dtype, [run])
            pytest.fail(f"{fault} passed")  # not an AssertionError


def _rest_of_the_teacher_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = matched_walk._log_sum_exp
    monkeypatch.setattr(
        matched_walk, "_log_sum_exp",
        lambda state: honest(state) - 0.02 * (state["m_s"] == state["m_t"]),
    )  # fmt: skip


def _rest_not_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = matched_walk.recentred
    monkeypatch.setattr(
        matched_walk, "recentred", lambda row, lse, by_rest: honest(row, lse, 0.99 * by_rest)
    )


@pytest.mark.parametrize("spoil", [_rest_of_the_teacher_missing, _rest_not_spread])
def test_a_wrong_rest_fails(spoil: Any, tiling: Tiling, monkeypatch: pytest.MonkeyPatch) -> None:
    tiling(chunk=13, width=48)
    spoil(monkeypatch)
    loss = Loss("jeffreys", "static")
    with pytest.raises(AssertionError, match=r"largest error|projection|error of row"):
        check(unlike("linear"), loss, "fp64", runs("eager", loss))
