"""What each option means: against the oracle, and by identities that must hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import bgkernels as bg
from bgkernels.rows.stats import RowStats
from tests import oracle
from tests.conftest import Tiling
from tests.problems import (
    DTYPES,
    IGNORED,
    Failures,
    Loss,
    Params,
    Problem,
    cells,
    conform,
    labels,
    make,
    normal,
    runs,
)

LEADING = (3, 16)
HIDDEN = ("input", "hidden", "logits")
TOKENS = normal(*LEADING, seed=50).abs()  # bf16 numbers
SIGNED = normal(*LEADING, seed=51) * (normal(*LEADING, seed=52) > -1)

OPTIONS: dict[str, Params] = {
    "temperature": {"temperature": 2.0},
    "label smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 0.02},
    "token weights": {"token_weight": TOKENS},
    "signed token weights": {"token_weight": SIGNED, "reduction": "none"},
    "num_items": {"num_items": 64},
    "num_items as a tensor": {"num_items": torch.tensor(64)},
    "sum": {"reduction": "sum"},
    "vocab_size": {"vocab_size": 257},
    "all": {
        "temperature": 2.0, "label_smoothing": 0.1, "z_loss": 0.02, "token_weight": TOKENS,
        "num_items": 64, "vocab_size": 257,
    },
}  # fmt: skip
PAIRS = [("jeffreys", "entropy"), ("generalized_jsd", "risk_guided"), ("renyi", "weighted_soft")]
PLAIN = [pair for pair in PAIRS if pair[1] != "risk_guided"]
"""Pairs whose hard term is the cross-entropy, which alone can be smoothed."""
CAPS: dict[str, Params] = {
    "scale": {"logit_scale": 0.5},
    "softcap": {"logit_softcap": 4.0},
    "both": {"logit_scale": 2.0, "logit_softcap": 4.0},
}
ON = pytest.mark.parametrize(("backend", "dtype"), cells("fp64", "fp32", "bf16"))


@ON
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, backend: str, dtype: str, tiling: Tiling) -> None:
    tiling(chunk=25, width=192)
    target = labels(LEADING, 257)
    with Failures() as failures:
        for kind in ("linear", "logits"):
            for divergence, routing in PLAIN if "label_smoothing" in OPTIONS[name] else PAIRS:
                loss = Loss(divergence, routing, options=OPTIONS[name])
                with failures.cell(kind, divergence, routing):
                    problem = make(kind, target=target)
                    conform(problem, loss, DTYPES[dtype], runs(backend, loss))


@ON
@pytest.mark.parametrize("cap", CAPS)
def test_scale_and_softcap(cap: str, backend: str, dtype: str, tiling: Tiling) -> None:
    tiling(chunk=25, width=192)
    with Failures() as failures:
        for kind in ("linear", "logits", "mixed"):
            teacher = CAPS[cap] if kind == "linear" else {}
            problem = make(kind, student_cap=CAPS[cap], teacher_cap=teacher)
            for divergence, routing in PAIRS:
                with failures.cell(kind, divergence, routing):
                    loss = Loss(divergence, routing)
                    conform(problem, loss, DTYPES[dtype], runs(backend, loss))


@ON
@pytest.mark.parametrize("vocab", [(300, 333), (333, 300)])
def test_vocabularies_of_two_lengths(
    vocab: tuple[int, int], backend: str, dtype: str, tiling: Tiling
) -> None:
    tiling(chunk=25, width=192)
    target = labels(LEADING, vocab[0])  # some labels are columns that the teacher lacks
    with Failures() as failures:
        for kind in ("linear", "logits"):
            for divergence, routing in [*PLAIN, ("reverse_kl", "confidence")]:
                loss = Loss(divergence, routing, options={"label_smoothing": 0.1})
                with failures.cell(kind, divergence, routing):
                    problem = make(kind, vocab=vocab, target=target)
                    conform(problem, loss, DTYPES[dtype], runs(backend, loss))


@ON
def test_reduction_none_takes_any_upstream_gradient(
    backend: str, dtype: str, tiling: Tiling
) -> None:
    tiling(chunk=25, width=192)
    with Failures() as failures:
        for kind in ("linear", "logits"):
            for divergence, routing in PAIRS:
                loss = Loss(divergence, routing, options={"reduction": "none", "temperature": 2.0})
                with failures.cell(kind, divergence, routing):
                    conform(make(kind), loss, DTYPES[dtype], runs(backend, loss), SIGNED)


@pytest.mark.parametrize("leading", [(), (1,), (24,), (2, 3, 4), (24, 1)])
@pytest.mark.parametrize("kind", ["linear", "logits"])
def test_leading_shapes(kind: str, leading: tuple[int, ...], backend: str) -> None:
    problem = make(kind, leading=leading, vocab=(60, 60)).to(torch.float32)
    rows = problem.target.numel()
    student, teacher = (
        {
            k: x.reshape(rows, -1) if x.shape[:-1] == leading and k in HIDDEN else x
            for k, x in side.items()
        }
        for side in (problem.student, problem.teacher)
    )
    flat = Problem(student, teacher, problem.target.reshape(rows))
    for divergence, routing in PLAIN:
        for reduction in ("mean", "none"):
            loss = Loss(divergence, routing, options={"reduction": reduction})
            ours, expected = problem.ours(loss, backend=backend), flat.ours(loss, backend=backend)
            assert ours[0].shape == (leading if reduction == "none" else ())
            for x, y in zip(ours, expected, strict=True):
                assert torch.equal(x.reshape(y.shape), y)


@ON
def test_teacher_argmax(backend: str, dtype: str, tiling: Tiling) -> None:
    tiling(chunk=25, width=192)
    with Failures() as failures:
        for kind in ("logits", "mixed"):
            problem = make(kind, target="teacher_argmax")
            for divergence, routing in [*PAIRS, ("forward_kl", "hard")]:
                with failures.cell(kind, divergence, routing):
                    loss = Loss(divergence, routing)
                    conform(problem, loss, DTYPES[dtype], runs(backend, loss))


def test_teacher_sample_draws_the_same_tokens_everywhere(backend: str, tiling: Tiling) -> None:
    problem = make("mixed", leading=(2, 9), vocab=(120, 120), target="teacher_sample")
    problem = problem.to(torch.float32)
    seed = (7 << 40) + 5
    expected = oracle.gumbel_label(problem.teacher["logits"], seed)
    assert len(expected.unique()) > 4
    given = Problem(problem.student, problem.teacher, expected)
    for chunk, width in [(18, 120), (18, 64), (5, 48), (1, 50)]:
        tiling(chunk, width, kept=2)
        for mode in ("fused", "recompute"):
            options = {"backend": backend, "mode": mode}
            _, stats = problem.call(problem.leaves(), seed=seed, return_stats=True, **options)
            assert torch.equal(stats.label, expected), (chunk, width, mode)
            ours = problem.ours(Loss(), seed=seed, **options)
            for x, y in zip(ours, given.ours(Loss(), **options), strict=True):
                torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    other = problem.call(problem.leaves(), seed=6, return_stats=True, backend=backend)[1].label
    assert not torch.equal(other, expected)


def test_teacher_sample_follows_the_teacher_and_the_generator_of_torch() -> None:
    p = torch.tensor([0.6, 0.0, 0.3, 0.1])
    teacher = bg.LogitsTeacher(p.log().expand(4000, 4))

    def draw() -> Tensor:
        z = torch.zeros(4000, 4)
        return bg.hybrid_distillation(z, teacher, "teacher_sample", return_stats=True)[1].label

    first, second = draw(), draw()
    share = first.bincount(minlength=4) / 4000
    assert share[1] == 0 and (share - p).abs().max() < 0.03
    assert not torch.equal(first, second)
    torch.manual_seed(0)  # as before the first draw
    assert torch.equal(draw(), first)


def padded(small: dict[str, Tensor], big: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's tensors with the columns from 300 on of another."""
    out = dict(small)
    for name in small.keys() & {"linear_weight", "linear_bias", "weight", "bias"}:
        out[name] = torch.cat([small[name], big[name][300:]])
    if "logits" in small:
        out["logits"] = torch.cat([small["logits"], big["logits"][..., 300:]], -1)
    return out


def by_column(name: str, x: Tensor) -> Tensor:
    return x.movedim(-1, 0) if name == "logits" else x


@pytest.mark.parametrize("kind", ["linear", "logits"])
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_padding_changes_nothing(kind: str, side: str, backend: str) -> None:
    plain, wide = (make(kind, leading=(2, 9), vocab=(v, v)).to(torch.float32) for v in (300, 311))
    problem = Problem(
        padded(plain.student, wide.student) if side != "teacher" else plain.student,
        padded(plain.teacher, wide.teacher) if side != "student" else plain.teacher,
        plain.target,
    )
    cut = {} if side == "teacher" else {"vocab_size": 300}
    for divergence, routing in PAIRS:
        loss = Loss(divergence, routing, options={"z_loss": 0.1})
        expected = plain.ours(loss, backend=backend)
        ours = problem.ours(loss, backend=backend, **cut)
        assert torch.equal(ours[0], expected[0])
        for name, x, y in zip(plain.student, ours[1:], expected[1:], strict=True):
            x, y = by_column(name, x), by_column(name, y)
            assert torch.equal(x[: len(y)], y) and not x[len(y) :].any(), name
    _, stats = problem.call(problem.student, return_stats=True, backend=backend, **cut)
    _, expected_stats = plain.call(plain.student, return_stats=True, backend=backend)
    assert stats.vocab == expected_stats.vocab == 300
    for x, y in zip(stats.tensors(), expected_stats.tensors(), strict=True):
        assert torch.equal(x, y)


def test_the_students_own_padding_enters_the_cross_entropy_alone(backend: str) -> None:
    small = make("logits", leading=(2, 9)).to(torch.float32)
    padding = normal(2, 9, 11, seed=60).float()
    wide = Problem(
        {"logits": torch.cat([small.student["logits"], padding], -1)}, small.teacher, small.target
    )
    soft, hard = Loss("jeffreys", "soft"), Loss(routing="hard")
    ours, expected = wide.ours(soft, backend=backend), small.ours(soft, backend=backend)
    torch.testing.assert_close(ours[0], expected[0])
    torch.testing.assert_close(ours[1][..., :300], expected[1])
    assert not ours[1][..., 300:].any()
    z = wide.student["logits"].reshape(18, -1)
    by_torch = torch.nn.functional.cross_entropy(z, small.target.reshape(-1))
    torch.testing.assert_close(wide.ours(hard, backend=backend)[0], by_torch)


def test_micro_batches_with_num_items_are_one_batch(backend: str) -> None:
    whole = make(leading=(30,)).to(torch.float32)
    count = int((whole.target != IGNORED).sum())
    for routing in ("entropy", "weighted_soft", "static"):
        loss = Loss("generalized_jsd", routing)
        expected = whole.ours(loss, backend=backend)
        total = [torch.zeros_like(x) for x in expected]
        for part in (slice(0, 4), slice(4, 5), slice(5, 22), slice(22, 30)):
            student = {**whole.student, "input": whole.student["input"][part]}
            teacher = {**whole.teacher, "hidden": whole.teacher["hidden"][part]}
            micro = Problem(student, teacher, whole.target[part])
            value, dx, *rest = micro.ours(loss, backend=backend, num_items=count)
            total[0] += value
            total[1][part] = dx
            for sum_, x in zip(total[2:], rest, strict=True):
                sum_ += x
        torch.testing.assert_close(total, expected, rtol=2e-5, atol=2e-7)


@pytest.mark.parametrize("at", [(1, 0), (0, 1), (0.5, 0), (0, 0.5), (0.5, -0.5), (0, 0)])
def test_alpha_beta_is_continuous_at_its_limits(at: tuple[float, float]) -> None:
    problem = make("mixed", leading=(2, 9))
    alpha, beta = at
    limit = problem.ours(Loss("alpha_beta", "soft", {"alpha": alpha, "beta": beta}))
    for da, db in [(1e-5, 3e-5), (-3e-5, 1e-5)]:
        near = Loss("alpha_beta", "soft", {"alpha": alpha + da, "beta": beta + db})
        for x, y in zip(problem.ours(near), limit, strict=True):
            assert (x - y).abs().max() < 3e-3 * y.abs().max()


def test_modules_are_the_functions(backend: str) -> None:
    config = {"divergence": "renyi", "routing": "confidence", "temperature": 2.0, "z_loss": 0.1,
              "backend": backend}  # fmt: skip
    for kind, module in (
        ("linear", bg.LinearHybridDistillationLoss), ("logits", bg.HybridDistillationLoss)
    ):  # fmt: skip
        problem = make(kind).to(torch.float32)
        expected, _ = problem.call(problem.student, **config, return_stats=True)
        made = module(**config, return_stats=True)
        per_call = {"token_weight": torch.ones(LEADING), "num_items": 38, "seed": 3}
        args = list(problem.student.values())
        bias = {"linear_bias": args.pop()} if kind == "linear" else {}
        x, *head = args
        value, stats = made(x, *head, problem.library_teacher(), problem.target, **bias)
        assert torch.equal(value, expected) and isinstance(stats, RowStats)
        value, _ = made(x, *head, problem.library_teacher(), problem.target, **bias, **per_call)
        torch.testing.assert_close(value, expected * 39 / 38)
        assert "renyi" in repr(made) and not list(made.parameters())


@pytest.mark.parametrize("vocab", [(60, 60), (60, 50), (50, 60)])
@pytest.mark.parametrize("mode", ["fused", "recompute"])
def test_return_stats_gives_every_statistic(
    vocab: tuple[int, int], mode: str, backend: str
) -> None:
    problem = make(leading=(2, 9), vocab=vocab).to(torch.float32)
    leaves = problem.leaves()
    _, stats = problem.call(leaves, return_stats=True, temperature=2.0, mode=mode, backend=backend)
    exact = problem.to(torch.float64)
    logits = exact.logits(exact.student)
    expected = oracle.row_stats(*logits, problem.target, temperature=2.0, single=1.0)
    valid = problem.target != IGNORED
    with Failures() as failures:
        for name, y in expected.items():
            x = getattr(stats, name, None)
            if x is None or name in ("vocab", "tilt"):
                continue
            with failures.cell(name):
                assert x.shape == (2, 9) and not x.requires_grad
                assert x.dtype == (torch.float32 if y.is_floating_point() else y.dtype)
                torch.testing.assert_close(x[valid].to(y), y[valid], rtol=1e-5, atol=1e-5)
                if y.is_floating_point():
                    assert not x[~valid].any()
    assert stats.vocab == min(vocab) and stats.positions == 9
    assert (stats.label[~valid] == IGNORED).all()


def test_any_callable_routes(backend: str) -> None:
    def by_agreement(stats: RowStats) -> tuple[Tensor, Tensor]:
        agree = (stats.argmax_s == stats.argmax_t).to(stats.nll)
        return 1 - 0.5 * agree, stats.max_prob_t

    def dense(row: oracle.Row) -> tuple[Tensor, Tensor]:
        agree = (row.lp_s.argmax(-1) == row.lp_t.argmax(-1)).to(row.lp_s)
        return 1 - 0.5 * agree, row.lp_t.exp().amax(-1)

    problem = make("logits").to(torch.float32)
    ours = problem.call(problem.student, routing=by_agreement, backend=backend)
    expected = oracle.hybrid_loss(*problem.logits(problem.student), problem.target, routing=dense)
    torch.testing.assert_close(ours, expected)


def test_users_register_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for registry in (bg.divergences.registry, bg.routing.registry):
        monkeypatch.setattr(registry, "_factories", dict(registry._factories))

    @bg.divergences.register
    def half_kl(share: float = 0.5) -> bg.divergences.Divergence:
        return bg.divergences.Divergence("half_kl", lambda s: share * s.kl_ts)

    @bg.routing.register
    def by_student() -> bg.routing.Policy:
        return bg.routing.Policy("by_student", lambda s: (0.0, s.entropy_s))

    problem = make("logits", leading=(2, 9))
    leaves = problem.leaves()
    ours = problem.call(leaves, divergence="half_kl", routing="by_student")
    z = problem.leaves()["logits"]
    stats = oracle.row_stats(z, problem.teacher["logits"], problem.target)
    terms = 0.5 * stats["kl_ts"] * stats["entropy_s"] * stats["valid"]
    loss = terms.sum() / stats["valid"].sum()
    torch.testing.assert_close(ours, loss)
    gradients = [torch.autograd.grad(x, y)[0] for x, y in ((ours, leaves["logits"]), (loss, z))]
    torch.testing.assert_close(*gradients)


def test_a_curriculum_follows_its_step() -> None:
    problem = make("logits", leading=(2, 9))
    policy = bg.routing.curriculum(schedule=lambda step: step / 10, policy="entropy")
    for step in (0, 3, 10):
        policy.step = step
        expected = problem.dense(
            Loss(routing="curriculum", of_routing={"c": step / 10, "policy": "entropy"})
        )
        torch.testing.assert_close(problem.call(problem.student, routing=policy), expected[0])


def test_policies_that_wrap_another_are_made_by_name() -> None:
    assert bg.routing.get("reverse", policy="confidence").name == "reverse(confidence)"
    assert bg.routing.get("curriculum", policy="soft").name == "curriculum(soft)"


@ON
def test_risk_guided_with_ragged_sequences(backend: str, dtype: str, tiling: Tiling) -> None:
    tiling(chunk=25, width=192)
    target = labels((4, 16), 300)
    target[0, :9] = target[1, 5:] = target[2] = IGNORED
    target[3, ::2] = IGNORED
    problem = make("mixed", leading=(4, 16), target=target)
    with Failures() as failures:
        for params in ({}, {"w": 0}, {"alpha": 0.3, "gamma": 0.9}, {"gamma": 1.0}):
            for options in ({}, {"reduction": "none"}, {"num_items": 64}):
                loss = Loss("forward_kl", "risk_guided", {}, params, options)
                with failures.cell(params, options):
                    conform(problem, loss, DTYPES[dtype], runs(backend, loss))


def test_the_risk_guided_term_is_not_smoothed() -> None:
    loss = Loss(routing="risk_guided", options={"label_smoothing": 0.1})
    conform(make("logits"), loss, torch.float64, [{"backend": "eager"}])
