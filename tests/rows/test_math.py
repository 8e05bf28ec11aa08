"""The state is a monoid, its statistics and their derivatives are right, and extremes stay sane."""

from __future__ import annotations

import math
from itertools import pairwise, permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import bgkernels as bg
from bgkernels.backends import BACKENDS
from bgkernels.backends.base import Tile
from bgkernels.rows.spec import Extra, Mixture, RowSpec, Tilt, TotalVariation
from bgkernels.rows.state import FLOATS, NONE, SKIP, RowState, empty, merge
from bgkernels.rows.stats import DIFFERENTIABLE, RowStats, add_pairs, finalize
from tests import oracle
from tests.conftest import Tiling
from tests.problems import CPU, DTYPES, Failures, Loss, Problem, cells, make, normal
from tests.yardstick import assert_close

INF = math.inf
ROWS, COLUMNS = 6, 40
PAIRS = (Mixture(0.3), Mixture(0.8), TotalVariation())
TILTS = (Tilt(0.7, 0.2), Tilt(0.0, 0.1), Tilt(0.5, 0.0, moments=True))
SIGNED_TILTS = (Tilt(-0.4, 0.4), Tilt(0.0, 0.0, moments=True))
STYLES = ("normal", "ties", "offset", "masked in one", "masked in both")


def columns(style: str, seed: int) -> tuple[Tensor, Tensor]:
    """Logits ``(ROWS, COLUMNS)`` of both models in float64."""
    z, v = (normal(ROWS, COLUMNS, seed=2 * seed + i, std=3.0) for i in (0, 1))
    if style == "ties":
        z, v = (x.round().clamp(-2, 2) for x in (z, v))
    elif style == "offset":
        z, v = z + 300, v - 500
    elif style.startswith("masked"):
        masks = [normal(ROWS, COLUMNS, seed=2 * seed + i) > 0.3 for i in (5, 6)]
        z, v = z.masked_fill(masks[0], -INF), v.masked_fill(masks[style == "masked in one"], -INF)
    return z, v


def absorbed(
    z: Tensor, v: Tensor, labels: Tensor, spec: RowSpec, parts: list[slice], backend: str = "eager"
) -> RowState:
    """The state after these column ranges."""
    state = empty(len(z), len(spec.tilts), dtype=z.dtype, device=CPU)
    for part in parts:
        shared = slice(part.start, min(part.stop, spec.compared))
        teacher = v[:, shared] if shared.stop > shared.start else None
        tile = Tile(z[:, part], teacher, first_row=0, first_column=part.start)
        BACKENDS[backend].absorb_(state, tile, labels, spec)
    return state


def same_state(a: RowState, b: RowState, spec: RowSpec, tolerance: float = 1e-11) -> None:
    assert torch.equal(a.ints, b.ints)
    x, y = a.floats.clone(), b.floats.clone()
    for i, tilt in enumerate(spec.tilts):
        if not tilt.moments:  # the columns of the moments are never read
            x[len(FLOATS) + 4 * i :][2:4] = y[len(FLOATS) + 4 * i :][2:4] = 0
    torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, equal_nan=True)


def codes(rule: str, seed: int) -> Tensor:
    """Labels of each kind: skipped, in a part, beyond the compared columns, in no column."""
    if rule != "index":
        return torch.tensor([NONE, NONE, SKIP, NONE, NONE, NONE])
    return torch.tensor([0, COLUMNS - 1, SKIP, COLUMNS, seed % COLUMNS, 3 * seed % COLUMNS])


@st.composite
def situations(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, RowSpec]:
    style, seed = draw(st.sampled_from(STYLES)), draw(st.integers(0, 999))
    rule = draw(st.sampled_from(("index", "argmax", "sample")))
    tilts = TILTS[:2] if style == "masked in one" else TILTS + SIGNED_TILTS
    spec = RowSpec(
        COLUMNS,
        draw(st.sampled_from((COLUMNS, COLUMNS - 7))),
        temperature=draw(st.sampled_from((1.0, 2.5))),
        label_rule=rule,
        seed=seed,
        extras=tilts if draw(st.booleans()) else (),
        logit_sum=True,
    )
    return *columns(style, seed), codes(rule, seed), spec


cuts = st.lists(st.integers(1, COLUMNS - 1), min_size=1, max_size=6, unique=True)


def ranges(edges: list[int]) -> list[slice]:
    edges = [0, *sorted(edges), COLUMNS]
    return [slice(a, b) for a, b in pairwise(edges)]


@given(situations(), st.tuples(st.integers(1, 19), st.integers(20, COLUMNS - 1)))
def test_merge_is_associative_and_commutative(
    situation: tuple[Tensor, Tensor, Tensor, RowSpec], edges: tuple[int, int]
) -> None:
    z, v, labels, spec = situation
    states = [absorbed(z, v, labels, spec, [part]) for part in ranges(list(edges))]
    expected = merge(states[0], merge(states[1], states[2], spec), spec)
    for a, b, c in permutations(states):
        same_state(merge(merge(a, b, spec), c, spec), expected, spec)


@given(situations())
def test_the_empty_state_is_neutral(situation: tuple[Tensor, Tensor, Tensor, RowSpec]) -> None:
    z, v, labels, spec = situation
    state = absorbed(z, v, labels, spec, [slice(0, COLUMNS)])
    nothing = empty(ROWS, len(spec.tilts), dtype=z.dtype, device=CPU)
    for merged in (merge(state, nothing, spec), merge(nothing, state, spec)):
        same_state(merged, state, spec, 0)
    same_state(merge(nothing, nothing, spec), nothing, spec, 0)


@given(situations())
def test_skipped_rows_are_left_alone(situation: tuple[Tensor, Tensor, Tensor, RowSpec]) -> None:
    z, v, labels, spec = situation
    z[2], v[2] = math.nan, INF
    state = absorbed(z, v, labels, spec, ranges([11]))
    nothing = empty(ROWS, len(spec.tilts), dtype=z.dtype, device=CPU)
    assert torch.equal(state.floats[:, 2], nothing.floats[:, 2])
    assert torch.equal(state.ints[:, 2], nothing.ints[:, 2])
    stats = finalize(state, labels, spec, ignore_index=-5).stats
    assert stats.label[2] == -5 and not stats.valid[2]
    assert all(not x[2].any() for x in stats.tensors() if x.is_floating_point())


def statistics(
    z: Tensor, v: Tensor, labels: Tensor, spec: RowSpec, parts: list[slice], backend: str
) -> list[Tensor]:
    """All statistics, pairwise ones included, from tiles in the given order."""
    final = finalize(absorbed(z, v, labels, spec, parts, backend), labels, spec)
    count = 3 * len(spec.mixtures) + 2 * spec.total_variation
    sums = torch.zeros(count, len(z), dtype=z.dtype)
    for part in parts if spec.second_read else ():
        shared = slice(part.start, min(part.stop, spec.compared))
        teacher = v[:, shared] if shared.stop > shared.start else None
        tile = Tile(z[:, part], teacher, first_row=0, first_column=part.start)
        BACKENDS[backend].absorb_pairs_(sums, tile, final.stats.lse_s, final.stats.lse_t, spec)
    return (add_pairs(final, sums, spec) if spec.second_read else final).stats.tensors()


@pytest.mark.parametrize(("backend", "dtype"), cells("fp64", "fp32"))
@given(situations(), cuts, st.randoms(use_true_random=False))
def test_tile_splits_change_nothing(
    backend: str,
    dtype: str,
    situation: tuple[Tensor, Tensor, Tensor, RowSpec],
    edges: list[int],
    order: object,
) -> None:
    z, v, labels, spec = situation
    z, v = z.to(DTYPES[dtype]), v.to(DTYPES[dtype])
    spec = RowSpec(**{**vars(spec), "extras": spec.extras + PAIRS})
    parts = ranges(edges)
    order.shuffle(parts)  # type: ignore[attr-defined]
    whole = statistics(z, v, labels, spec, [slice(0, COLUMNS)], backend)
    for a, b in zip(statistics(z, v, labels, spec, parts, backend), whole, strict=True):
        tolerance = 1e-10 if dtype == "fp64" else 1e-4
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def moments(s: Tensor, t: Tensor, temperature: float, tilt: Tilt) -> tuple[Tensor, Tensor, Tensor]:
    """``log Σ e^(a·u + b·v)`` and the first two moments of ``u - v``, densely."""
    u, v = s[..., : t.shape[-1]] / temperature, t[..., : s.shape[-1]] / temperature
    w = tilt.a * u + tilt.b * v
    p, x = w.softmax(-1), u - v
    return w.logsumexp(-1), (p * x).sum(-1), (p * x * x).sum(-1)


def dense_stats(
    problem: Problem, leaves: dict[str, Tensor], temperature: float
) -> dict[str, Tensor]:
    """Each differentiable statistic and extra by a name."""
    s, t = problem.logits(leaves)
    of = oracle.row_stats(s, t, problem.target, temperature=temperature, mixture=0.3)
    dense = {name: of[name] for name in DIFFERENTIABLE}
    for tilt in (*TILTS, *SIGNED_TILTS):
        values = moments(s, t, temperature, tilt)
        dense |= {f"{tilt} {i}": x for i, x in enumerate(values[: 3 if tilt.moments else 1])}
    dense |= {f"{Mixture(0.3)} {i}": of[n] for i, n in enumerate(("kl_t_mix", "kl_s_mix"))}
    return dense | {f"{TotalVariation()} 0": of["tv"]}


def streamed_stats(
    problem: Problem, leaves: dict[str, Tensor], temperature: float, backend: str
) -> dict[str, Tensor]:
    extras: tuple[Extra, ...] = (*TILTS, *SIGNED_TILTS, Mixture(0.3), TotalVariation())
    x, w, b = leaves.values()
    stats: RowStats = bg.linear_row_stats(
        x, w, problem.library_teacher(), problem.target, linear_bias=b,
        extras=extras, temperature=temperature, backend=backend,
    )  # fmt: skip
    named = {name: getattr(stats, name) for name in DIFFERENTIABLE}
    return named | {f"{e} {i}": x for e in extras for i, x in enumerate(stats.extras[e])}


@pytest.mark.parametrize(("backend", "dtype"), cells("fp64", "fp32"))
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("vocab", [(200, 200), (200, 170), (170, 200)])
def test_each_statistic_has_the_derivative_of_its_dense_form(
    vocab: tuple[int, int], temperature: float, backend: str, dtype: str, tiling: Tiling
) -> None:
    tiling(chunk=20, width=64, kept=2)
    problem, wide = make(leading=(48,), vocab=vocab).to(DTYPES[dtype]), DTYPES[dtype]
    valid, eps = problem.target != -100, torch.finfo(wide).eps
    upstream = normal(48, seed=77) * valid
    exact = problem.to(torch.float64)
    leaves = [p.leaves() for p in (problem, exact, problem)]
    ours = streamed_stats(problem, leaves[0], temperature, backend)
    ref, yard = (
        dense_stats(p, x, temperature) for p, x in zip((exact, problem), leaves[1:], strict=True)
    )
    with Failures() as failures:
        for name in ref:
            sides = [
                (own[name] * valid, torch.autograd.grad(
                    own[name], list(x.values()), upstream.to(own[name]), retain_graph=True,
                    materialize_grads=True,
                ))
                for own, x in zip((ours, ref, yard), leaves, strict=True)
            ]  # fmt: skip
            (a, grads_a), (b, grads_b), (c, grads_c) = sides
            with failures.cell(name, "value"):
                assert_close(a, b, c, eps)
            for leaf, x, y, z in zip(problem.student, grads_a, grads_b, grads_c, strict=True):
                with failures.cell(name, leaf):
                    assert_close(x, y, z, eps)


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
    # Pass 2 reads a log-sum-exp of hundreds as one number of the logits' dtype.
    exact, eps = problem.to(torch.float64), 8 * torch.finfo(DTYPES[dtype]).eps
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
    z, t = (normal(5, 12, seed=seed).float() for seed in (1, 2))
    target = torch.tensor([0, 3, 7, -100, 2])
    (z if side == "student" else t)[[1, 3], 3 if at_label else 6] = bad
    z[3] = bad  # an ignored row
    for divergence in bg.divergences.registry:
        for routing in bg.routing.registry:
            policy = bg.routing.registry.get(routing)
            if side == "teacher" and not policy.uses_teacher:
                continue
            options = {"divergence": divergence, "routing": policy, "backend": backend}
            loss = bg.hybrid_distillation(
                z, bg.LogitsTeacher(t), target, reduction="none", **options
            )
            sees_the_next = routing == "risk_guided" and side == "student"
            expected = [sees_the_next, True, False, False, False]
            assert loss.isnan().tolist() == expected, (divergence, routing, loss)
            leaf = z.clone().requires_grad_()
            mean = bg.hybrid_distillation(leaf, bg.LogitsTeacher(t), target, **options)
            assert mean.isnan() and not torch.autograd.grad(mean, leaf)[0][3].any()
