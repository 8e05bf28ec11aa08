"""Routing looks at temperature 1, whatever the temperature of the divergence.

Each policy at T = 2.5 against a dense loss with untempered weights: for every kind of teacher, for
what a user's function reads, and through the student's own statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import bgkernels as bg
from bgkernels.rows.stats import TENSOR_FIELDS, RowStats
from tests import oracle
from tests.conftest import Tiling
from tests.problems import (
    DTYPES,
    IGNORED,
    OF_ROUTING,
    Failures,
    Loss,
    Params,
    cells,
    conform,
    labels,
    make,
    normal,
    runs,
)
from tests.yardstick import assert_each_close

POLICIES = list(bg.routing.registry)
WARM = 2.5
ROWS, HIDDEN, VOCAB, KEPT = 40, 12, 90, 11
ON = pytest.mark.parametrize(("backend", "dtype"), cells("fp64", "fp32"))
Pair = tuple[Tensor, Tensor]
"""Log-probabilities of student and teacher at the temperature of the divergence."""
Dense = Callable[[oracle.Row, Pair], oracle.Weights]


@pytest.mark.parametrize(("backend", "dtype"), cells("fp64", "fp32", "bf16"))
@pytest.mark.parametrize("routing", POLICIES)
def test_each_policy_and_parameter(routing: str, backend: str, dtype: str, tiling: Tiling) -> None:
    tiling(chunk=20, width=192)
    with Failures() as failures:
        for i, params in enumerate([{}, *OF_ROUTING.get(routing, [])]):
            kind, options = ("linear", "logits")[i % 2], {"temperature": WARM}
            loss = Loss("jeffreys", routing, {}, params, options)
            with failures.cell(kind, params):
                conform(make(kind), loss, DTYPES[dtype], runs(backend, loss))


def by_entropy(teachers: list[RowStats]) -> Tensor:
    """Weights that favour whoever is surer."""
    return torch.softmax(-torch.stack([s.entropy_t for s in teachers], 1), 1)


def top(t: Tensor, tail: str) -> bg.TopKTeacher:
    best = t.log_softmax(1).topk(KEPT)
    return bg.TopKTeacher(best.indices, best.values, tail=tail)


TEACHERS: dict[str, Callable[[list[Tensor]], Any]] = {
    "dense": lambda t: bg.LogitsTeacher(t[0]),
    "renormalize": lambda t: top(t[0], "renormalize"),
    "drop": lambda t: top(t[0], "drop"),
    "sum": lambda t: bg.MixtureTeacher([bg.LogitsTeacher(t[0]), top(t[1], "drop")], by_entropy),
    "distribution": lambda t: bg.MixtureTeacher(
        [bg.LogitsTeacher(x) for x in t], by_entropy, kind="distribution"
    ),
}


def entropy(lp: Tensor) -> Tensor:
    return -(lp.exp() * lp.masked_fill(lp == -oracle.INF, 0.0)).sum(1)


@dataclass
class Case:
    """A linear student, the logits of two teachers, and labels of which some are ignored."""

    x: Tensor
    w: Tensor
    t: list[Tensor]
    target: Tensor
    temperature: float = WARM

    @staticmethod
    def make(dtype: torch.dtype) -> Case:
        x, w = normal(ROWS, HIDDEN, seed=1), normal(VOCAB, HIDDEN, seed=2, std=0.5)
        t = [normal(ROWS, VOCAB, seed=seed, std=2.0) for seed in (3, 4)]
        return Case(x, w, t, labels((ROWS,), VOCAB)).to(dtype)

    def to(self, dtype: torch.dtype) -> Case:
        t = [x.to(dtype) for x in self.t]
        return Case(self.x.to(dtype), self.w.to(dtype), t, self.target, self.temperature)

    def leaves(self) -> list[Tensor]:
        return [x.detach().clone().requires_grad_() for x in (self.x, self.w)]

    def dense_parts(self, teacher: str, z: Tensor) -> tuple[list[tuple[oracle.Row, Pair]], Tensor]:
        """What policies and divergences see of each term of the loss, and the terms' weights."""
        kept = [torch.zeros_like(t).scatter(1, t.topk(KEPT).indices, 1.0) > 0 for t in self.t]
        cut = [t.masked_fill(~mask, -oracle.INF) for t, mask in zip(self.t, kept, strict=True)]
        one = torch.ones_like(z[:, :1])
        if teacher == "dense":
            return [self.part(z, z, self.t[0])], one
        if teacher == "renormalize":
            return [self.part(z, z, cut[0])], one
        if teacher == "drop":
            return [self.part(z, z.masked_fill(~kept[0], -oracle.INF), cut[0])], one
        sides = self.t if teacher == "distribution" else [self.t[0], cut[1]]
        scores = [-entropy(t.log_softmax(1)) for t in sides]
        lam = torch.softmax(torch.stack(scores, 1), 1)
        if teacher == "sum":
            dropped = self.part(z, z.masked_fill(~kept[1], -oracle.INF), cut[1])
            return [self.part(z, z, self.t[0]), dropped], lam
        p = [(t / self.temperature).softmax(1) for t in self.t]
        mixed = sum(lam[:, i, None] * x for i, x in enumerate(p))
        return [self.part(z, z, self.temperature * mixed.log())], one

    def part(self, z: Tensor, compared: Tensor, t: Tensor) -> tuple[oracle.Row, Pair]:
        """Of logits, which are -inf outside of the columns that a side has."""
        valid = self.target != IGNORED
        label = self.target.masked_fill(~valid, 0)
        lp_s, lp_t = compared.log_softmax(1), t.log_softmax(1)
        at = (oracle._at(lp, label) for lp in (lp_s, lp_t))
        row = oracle.Row((ROWS,), z, lp_s, lp_t, label, valid, *at)
        pair = tuple((x / self.temperature).log_softmax(1) for x in (compared, t))
        return row, pair  # type: ignore[return-value]

    def dense(self, teacher: str, weights: Dense) -> list[Tensor]:
        """Loss and gradients, from the definition."""
        x, w = self.leaves()
        z = x @ w.t()
        parts, lam = self.dense_parts(teacher, z)
        votes = [weights(*part) for part in parts]
        share = lam / lam.sum(1, keepdim=True)
        hard = sum(share[:, i] * vote[0] for i, vote in enumerate(votes))
        row = parts[0][0]
        ce = votes[0][2] if len(votes[0]) > 2 else oracle.cross_entropy(z, row.label)
        loss = oracle._product(hard, ce)
        for i, (vote, (_, pair)) in enumerate(zip(votes, parts, strict=True)):
            term = self.temperature**2 * oracle.forward_kl(*pair)
            loss = loss + oracle._product(lam[:, i] * vote[1], term)
        total = loss.masked_fill(~row.valid, 0.0).sum() / row.valid.sum()
        return [total.detach(), *torch.autograd.grad(total, (x, w))]

    def ours(self, teacher: str, policy: Any, **options: Any) -> list[Tensor]:
        """The library's."""
        x, w = self.leaves()
        loss = self.call(teacher, x, w, routing=policy, **options)
        return [loss.detach(), *torch.autograd.grad(loss, (x, w))]

    def call(self, teacher: str, x: Tensor, w: Tensor, **options: Any) -> Any:
        return bg.linear_hybrid_distillation(
            x, w, TEACHERS[teacher](self.t), self.target, temperature=self.temperature, **options
        )


def agreement(stats: RowStats) -> tuple[Tensor, Tensor]:
    """What a user may pass as it is: it has a gradient, and looks at both temperatures."""
    return torch.sigmoid(stats.entropy_s - stats.entropy_t), 0.1 * stats.kl_ts + stats.max_prob_t


def dense_agreement(row: oracle.Row, pair: Pair) -> oracle.Weights:
    gate = torch.sigmoid(entropy(row.lp_s) - entropy(row.lp_t))
    return gate, 0.1 * oracle.forward_kl(*pair) + row.lp_t.exp().amax(1)


CALLABLES: dict[str, tuple[Any, Dense]] = {
    "a function": (agreement, dense_agreement),
    "the student's label": (
        bg.routing.Policy("own", lambda s: (1 - s.logp_s.exp(), s.logp_s.exp() + s.entropy_s)),
        lambda row, _: (1 - row.logp_s.exp(), row.logp_s.exp() + entropy(row.lp_s)),
    ),
    "tilts": (
        bg.routing.Policy(
            "tilts",
            lambda s: (s.power_sum(0.0, 0.4).exp() / 20, s.power_sum(0.3, 0.5).exp()),
            (bg.Tilt(0.0, 0.4), bg.Tilt(0.3, 0.5)),
        ),
        lambda row, _: (
            (0.4 * row.lp_t).exp().sum(1) / 20,
            oracle._tilt(row.lp_s, row.lp_t, 0.3, 0.5).exp(),
        ),
    ),
    "another temperature": (
        bg.routing.Policy(
            "tempered", lambda s: (1.0, s.tempered(3.0)["entropy_s"]), (bg.Tempered(3.0),)
        ),
        lambda row, _: (row.full(1.0), entropy(oracle.tempered(row.lp_s, 3.0))),
    ),
}


def of_registry(name: str) -> tuple[Any, Dense]:
    loss = Loss(
        routing=name, of_routing={"c": 0.3, "policy": "entropy"} if name == "curriculum" else {}
    )
    params: Params = loss.oracle()["routing_params"]
    return loss.library()["routing"], lambda row, _: oracle.POLICIES[name](row, **params)


@ON
@pytest.mark.parametrize("teacher", TEACHERS)
def test_every_kind_of_teacher(teacher: str, backend: str, dtype: str, tiling: Tiling) -> None:
    tiling(chunk=17, width=50)
    case, eps = Case.make(DTYPES[dtype]), torch.finfo(DTYPES[dtype]).eps
    entries = {name: of_registry(name) for name in POLICIES} | CALLABLES
    with Failures() as failures:
        for i, (name, (policy, weights)) in enumerate(entries.items()):
            ref, yard = case.to(torch.float64).dense(teacher, weights), case.dense(teacher, weights)
            plain = not isinstance(policy, bg.routing.Policy)
            fused = (i + (dtype == "fp64")) % 2 and not plain and not policy.batchwide
            mode = "fused" if fused else "recompute"
            with failures.cell(name, mode):
                got = case.ours(teacher, policy, backend=backend, mode=mode)
                assert_each_close(("loss", "input", "weight"), got, ref, yard, eps, mode)


@ON
@pytest.mark.parametrize("teacher", TEACHERS)
def test_returned_statistics_are_at_their_temperatures(
    teacher: str, backend: str, dtype: str, tiling: Tiling
) -> None:
    tiling(chunk=17, width=50)
    case = Case.make(DTYPES[dtype])
    x, w = (leaf.detach() for leaf in case.leaves())
    exact = case.to(torch.float64)
    parts, lam = exact.dense_parts(teacher, exact.x @ exact.w.t())
    valid = case.target != IGNORED
    for routing in ("entropy", "static", "weighted_soft"):  # static reads no statistic
        _, stats = case.call(teacher, x, w, routing=routing, return_stats=True, backend=backend)
        for name, of in {
            "entropy_s": lambda row, _: entropy(row.lp_s),
            "entropy_t": lambda row, _: entropy(row.lp_t),
            "logp_s": lambda row, _: row.logp_s,
            "logp_t": lambda row, _: row.logp_t,
            "max_prob_s": lambda row, _: row.lp_s.exp().amax(1),
            "max_prob_t": lambda row, _: row.lp_t.exp().amax(1),
            "kl_ts": lambda _, pair: oracle.forward_kl(*pair),
            "nll": lambda row, _: oracle.cross_entropy(row.z, row.label),
        }.items():
            mean = sum(lam[:, i] * of(*part) for i, part in enumerate(parts))
            got = getattr(stats, name)
            assert got.dtype == DTYPES[dtype] and not got[~valid].any()
            torch.testing.assert_close(
                got.double()[valid], mean[valid], rtol=1e-5, atol=1e-5,
                msg=lambda m, n=name, r=routing: f"{r} {n}: {m}",
            )  # fmt: skip


@ON
def test_what_functions_see(backend: str, dtype: str, tiling: Tiling) -> None:
    """Policies and weights of a mixture see temperature 1, divergences see T."""
    tiling(chunk=17, width=50)
    case, seen = Case.make(DTYPES[dtype]), {}
    extras = (bg.Tilt(0.3, 0.5), bg.Tilt(0.1, 0.0, moments=True), bg.Mixture(0.3),
              bg.TotalVariation(), bg.Tempered(3.0))  # fmt: skip

    def policy(stats: RowStats) -> tuple[float, float]:
        seen["policy"] = stats
        return 0.5, 0.5

    def divergence(stats: RowStats) -> Tensor:
        seen["divergence"] = stats
        return stats.kl_ts

    def mixture(teachers: list[RowStats]) -> Tensor:
        seen["first teacher"], seen["second teacher"] = teachers
        return torch.full((len(teachers[0].valid), 2), 0.5)

    x, w = case.leaves()
    options: dict[str, Any] = {
        "routing": bg.routing.Policy("spy", policy, extras, batchwide=True),
        "divergence": bg.divergences.Divergence("spy", divergence, extras),
        "temperature": WARM,
        "label_smoothing": 0.1,  # else nobody asks for the mean logit
        "backend": backend,
    }
    bg.linear_hybrid_distillation(x, w, bg.LogitsTeacher(case.t[0]), case.target, **options)
    both = bg.MixtureTeacher([bg.LogitsTeacher(t) for t in case.t], mixture)
    options |= {"routing": "static", "divergence": "forward_kl", "mode": "recompute"}
    bg.linear_hybrid_distillation(x, w, both, case.target, **options)
    exact = case.to(torch.float64)
    valid, z = case.target != IGNORED, exact.x @ exact.w.t()
    looks = {"policy": (0, 1.0), "divergence": (0, WARM), "first teacher": (0, 1.0),
             "second teacher": (1, 1.0)}  # fmt: skip
    with Failures() as failures:
        for who, (i, single) in looks.items():
            expected = oracle.row_stats(
                z, exact.t[i], case.target, temperature=WARM, single=single, mixture=0.3,
                tilt=(0.3, 0.5),
            )  # fmt: skip
            stats = seen[who]
            got = {n: getattr(stats, n) for n in TENSOR_FIELDS}
            if who in ("policy", "divergence"):
                moments = dense_moments(z / single, exact.t[0] / single, 0.1)
                expected |= dict(zip(("mean", "second"), moments, strict=True))
                got |= {"tilt": stats.power_sum(0.3, 0.5), "tv": stats.total_variation()}
                got |= dict(zip(("kl_t_mix", "kl_s_mix"), stats.mixture(0.3), strict=True))
                got |= dict(zip(("mean", "second"), stats.tilt(0.1, 0.0, True)[1:], strict=True))
                got |= {"at 3": stats.tempered(3.0)["entropy_t"]}
                third = oracle.row_stats(z, exact.t[0], case.target, single=3.0)
                expected |= {"at 3": third["entropy_t"]}
            for name, value in got.items():
                with failures.cell(who, name):
                    y = expected[name][valid]
                    value = value.detach()[valid].to(y)
                    torch.testing.assert_close(value, y, rtol=1e-5, atol=1e-5)


def dense_moments(u: Tensor, v: Tensor, a: float) -> tuple[Tensor, Tensor]:
    """First and second moment of ``u - v`` under ``softmax(a·u)``."""
    p, gap = (a * u).softmax(1), u - v
    return (p * gap).sum(1), (p * gap * gap).sum(1)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_a_bridge_is_one_at_every_temperature(temperature: float, backend: str) -> None:
    """A teacher that gives its favourite 0.99 is trusted with the hard label."""
    t = normal(24, 5000, seed=1).float()
    t[:, 7] = -torch.inf
    t[:, 7] = t.logsumexp(1) + torch.tensor(0.99 / 0.01).log()
    said: dict[str, Tensor] = {}
    for name, policy in {
        "shannon": bg.routing.entropy(kind="shannon"), "label": bg.routing.confidence(),
    }.items():  # fmt: skip

        def spy(stats: RowStats, name: str = name, policy: Any = policy) -> Any:
            said[name] = (vote := policy(stats))[0]
            return vote

        bg.hybrid_distillation(
            normal(24, 5000, seed=2).float(), bg.LogitsTeacher(t), torch.full((24,), 7),
            routing=spy, temperature=temperature, backend=backend,
        )  # fmt: skip
    torch.testing.assert_close(said["label"], torch.full((24,), 0.99).double(), rtol=1e-5, atol=0)
    assert (said["shannon"] > 0.97).all()


def test_a_policy_at_another_temperature_is_another_loss() -> None:
    """What these tests would not notice if weights made no difference."""
    case = Case.make(torch.float64)
    warm = bg.routing.Policy(
        "warm",
        lambda s: (1 - s.tempered(WARM)["max_prob_t"], s.tempered(WARM)["max_prob_t"]),
        (bg.Tempered(WARM),),
    )
    cold = bg.routing.reverse(bg.routing.confidence("max"))
    ours, theirs = (case.ours("dense", policy)[0] for policy in (warm, cold))
    assert (ours - theirs).abs() > 0.05 * theirs
