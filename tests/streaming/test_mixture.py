"""Several teachers at once, against the oracle's losses with one."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import bgkernels as bg
from tests import oracle
from tests.conftest import Tiling
from tests.problems import (
    DTYPES,
    PAIRS,
    WIDEN,
    Loss,
    Problem,
    called,
    cells,
    labels,
    make,
    normal,
    runs,
    ways,
    widest,
    with_gradients,
)  # fmt: skip
from tests.yardstick import assert_each_close

V, ROWS = 61, (3, 7)
KINDS = ("sum", "distribution")
SETTINGS = [
    pytest.param(("linear", "logits")[i % 2], 1.5 if i % 3 else 1.0, pair, id="-".join(pair))
    for i, pair in enumerate(PAIRS)
]
"""Each pair with a kind of teachers and a temperature."""


def problems(kind: str = "linear", count: int = 3, **cap: float) -> list[Problem]:
    """One student and its label; teachers of several widths and padded vocabularies."""
    student = make(kind, leading=ROWS, hidden=(6, 5), vocab=(V, V)).student
    target, made = labels(ROWS, V), []
    for i in range(count):
        widths = {"hidden": (6, 5 + i), "vocab": (V, V - 3 + 3 * i)}
        one = make(("linear", "mixed")[i % 2], leading=ROWS, seed=i, **widths)
        caps = {} if i % 2 else {"teacher_cap": cap}
        made.append(Problem(student, one.teacher, target, **caps))
    return made


def lam(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Weights of each token, of which some are 0."""
    x = normal(*ROWS, count, seed=5).abs()
    x[1, 2] = 0
    x[..., 0] += (x.sum(-1) == 0).double()
    return (x / x.sum(-1, keepdim=True)).to(dtype)


def ours(ps: list[Problem], weights: Any, kind: str, loss: Loss, **run: Any) -> list[Tensor]:
    teacher = bg.MixtureTeacher([p.library_teacher() for p in ps], weights, kind)
    leaves, options = ps[0].leaves(), {**loss.library(), **ps[0].student_cap, **run}
    return with_gradients(called(leaves, teacher, ps[0].target, **options), leaves)


def dense(ps: list[Problem], weights: Tensor, kind: str, loss: Loss) -> list[Tensor]:
    leaves, heat = ps[0].leaves(), loss.options.get("temperature", 1.0)
    pairs = [p.logits(leaves) for p in ps]
    z, ts = pairs[0][0], [t[..., : V - 3] for _, t in pairs]
    options = loss.oracle()
    if kind == "sum":
        values = [
            oracle.hybrid_loss(z, t, ps[0].target, token_weight=weights[..., i], **options)
            for i, t in enumerate(ts)
        ]
        value = sum(values[1:], values[0])
    else:
        parts = [(t / heat).log_softmax(-1) + weights[..., i, None].log() for i, t in enumerate(ts)]
        mixed = heat * torch.stack(parts).logsumexp(0)
        value = oracle.hybrid_loss(z, mixed, ps[0].target, **options)
    return with_gradients(value, leaves)


@functools.cache
def posed(source: str, dtype: str) -> list[Problem]:
    """Three linear teachers, of which some have a cap, or two that give logits."""
    if source == "linear":
        ps = problems("linear", 3, logit_scale=0.5, logit_softcap=4.0)
    else:
        ps = problems("logits", 2)
    return [p.to(DTYPES[dtype]) for p in ps]


def check(source: str, kind: str, loss: Loss, dtype: str, runs: list[dict[str, Any]]) -> None:
    mine = posed(source, dtype)
    exact = [p.to(torch.float64) for p in mine]
    weights = lam(len(mine), torch.float64 if dtype == "fp64" else torch.float32)
    ref = dense(exact, weights.double(), kind, loss)
    yard = ref if dtype == "fp64" else dense(mine, weights, kind, loss)
    for run in runs:
        got = ours(mine, weights, kind, loss, **run)
        eps = torch.finfo(DTYPES[dtype]).eps
        assert_each_close(["loss", *mine[0].student], got, ref, yard, eps, run)


@pytest.mark.parametrize(("backend", "dtype"), widest())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("source", "temperature", "pair"), SETTINGS)
def test_every_divergence_and_policy(
    source: str, temperature: float, pair: tuple[str, str], kind: str, backend: str, dtype: str,
    tiling: Tiling,
) -> None:  # fmt: skip
    tiling(chunk=12, width=40)
    options = {"temperature": temperature}
    options |= {} if temperature == 1 else {"label_smoothing": 0.1}
    loss = Loss(*pair, options=options)
    check(source, kind, loss, dtype, runs(backend, loss))


@pytest.mark.parametrize(("backend", "dtype"), cells("bf16"))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("source", "multiplied"),
    [("logits", WIDEN), *(("linear", way) for way in ways("bf16"))],
    indirect=["multiplied"],
)
def test_16_bits(
    source: str, multiplied: str, kind: str, backend: str, dtype: str, tiling: Tiling
) -> None:
    tiling(chunk=12, width=40)
    loss = Loss("generalized_jsd", "entropy", options={"temperature": 1.5})
    check(source, kind, loss, dtype, runs(backend, loss))


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_tensors_and_functions_agree(kind: str, tiling: Tiling) -> None:
    tiling(chunk=6, width=40)
    ps, numbers = problems(count=2), (0.25, 0.75)
    spread = torch.tensor(numbers).expand(*ROWS, 2)
    ref, *others = (
        ours(ps, w, kind, Loss())
        for w in (numbers, spread, lambda stats: spread.reshape(-1, 2)[: len(stats[0].nll)])
    )
    for got in others:
        for a, b in zip(got, ref, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["fused", "recompute"])
def test_a_teacher_is_trusted_where_it_is_sure(kind: str, mode: str, tiling: Tiling) -> None:
    tiling(chunk=5, width=40)
    ps = problems(count=2)

    def surer(stats: list[bg.RowStats]) -> Tensor:
        return torch.softmax(-torch.stack([s.entropy_t for s in stats], -1), -1)

    lps = [p.logits(p.student)[1][..., : V - 3].log_softmax(-1) for p in ps]
    weights = torch.softmax(torch.stack([(lp.exp() * lp).sum(-1) for lp in lps], -1), -1)
    got, ref = ours(ps, surer, kind, Loss(), mode=mode), dense(ps, weights, kind, Loss())
    for a, b in zip(got, ref, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_a_sum_need_not_add_up_to_one_and_has_one_cross_entropy() -> None:
    (p, q), loss = problems(count=2), Loss("reverse_kl", "additive")
    (value, *_) = ours([p, q], (0.5, 2.0), "sum", loss)
    soft = [x.dense(Loss("reverse_kl", "soft"))[0] for x in (p, _cut(q))]
    hard = p.dense(Loss(routing="hard"))[0]
    torch.testing.assert_close(value, hard + 0.5 * soft[0] + 2 * soft[1])


def _cut(p: Problem) -> Problem:
    teacher = {n: x[..., : V - 3] if n == "logits" else x[: V - 3] for n, x in p.teacher.items()}
    return Problem(p.student, teacher, p.target)


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "drop"])
def test_a_sum_takes_top_k_teachers(tail: str, tiling: Tiling) -> None:
    tiling(chunk=6, width=40)
    (p, q), loss = problems(count=2), Loss("generalized_jsd", "static")
    kept = p.logits(p.student)[1].log_softmax(-1).topk(5)
    top = bg.TopKTeacher(kept.indices, kept.values, tail, vocab=V - 3)

    def value(teacher: Any, **options: Any) -> list[Tensor]:
        leaves = p.leaves()
        x, w, b = leaves.values()
        loss_options = loss.library() | {"linear_bias": b} | options
        made = bg.linear_hybrid_distillation(x, w, teacher, p.target, **loss_options)
        return [made.detach(), *torch.autograd.grad(made, [x, w, b])]

    dense_teacher = _cut(q).library_teacher()
    alone = [value(top), value(dense_teacher)]
    ref = [0.3 * a + 0.7 * b for a, b in zip(*alone, strict=True)]
    for order in (1, -1):
        teachers, weights = [top, dense_teacher][::order], (0.3, 0.7)[::order]
        for mode in ("fused", "recompute"):
            got = value(bg.MixtureTeacher(teachers, weights), mode=mode)
            for a, b in zip(got, ref, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_statistics_and_words() -> None:
    t = [torch.randn(6, 20, dtype=torch.float64) for _ in range(2)]
    z, w = torch.randn(6, 20, dtype=torch.float64), (0.4, 0.6)
    mixed = (0.4 * t[0].softmax(-1) + 0.6 * t[1].softmax(-1)).log()
    teachers = [bg.LogitsTeacher(x) for x in t]
    one = bg.MixtureTeacher(teachers, w, "distribution")
    for word in ("teacher_argmax", "teacher_sample"):
        (a, got), (b, ref) = (
            bg.hybrid_distillation(z, x, word, seed=2, return_stats=True)
            for x in (one, bg.LogitsTeacher(mixed))
        )
        torch.testing.assert_close(a, b)
        assert got.label.tolist() == ref.label.tolist()
        torch.testing.assert_close(got.entropy_t, ref.entropy_t)
    x, head = (
        torch.randn(6, 4, dtype=torch.float64, requires_grad=True),
        torch.randn(20, 4).double(),
    )
    label = torch.randint(20, (6,))
    both = bg.linear_row_stats(x, head, bg.MixtureTeacher(teachers, (1.0, 3.0)), label)
    each = [bg.linear_row_stats(x, head, teacher, label) for teacher in teachers]
    for name in ("kl_ts", "entropy_t", "nll", "entropy_s"):
        mean = sum(w * getattr(s, name) for w, s in zip((0.25, 0.75), each, strict=True))
        torch.testing.assert_close(getattr(both, name), mean)
    got, ref = (torch.autograd.grad(s.sum(), x)[0] for s in (both.kl_st, 0.25 * each[0].kl_st
                                                              + 0.75 * each[1].kl_st))  # fmt: skip
    torch.testing.assert_close(got, ref)


def teachers() -> list[bg.LogitsTeacher]:
    return [bg.LogitsTeacher(torch.randn(2, 9)) for _ in range(2)]


TOP = bg.TopKTeacher(torch.tensor([[0, 1], [2, 3]]), torch.full((2, 2), -3.0))
UNCOMPILED = [
    TOP,
    bg.MixtureTeacher([TOP, *teachers()], (1.0, 1.0, 1.0)),
    bg.MixtureTeacher(teachers(), lambda s: torch.ones(2, 2) / 2, "distribution"),
]
ERRORS: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "none": (lambda: ([], ()), {}, ValueError, "teachers"),
    "count": (lambda: (teachers(), (1.0,)), {}, ValueError, "2 numbers"),
    "negative": (lambda: (teachers(), (1.0, -1.0)), {}, ValueError, "weights"),
    "shape": (lambda: (teachers(), torch.ones(2, 3)), {}, ValueError, "weights"),
    "sum": (lambda: (teachers(), (1.0, 1.0), "distribution"), {}, ValueError, "add up to 1"),
    "function": (
        lambda: (teachers(), lambda s: -torch.ones(2, 2)), {}, ValueError, "negative",
    ),
    "function's shape": (
        lambda: (teachers(), lambda s: torch.ones(2)), {}, ValueError, r"\(tokens, teachers\)",
    ),
    "function's sum": (
        lambda: (teachers(), lambda s: torch.ones(2, 2), "distribution"), {}, ValueError, "add up",
    ),
    "nested": (
        lambda: ([bg.MixtureTeacher(teachers(), (1, 1))], (1.0,)), {}, TypeError, "its teachers",
    ),
    "kind": (lambda: (teachers(), (1, 1), "product"), {}, ValueError, "kind"),
    "top-k": (lambda: ([TOP], (1,), "distribution"), {}, NotImplementedError, "kind='sum'"),
    "word": (lambda: (teachers(), (1, 1)), {"target": "teacher_argmax"}, ValueError, "target"),
    "sample": (
        lambda: (teachers(), (0.5, 0.5), "distribution"),
        {"target": "teacher_sample", "temperature": 2.0}, ValueError, "temperature",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    arguments, options, kind, message = ERRORS[name]
    options = {"target": torch.tensor([1, 2])} | options
    with pytest.raises(kind, match=message):
        teacher = bg.MixtureTeacher(*arguments())
        bg.hybrid_distillation(torch.randn(2, 9), teacher, options.pop("target"), **options)


@pytest.mark.parametrize("teacher", UNCOMPILED)
def test_compilation_is_refused(teacher: Any) -> None:
    torch._dynamo.reset()
    y = torch.tensor([1, 2])

    def loss(z: Tensor) -> Any:
        return bg.hybrid_distillation(z, teacher, y)

    with pytest.raises(Exception, match=r"torch\.compile"):
        torch.compile(loss, fullgraph=True, backend="eager")(torch.randn(2, 9))


def test_budgets_agree() -> None:
    x, w = torch.randn(40, 8).requires_grad_(), torch.randn(900, 8).requires_grad_()
    pair = [bg.LinearTeacher(torch.randn(40, d), torch.randn(900, d)) for d in (5, 12)]
    y = torch.randint(900, (40,))
    for kind in KINDS:
        teacher = bg.MixtureTeacher(pair, (0.5, 0.5), kind)
        ref: Any = None
        for budget in (120_000, None):
            loss = bg.linear_hybrid_distillation(x, w, teacher, y, memory_budget=budget)
            got = torch.autograd.grad(loss, (x, w))
            ref = ref or got
            for a, b in zip(got, ref, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
