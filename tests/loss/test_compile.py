"""``torch.compile(fullgraph=True)`` through the public functions, and the custom ops beneath."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import bgkernels as bg
from bgkernels.loss import compiled as ops
from bgkernels.loss.options import Options
from bgkernels.loss.pose import pose
from bgkernels.rows.extras import Extra, Mixture, Tempered, Tilt, TotalVariation
from bgkernels.streaming.problem import Problem
from bgkernels.streaming.teachers.base import Teacher

V = 50
SAID = "ValueError" if torch.__version__.startswith("2.8.") else None
"""What the compiler of torch 2.8 says of an error: its class alone."""
Case = Callable[[list[Tensor]], Tensor]


def tensors() -> list[Tensor]:
    """Input, weight, bias, teacher hidden, teacher weight, labels (one ignored)."""
    student = [torch.randn(6, 8), torch.randn(V, 8), torch.randn(V)]
    labels = torch.randint(V, (6,))
    labels[2] = -100
    return [x.requires_grad_() for x in student] + [torch.randn(6, 4), torch.randn(V, 4), labels]


def linear(target: str | None = None, **options: object) -> Case:
    def loss(t: list[Tensor]) -> Tensor:
        x, w, b, h, w_t, y = t
        teacher = bg.LinearTeacher(h, w_t)
        label = y if target is None else target
        return bg.linear_hybrid_distillation(x, w, teacher, label, linear_bias=b, **options)

    return loss


def surer(stats: list[bg.RowStats]) -> Tensor:
    return torch.softmax(-torch.stack([s.entropy_t for s in stats], -1), -1)


def mixture(weights: Any, kind: str = "sum", **options: object) -> Case:
    def loss(t: list[Tensor]) -> Tensor:
        x, w, b, h, w_t, y = t
        pair = [bg.LinearTeacher(h, w_t, logit_softcap=3.0), bg.LogitsTeacher(h.flip(0) @ w_t.t())]
        teacher = bg.MixtureTeacher(pair, weights, kind)
        return bg.linear_hybrid_distillation(x, w, teacher, y, linear_bias=b, **options)

    return loss


module = bg.LinearHybridDistillationLoss(divergence="jeffreys", temperature=2.0)
CASES: dict[str, Case] = {
    "default": linear(),
    "none, objects": linear(
        reduction="none",
        divergence=bg.divergences.generalized_jsd(0.3),
        routing=bg.routing.threshold(0.3),
    ),
    "batchwide": linear(routing="top_entropy", divergence="total_variation"),
    "risk": linear(routing="risk_guided"),
    "warm": linear(temperature=2.5, divergence="reverse_kl"),
    "warm, a function": linear(temperature=2.5, routing=lambda s: (s.logp_s.exp(), s.entropy_s)),
    "argmax": linear("teacher_argmax", z_loss=1e-3, label_smoothing=0.1),
    "sample": linear("teacher_sample", seed=7),
    "module": lambda t: module(t[0], t[1], bg.LinearTeacher(t[3], t[4]), t[5], t[2]),
    "logits": lambda t: bg.hybrid_distillation(
        t[0] @ t[1].t() + t[2], bg.LogitsTeacher(t[3] @ t[4].t()), t[5]
    ),
    "sum of teachers": mixture((0.7, 0.3)),
    "sum, a function": mixture(surer, temperature=2.0),
    "distribution": mixture(torch.tensor([0.7, 0.3]).expand(6, 2), "distribution"),
    "stats": lambda t: bg.linear_row_stats(
        t[0], t[1], bg.LinearTeacher(t[3], t[4]), t[5], linear_bias=t[2]
    ).kl_st.sum(),
}


@pytest.mark.parametrize("name", CASES)
def test_compiled_equals_eager(name: str) -> None:
    torch._dynamo.reset()
    args = tensors()
    eager = CASES[name](args)
    expected = torch.autograd.grad(eager.sum(), args[:3])
    compiled = torch.compile(CASES[name], fullgraph=True, backend="aot_eager")(args)
    got = torch.autograd.grad(compiled.sum(), args[:3])
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)
    for ours, ref in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, ref, rtol=1e-4, atol=1e-6)


def test_inductor() -> None:
    torch._dynamo.reset()
    args = tensors()
    compiled = torch.compile(CASES["default"], fullgraph=True)(args)
    torch.testing.assert_close(compiled, CASES["default"](args), rtol=1e-5, atol=1e-6)


def test_fused_mode_is_refused_under_compile() -> None:
    torch._dynamo.reset()
    with pytest.raises(Exception, match=SAID or r"torch\.compile"):
        torch.compile(linear(mode="fused"), fullgraph=True, backend="aot_eager")(tensors())


def test_tensors_of_inference_mode_are_refused_where_a_gradient_is_wanted() -> None:
    torch._dynamo.reset()
    args = tensors()
    with torch.inference_mode():
        args[3] = args[3].clone()
    loss = torch.compile(CASES["default"], fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=r"inference_mode.* under torch\.no_grad"):
        loss(args)
    with torch.no_grad():
        torch.testing.assert_close(loss(args), CASES["default"](args), rtol=1e-5, atol=1e-6)


def problem(extras: tuple[Extra, ...], teacher: Teacher | None, target: Tensor | str) -> Problem:
    x, w, b = tensors()[:3]
    student = {"input": x, "linear_weight": w, "linear_bias": b}
    options = Options(
        temperature=1.5, logit_scale=0.5, logit_softcap=6.0, memory_budget=1 << 20, seed=1 << 40
    )
    return pose(student, teacher, target, options, extras=extras, reads_teacher=teacher is not None)


def pair(kind: str) -> bg.MixtureTeacher:
    shares = torch.tensor([0.25, 0.75]).expand(6, 2)
    return bg.MixtureTeacher([LINEAR, bg.LogitsTeacher(torch.randn(6, V))], shares, kind)


LINEAR = bg.LinearTeacher(torch.randn(6, 4), torch.randn(V, 4), torch.randn(V), 0.5, 4.0)
PROBLEMS = {
    "linear": ((), LINEAR, torch.tensor([1, 2, -100, 4, 5, 6])),
    "extras": (
        (Mixture(0.3), Tilt(0.0, 0.1), Tempered(), TotalVariation(), Tilt(0.5, -0.5, True)),
        bg.LogitsTeacher(torch.randn(6, V - 7)),
        "teacher_sample",
    ),
    "no teacher": ((), None, torch.tensor([1, 2, -100, 4, 5, 6])),
    "sum": ((Mixture(0.3), Tempered()), pair("sum"), torch.tensor([1, 2, -100, 4, 5, 6])),
    "distribution": ((Tilt(0.0, 0.1),), pair("distribution"), "teacher_argmax"),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_problem_crosses_the_boundary(name: str) -> None:
    posed = problem(*PROBLEMS[name])
    student, teacher = ops.tensors_of(posed)
    decoded = ops.decode(ops.encode(posed), posed.labels, student, teacher)
    for part in ("spec", "backend", "budget", "ignore_index", "autocast", "shard", "leading"):
        assert getattr(decoded, part) == getattr(posed, part), part
    assert decoded.teacher.specs(decoded.spec) == posed.teacher.specs(posed.spec)
    pairs = zip(
        (*decoded.student, *decoded.teacher.tensors), (*posed.student, *posed.teacher.tensors),
        strict=True,
    )  # fmt: skip
    assert all(a is b for a, b in pairs) and type(decoded.teacher) is type(posed.teacher)


@pytest.mark.parametrize("name", PROBLEMS)
def test_ops_keep_their_contract(name: str) -> None:
    posed = problem(*PROBLEMS[name])
    student, teacher = ops.tensors_of(posed)
    torch.library.opcheck(ops.row_statistics, (posed.labels, student, teacher, *ops.encode(posed)))
