"""A teacher of which only some columns are known, against dense torch in float64."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor

import bgkernels as bg
from tests import oracle
from tests.conftest import Tiling
from tests.problems import (
    DIVERGENCES,
    DTYPES,
    PAIRS,
    Loss,
    agree,
    called,
    cells,
    labels,
    make,
    runs,
    ways,
    widest,
    with_gradients,
)  # fmt: skip
from tests.streaming.categories import (
    CAPS,
    ENDLESS,
    TAIL_SETTINGS,
    TAILS,
    Pair,
    mean_loss,
    multiplied,
)  # fmt: skip

INF = float("inf")
V, C, K = 83, 79, 7  # the student's columns, those compared, those kept


@dataclass
class Kept:
    """Dense real logits of both models, and what is kept of the teacher's."""

    student: dict[str, Tensor]
    cap: dict[str, float]
    indices: Tensor
    logprobs: Tensor
    target: Tensor

    def teacher(self, tail: str, **more: Any) -> bg.TopKTeacher:
        return bg.TopKTeacher(self.indices, self.logprobs, tail, vocab=C, **more)

    def to(self, dtype: torch.dtype) -> Kept:
        student = {name: x.to(dtype) for name, x in self.student.items()}
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return Kept(student, self.cap, self.indices, self.logprobs.to(wide), self.target)

    def leaves(self) -> dict[str, Tensor]:
        return {name: x.detach().clone().requires_grad_() for name, x in self.student.items()}

    def ours(self, loss: Loss, teacher: bg.TopKTeacher, **run: Any) -> list[Tensor]:
        leaves, options = self.leaves(), loss.library() | self.cap | run
        return with_gradients(called(leaves, teacher, self.target, **options), leaves)

    def dense(self, loss: Loss, tail: str) -> list[Tensor]:
        leaves = self.leaves()
        return with_gradients(dense_loss(self, leaves, tail, **loss.oracle()), leaves)


def problem(kind: str = "linear", seed: int = 0, **cap: float) -> Kept:
    """Ragged rows; labels among the kept columns, outside, beyond the compared, and ignored."""
    source = make(kind, leading=(3, 8), vocab=(V, C), seed=seed, student_cap=cap)
    _, t = source.logits(source.student)
    kept = t.log_softmax(-1).topk(K)
    indices, order = kept.indices.clone(), torch.randperm(K)
    indices[..., 5:][:, ::3] = -1
    target = labels((3, 8), V)
    target[:, 1::3] = torch.where(target[:, 1::3] < 0, -100, kept.indices[:, 1::3, 0])
    target[:, 2] = V - 1
    logprobs = kept.values.masked_fill(indices < 0, float("nan"))
    return Kept(source.student, cap, indices[..., order], logprobs[..., order], target)


def dense_loss(
    kept: Kept, leaves: dict[str, Tensor], tail: str, *, divergence: str, routing: str,
    divergence_params: Any, routing_params: Any, temperature: float = 1.0,
    label_smoothing: float = 0.0, z_loss: float = 0.0,
) -> Tensor:  # fmt: skip
    """The loss as it is defined: categories for the divergence, single columns for routing."""
    z = leaves["logits"] if "logits" in leaves else oracle.real_logits(*leaves.values())  # type: ignore[arg-type]
    z = z.reshape(-1, V) * kept.cap.get("logit_scale", 1.0)
    z = z.float() if z.dtype.itemsize < 4 else z
    if "logit_softcap" in kept.cap:
        z = kept.cap["logit_softcap"] * torch.tanh(z / kept.cap["logit_softcap"])
    coarse, _ = distributions(kept, z, tail, temperature)
    _, (lp_s, lp_t) = distributions(kept, z, tail, 1.0)
    valid = kept.target.reshape(-1) != -100
    label = kept.target.reshape(-1).masked_fill(~valid, 0)
    row = oracle.Row(
        tuple(kept.target.shape), z, lp_s, lp_t, label, valid,
        oracle._at(lp_s, label), oracle._at(lp_t, label),
    )  # fmt: skip
    return mean_loss(
        row, oracle.DIVERGENCES[divergence](*coarse, **(divergence_params or {})),
        routing=routing, routing_params=routing_params, temperature=temperature,
        label_smoothing=label_smoothing, z_loss=z_loss,
    )  # fmt: skip


def distributions(kept: Kept, z: Tensor, tail: str, temperature: float) -> tuple[Pair, Pair]:
    """Over the categories that divergences compare, and over the single columns for routing."""
    u = z[:, :C] / temperature
    t = _scattered(u, kept.indices.reshape(-1, K), kept.logprobs.reshape(-1, K).to(z))
    inside = t > -INF
    if tail == "drop":
        lp_s, lp_t = ((x.masked_fill(~inside, -INF)).log_softmax(-1) for x in (u, t / temperature))
        return (lp_s, lp_t), (lp_s, lp_t)
    lp_s = u.log_softmax(-1)
    outside = lp_s.masked_fill(inside, -INF).logsumexp(-1, keepdim=True)
    rest = torch.full_like(outside, -INF)
    if tail == "bucket":
        rest = torch.log1p(-t.exp().sum(-1, keepdim=True))
    coarse_t = torch.cat([t / temperature, rest], -1).log_softmax(-1)
    coarse_s = torch.cat([lp_s.masked_fill(~inside, -INF), outside], -1)
    each = coarse_t[:, -1:] - (~inside).sum(-1, keepdim=True).to(z).log()
    return (coarse_s, coarse_t), (lp_s, torch.where(inside, coarse_t[:, :-1], each))


def _scattered(like: Tensor, ids: Tensor, logp: Tensor) -> Tensor:
    """``(rows, C)`` log-probabilities of the kept columns, -inf elsewhere."""
    wider = torch.full_like(torch.cat([like, like[:, :1]], 1), -INF)
    return wider.scatter(1, torch.where(ids < 0, C, ids), logp)[:, :C]


def check(kept: Kept, loss: Loss, tail: str, dtype: str, runs: list[dict[str, Any]]) -> None:
    agree(
        kept,
        lambda made, **run: made.ours(loss, made.teacher(tail), **run),
        lambda made: made.dense(loss, tail),
        DTYPES[dtype],
        runs,
    )


@pytest.mark.parametrize(("backend", "dtype"), widest())
@pytest.mark.parametrize(("tail", "kind", "pair"), TAIL_SETTINGS)
def test_every_divergence_and_policy(
    tail: str, kind: str, pair: tuple[str, str], backend: str, dtype: str, tiling: Tiling
) -> None:
    tiling(chunk=13, width=48)
    options = {} if tail == "bucket" else {"temperature": 1.7}
    loss = Loss(*pair, options=options)
    check(problem(kind), loss, tail, dtype, runs(backend, loss))


@pytest.mark.parametrize(("backend", "dtype"), cells("bf16"))
@pytest.mark.parametrize("multiplied", ways("bf16"), indirect=True)
@pytest.mark.parametrize("tail", TAILS)
def test_16_bits(tail: str, multiplied: str, backend: str, dtype: str, tiling: Tiling) -> None:
    tiling(chunk=13, width=48)
    loss = Loss("generalized_jsd", "entropy")
    check(problem("linear"), loss, tail, dtype, runs(backend, loss))


@pytest.mark.parametrize(("backend", "dtype"), widest())
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("kind", ["linear", "logits"])
@pytest.mark.parametrize("cap", CAPS, ids=str)
def test_details_of_the_head(
    cap: dict[str, float], kind: str, tail: str, backend: str, dtype: str, tiling: Tiling
) -> None:
    tiling(chunk=24, width=32, kept=2)
    options = {"label_smoothing": 0.1, "z_loss": 1e-3}
    options |= {} if tail == "bucket" else {"temperature": 1.7}
    loss = Loss("generalized_jsd", "weighted_soft", options=options)
    check(problem(kind, **cap), loss, tail, dtype, runs(backend, loss))


@pytest.mark.parametrize("tail", TAILS)
def test_all_columns_kept_is_the_dense_teacher(tail: str) -> None:
    t = torch.randn(6, 20, dtype=torch.float64)
    kept = t.log_softmax(-1).topk(20)
    teachers = bg.TopKTeacher(kept.indices, kept.values, tail), bg.LogitsTeacher(t)
    leaves = [torch.randn(*n, dtype=torch.float64, requires_grad=True) for n in ((6, 5), (20, 5))]
    words = ("teacher_argmax",) if tail == "bucket" else ("teacher_argmax", "teacher_sample")
    for (divergence, routing), word in zip(PAIRS, cycle(words), strict=False):
        if tail == "renormalize" and divergence in ENDLESS:
            continue
        heat = 1.0 if tail == "bucket" else 2.0
        options = {"divergence": divergence, "routing": routing, "temperature": heat, "seed": 3}
        got, ref = (
            bg.linear_hybrid_distillation(*leaves, teacher, word, **options) for teacher in teachers
        )
        for a, b in zip(
            [got, *torch.autograd.grad(got, leaves)], [ref, *torch.autograd.grad(ref, leaves)],
            strict=True,
        ):  # fmt: skip
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=f"{divergence} {routing}")


@pytest.mark.parametrize("tail", TAILS)
def test_what_was_captured_makes_routing_exact(tail: str) -> None:
    t = torch.randn(6, 50)
    lp = t.log_softmax(-1)
    kept = lp.topk(4)
    entropy, power = -(lp.exp() * lp).sum(-1), (0.1 * lp).logsumexp(-1)
    teacher = bg.TopKTeacher(kept.indices, kept.values, tail, entropy, power)
    z, y = torch.randn(6, 50), torch.randint(50, (6,))
    for routing in ("entropy", bg.routing.entropy("shannon"), "threshold"):
        options = {"routing": routing, "divergence": _nothing(), "return_stats": True}
        (got, stats), (ref, dense) = (
            bg.hybrid_distillation(z, x, y, **options) for x in (teacher, bg.LogitsTeacher(t))
        )
        torch.testing.assert_close(got, ref, rtol=1e-5, atol=1e-6)
    names = ["entropy_t", "argmax_t", "label", "nll", "lse_hard", "logit_mean"]
    names += [] if tail == "drop" else ["argmax_s", "entropy_s", "logp_s", "lse_s", "max_prob_s"]
    names += ["max_prob_t"] if tail == "bucket" else []
    for name in names:
        torch.testing.assert_close(getattr(stats, name), getattr(dense, name), rtol=1e-5, atol=1e-5)
    assert stats.vocab == 50


def _nothing() -> bg.divergences.Divergence:
    return bg.divergences.Divergence("nothing", lambda s: 0 * s.kl_ts)


@pytest.mark.parametrize("tail", ["bucket", "drop"])
def test_a_student_like_its_teacher_diverges_by_nothing(tail: str) -> None:
    """And by less than nothing never: verl #7856."""
    z = 4 * torch.randn(64, 200)
    kept = z.log_softmax(-1).topk(16)
    teacher = bg.TopKTeacher(kept.indices, kept.values, tail)
    for divergence in DIVERGENCES:
        options = {"divergence": divergence, "routing": "soft", "reduction": "none"}
        loss = bg.hybrid_distillation(z, teacher, "teacher_argmax", **options)
        assert (loss >= (-1e-6 if divergence in ("renyi", "alpha_beta") else 0)).all(), divergence
        assert loss.max() < 1e-5, divergence


def test_a_row_of_certainty_stays_finite() -> None:
    """A tail that rounds to nothing, and students that are sure of the tail or of a kept column."""
    z = torch.zeros(3, 60)
    z[0, 0] = z[1, 50] = 1e4
    z.requires_grad_()
    indices = torch.arange(4).expand(3, 4)
    logprobs = torch.tensor([0.0, -20.0, -30.0, -40.0]).expand(3, 4)
    for divergence in DIVERGENCES:
        teacher = bg.TopKTeacher(indices, logprobs)
        loss = bg.hybrid_distillation(z, teacher, "teacher_argmax", divergence=divergence)
        (dz,) = torch.autograd.grad(loss, z)
        assert loss.isfinite() and dz.isfinite().all(), divergence


@pytest.mark.parametrize("value", [float("nan"), INF])
@pytest.mark.parametrize("column", [2, 30])
def test_a_nan_is_not_hidden(value: float, column: int) -> None:
    z = torch.randn(3, 60)
    z[1, column] = value
    teacher = bg.TopKTeacher(torch.arange(4).expand(3, 4), torch.full((3, 4), -2.0))
    loss = bg.hybrid_distillation(z, teacher, torch.tensor([5, 6, 7]), reduction="none")
    assert loss.isnan().tolist() == [False, True, False]
    z.requires_grad_()
    for cap in (None, 9.0):
        loss = bg.hybrid_distillation(z, teacher, torch.tensor([5, -100, 7]), logit_softcap=cap)
        (dz,) = torch.autograd.grad(loss, z)
        assert loss.isfinite() and dz.isfinite().all() and not dz[1].any()


def test_a_row_that_keeps_nothing_is_no_plausible_number() -> None:
    teacher = bg.TopKTeacher(torch.full((2, 3), -1), torch.zeros(2, 3), "drop")
    z = torch.randn(2, 9)
    assert bg.hybrid_distillation(z, teacher, torch.tensor([1, 2])).isnan()
    assert bg.hybrid_distillation(z, teacher, torch.tensor([-100, -100])) == 0


KEEP = torch.tensor([[0, 1], [2, 3]])
SMALL = torch.full((2, 2), -3.0)
ERRORS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "float indices": (bg.TopKTeacher(SMALL, SMALL), {}, "indices.*int64"),
    "shape": (bg.TopKTeacher(KEEP, SMALL[:, :1]), {}, "logprobs"),
    "range": (bg.TopKTeacher(KEEP + 8, SMALL), {}, "indices.*lie in"),
    "twice": (bg.TopKTeacher(KEEP * 0, SMALL), {}, "once"),
    "mass": (bg.TopKTeacher(KEEP, SMALL + 3), {}, "add up"),
    "tail": (bg.TopKTeacher(KEEP, SMALL, "other"), {}, "tail"),
    "entropy": (bg.TopKTeacher(KEEP, SMALL, entropy=SMALL), {}, "entropy"),
    "heat": (bg.TopKTeacher(KEEP, SMALL), {"temperature": 2.0}, "renormalize"),
    "captured": (
        bg.TopKTeacher(KEEP, SMALL, "drop", SMALL[0]), {"temperature": 2.0}, "entropy",
    ),
    "too many": (
        bg.TopKTeacher(KEEP, SMALL), {"vocab_size": 1, "target": KEEP[0] * 0}, "keep from 1 to 1",
    ),
    "sample": (bg.TopKTeacher(KEEP, SMALL), {"target": "teacher_sample"}, "teacher_sample"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    teacher, options, message = ERRORS[name]
    options = {"target": torch.tensor([1, 2])} | options
    with pytest.raises((TypeError, ValueError), match=message):
        bg.hybrid_distillation(torch.randn(2, 9), teacher, options.pop("target"), **options)


@pytest.mark.parametrize("divergence", ENDLESS)
def test_endless_divergences_are_refused(divergence: str) -> None:
    teacher = bg.TopKTeacher(KEEP, SMALL, "renormalize")
    with pytest.raises(NotImplementedError, match=r"tail='bucket' or 'drop'"):
        bg.hybrid_distillation(torch.randn(2, 9), teacher, KEEP[0], divergence=divergence)


@pytest.mark.parametrize("kind", ["top-k", "sum"])
def test_a_gradient_written_over_the_logits(kind: str) -> None:
    z = torch.randn(6, 50, requires_grad=True)
    kept = torch.randn(6, 50).log_softmax(-1).topk(4)
    teacher: Any = bg.TopKTeacher(kept.indices, kept.values)
    if kind == "sum":
        teacher = bg.MixtureTeacher([teacher, bg.LogitsTeacher(torch.randn(6, 50))] * 2, [0.25] * 4)
    made = []
    for overwrite in (False, True):
        copy = z * 1  # no leaf
        loss = bg.hybrid_distillation(copy, teacher, kept.indices[:, 0], overwrite_logits=overwrite)
        made.append(torch.autograd.grad(loss, z)[0])
    torch.testing.assert_close(*made)


@pytest.mark.parametrize("leading", [(), (0,), (2, 0), (2, 3)])
def test_any_leading_shape(leading: tuple[int, ...]) -> None:
    z, lp = torch.randn(*leading, 20, requires_grad=True), torch.randn(*leading, 20).log_softmax(-1)
    kept, power = lp.topk(3), (0.1 * lp).logsumexp(-1)
    teacher = bg.TopKTeacher(kept.indices.int(), kept.values.bfloat16(), power_sum=power)
    loss, stats = bg.hybrid_distillation(z, teacher, "teacher_argmax", return_stats=True)
    (dz,) = torch.autograd.grad(loss, z)
    assert loss.isfinite() and dz.isfinite().all() and stats.entropy_t.shape == leading


def test_budgets_agree_and_no_teacher_is_multiplied() -> None:
    x, w = torch.randn(50, 8).requires_grad_(), torch.randn(900, 8).requires_grad_()
    kept = torch.randn(50, 900).log_softmax(-1).topk(5)
    teacher, y = bg.TopKTeacher(kept.indices, kept.values), torch.randint(900, (50,))
    assert multiplied(x, w, teacher, y, 60_000) == 3 * 50 * 8 * 900
