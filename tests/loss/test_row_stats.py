"""``linear_row_stats``: all statistics at one temperature, and gradients through any of them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

import bgkernels as bg
from bgkernels.rows.arithmetic import SKIP
from bgkernels.rows.spec import RowSpec
from bgkernels.rows.stats import TENSOR_FIELDS, RowStats
from tests import dense, oracle
from tests.conftest import Tiling
from tests.gradients import places
from tests.problems import DTYPES, IGNORED, Failures, Problem, cells, make, normal
from tests.situations import EXTRAS
from tests.yardstick import assert_close

ROWS = 48
ON = pytest.mark.parametrize(("backend", "dtype"), cells("fp64", "fp32"))


def streamed(problem: Problem, leaves: dict[str, Tensor], **options: object) -> RowStats:
    x, w, b = leaves.values()
    return bg.linear_row_stats(
        x, w, problem.library_teacher(), problem.target, linear_bias=b, **problem.student_cap,
        **options,
    )  # fmt: skip


def by_name(stats: RowStats) -> dict[str, Tensor]:
    """Fields and extras by the names of ``dense.fields``."""
    named = {name: getattr(stats, name) for name in dense.BASE}
    for extra, values in stats.extras.items():
        fields = extra.fields[: extra.public]
        named |= {f"{name} of {extra}": x for name, x in zip(fields, values, strict=True)}
    return named


@ON
@pytest.mark.parametrize(
    ("vocab", "temperature"),
    [((200, 200), 1.0), ((200, 170), 1.0), ((170, 200), 2.0), ((200, 200), 2.5)],
)
def test_values_and_gradients_are_those_of_dense_rows(
    vocab: tuple[int, int], temperature: float, backend: str, dtype: str, tiling: Tiling
) -> None:
    tiling(chunk=20, width=64, kept=2)
    cap = {"logit_scale": 2.0, "logit_softcap": 9.0} if temperature == 2.0 else {}
    problem = make(leading=(ROWS,), vocab=vocab, student_cap=cap).to(DTYPES[dtype])
    valid, eps = problem.target != IGNORED, torch.finfo(DTYPES[dtype]).eps
    exact, labels = problem.to(torch.float64), problem.target.where(valid, SKIP)
    leaves = [p.leaves() for p in (problem, exact, problem)]
    options = {"temperature": temperature, "extras": EXTRAS, "backend": backend}
    ours = by_name(streamed(problem, leaves[0], **options))
    ref, yard = (
        dense.fields(*p.logits(x), labels, temperature, EXTRAS)
        for p, x in zip((exact, problem), leaves[1:], strict=True)
    )
    with Failures() as failures:
        for name in ref:
            with failures.cell(name):
                a, b, c = (of[name].detach() * valid for of in (ours, ref, yard))
                assert_close(a, b, c, eps)
        differentiable = places(RowSpec(1, 1, extras=EXTRAS))
        upstream = {name: normal(ROWS, seed=i) * valid for i, name in enumerate(differentiable)}
        few = [["kl_st"], ["nll"], ["entropy_s of " + str(bg.Tempered(0.4))], list(upstream)]
        for names in few:
            sides = []
            for of, side in zip((ours, ref, yard), leaves, strict=True):
                total = sum((of[n] * upstream[n].to(of[n])).sum() for n in names)
                sides.append(torch.autograd.grad(total, list(side.values()), retain_graph=True))
            for leaf, x, y, z in zip(problem.student, *sides, strict=True):
                with failures.cell("gradient of", *names[:2], leaf):
                    assert_close(x, y, z, eps)


def test_fields_of_the_oracle(backend: str) -> None:
    """In the input's leading shape, also what carries no gradient; 0 in ignored rows."""
    problem = make(leading=(2, 9), vocab=(60, 50)).to(torch.float32)
    stats = streamed(problem, problem.leaves(), temperature=2.5, backend=backend)
    exact = problem.to(torch.float64)
    expected = oracle.row_stats(*exact.logits(exact.student), problem.target, temperature=2.5)
    valid = problem.target != IGNORED
    for name in TENSOR_FIELDS:
        x, y = getattr(stats, name), expected[name]
        assert x.shape == (2, 9)
        torch.testing.assert_close(x[valid].to(y), y[valid], rtol=1e-5, atol=1e-5, msg=name)
        assert x.dtype == (torch.float32 if y.is_floating_point() else y.dtype)
    assert not any(x[~valid].any() for x in stats.tensors() if x.is_floating_point())
    assert stats.vocab == 50 and stats.positions == 9


def test_without_a_teacher(backend: str) -> None:
    problem = make(leading=(2, 9), vocab=(60, 60)).to(torch.float32)
    leaves = problem.leaves()
    x, w, b = leaves.values()
    stats = bg.linear_row_stats(x, w, None, problem.target, linear_bias=b, backend=backend)
    z = (x @ w.t() + b).reshape(18, -1)
    nll = torch.nn.functional.cross_entropy(z, problem.target.reshape(-1), reduction="none")
    torch.testing.assert_close(stats.nll.reshape(-1), nll)
    assert not stats.entropy_s.any() and not stats.kl_ts.any() and stats.vocab == 0
    ours, theirs = (
        torch.autograd.grad(value.sum(), list(leaves.values()), retain_graph=True)
        for value in (stats.nll, nll)
    )
    torch.testing.assert_close(ours, theirs)


def test_an_objective_of_ones_own(backend: str) -> None:
    """Differentiable twice over: a weight that follows the student's entropy."""
    problem = make(leading=(20,), vocab=(60, 60)).to(torch.float32)
    valid = problem.target != IGNORED
    results = []
    for of in ("ours", "dense"):
        leaves = problem.leaves()
        if of == "ours":
            s = streamed(problem, leaves, temperature=2.0, extras=[bg.Tempered()], backend=backend)
            cold, kl, nll = s.tempered()["entropy_s"], s.kl_ts, s.nll
        else:
            pair = (*problem.logits(leaves), problem.target)
            cold = oracle.row_stats(*pair)["entropy_s"]
            warm = oracle.row_stats(*pair, temperature=2.0)
            kl, nll = warm["kl_ts"], warm["nll"]
        loss = ((torch.sigmoid(cold - 2) * kl + nll) * valid).sum()
        results.append([loss, *torch.autograd.grad(loss, list(leaves.values()))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["sum", "distribution"])
def test_the_weights_of_a_mixture_look_at_temperature_1(kind: str, backend: str) -> None:
    """So that a mixture is the same teacher here as in a loss."""
    problem = make("mixed", leading=(20,), vocab=(60, 60)).to(torch.float32)
    teachers = [problem.teacher["logits"], normal(20, 60, seed=3).float()]
    seen: list[RowStats] = []

    def surer(stats: list[RowStats]) -> Tensor:
        seen[:] = stats
        return torch.softmax(-torch.stack([s.entropy_t for s in stats], 1), 1)

    teacher = bg.MixtureTeacher([bg.LogitsTeacher(t) for t in teachers], surer, kind=kind)
    x, w, b = problem.student.values()
    options = {"linear_bias": b, "temperature": 2.5, "backend": backend}
    valid = problem.target != IGNORED
    for extras in ((), (bg.Tempered(),), (bg.Tilt(0.0, 0.3),)):
        stats = bg.linear_row_stats(x, w, teacher, problem.target, extras=extras, **options)
        assert tuple(stats.extras) == extras
        for s, t in zip(seen, teachers, strict=True):
            log_p = t.double().log_softmax(1)
            expected = -(log_p.exp() * log_p).sum(1)
            torch.testing.assert_close(s.entropy_t[valid], expected[valid], rtol=1e-5, atol=1e-6)
    _, shown = bg.linear_hybrid_distillation(
        x, w, teacher, problem.target, return_stats=True, **options
    )
    torch.testing.assert_close(shown.kl_ts, stats.kl_ts)


def test_a_mean_logit_that_nobody_summed_is_no_plausible_number() -> None:
    x, w, t = torch.randn(4, 6), torch.randn(30, 6), bg.LogitsTeacher(torch.randn(4, 30))
    policy = bg.routing.Policy("mean", lambda s: (1 + s.logit_mean.abs(), 0.0))
    call = partial(bg.linear_hybrid_distillation, x, w, t, torch.arange(4), routing=policy)
    assert call().isnan()
    assert call(label_smoothing=0.1).isfinite() and call(return_stats=True)[0].isfinite()
