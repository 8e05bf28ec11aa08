"""A top-k teacher with a vocabulary of its own, against dense torch in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import bgkernels as bg
from tests import oracle
from tests.conftest import Tiling
from tests.problems import DTYPES, Loss, agree, runs, widest, with_gradients
from tests.streaming.categories import TAIL_SETTINGS, mean_loss
from tests.streaming.matched import LEADING, TEACHER_ROWS, V_S, V_T, Unlike, unlike

K = 7


@dataclass
class Kept:
    """A problem with two vocabularies, and what is kept of the teacher."""

    problem: Unlike
    indices: Tensor
    logprobs: Tensor

    def teacher(self, tail: str, rest: str = "bucket", **more: Any) -> bg.MatchedTeacher:
        inner = bg.TopKTeacher(self.indices, self.logprobs, tail, vocab=V_T, **more)
        return bg.MatchedTeacher(inner, self.problem.pairs, rest, self.problem.positions)


def kept(kind: str, k: int = K) -> Kept:
    """Ragged rows; one keeps nothing that matches."""
    problem = unlike(kind)
    x = torch.randn(TEACHER_ROWS, V_T, dtype=torch.float64, generator=torch.Generator())
    best = (2 * x).log_softmax(-1).topk(k)
    indices = best.indices.clone()
    indices[::3, 5:] = -1
    assert problem.positions is not None
    alone = torch.ones(V_T, dtype=torch.bool).index_fill(0, problem.pairs[1], False).nonzero()
    indices[problem.positions[0, 0], : len(alone)] = alone[:k, 0]
    indices[problem.positions[0, 0], len(alone) :] = -1
    return Kept(problem, indices, best.values.float().double().masked_fill(indices < 0, torch.nan))


def dense_loss(
    z: Tensor, made: Kept, tail: str, *, divergence: str, routing: str, divergence_params: Any,
    routing_params: Any, temperature: float = 1.0, label_smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    """The loss as it is defined, from a loop over tokens."""
    problem, rows, hard_rows = made.problem, [], []
    assert problem.positions is not None
    to_student = dict(zip(problem.pairs[1].tolist(), problem.pairs[0].tolist(), strict=True))
    coarse: list[tuple[Tensor, Tensor]] = []
    target = problem.target.reshape(-1)
    for u, place, label in zip(
        z, problem.positions.reshape(-1).tolist(), target.tolist(), strict=True
    ):
        ids, logp = made.indices[max(place, 0)], made.logprobs[max(place, 0)].to(z)
        logp, ids = logp[ids >= 0], ids[ids >= 0]
        has = torch.tensor([int(i) in to_student for i in ids])
        present = place >= 0 and bool(has.any())
        columns = torch.tensor([to_student[int(i)] for i in ids[has]], dtype=torch.int64)
        coarse.append(_categories(u, logp[has], columns, tail, temperature))
        at_one = _categories(u, logp[has], columns, tail, 1.0)
        theirs, of = (ids[has], logp[has]) if tail == "drop" else (ids, logp)
        rows.append(_routed(u, theirs, of, columns, tail, label, to_student, at_one, present))
        hard_rows.append(not present)
    valid = target != -100
    lp_s, lp_t, logp_s, logp_t = (torch.stack(x) for x in zip(*rows, strict=True))
    row = oracle.Row(LEADING, z, lp_s, lp_t, target.masked_fill(~valid, 0), valid, logp_s, logp_t)
    measure = oracle.DIVERGENCES[divergence]
    d = torch.stack([
        0 * u.sum() if gone else measure(s[None], t[None], **(divergence_params or {}))[0]
        for u, gone, (s, t) in zip(z, hard_rows, coarse, strict=True)
    ])  # fmt: skip
    return mean_loss(
        row, d, routing=routing, routing_params=routing_params, temperature=temperature,
        label_smoothing=label_smoothing, absent=torch.tensor(hard_rows),
    )  # fmt: skip


def _categories(
    u: Tensor, logp: Tensor, columns: Tensor, tail: str, temperature: float
) -> tuple[Tensor, Tensor]:
    """Student and teacher over the kept columns that match, and the tail."""
    if tail == "drop":
        return (u[columns] / temperature).log_softmax(-1), (logp / temperature).log_softmax(-1)
    lp = (u / temperature).log_softmax(-1)
    others = torch.ones(len(u), dtype=torch.bool).index_fill(0, columns, False)
    lp_s = torch.cat([lp[columns], lp[others].logsumexp(-1, keepdim=True)])
    rest = (
        torch.log1p(-logp.exp().sum())[None] if tail == "bucket" else logp.new_tensor([-oracle.INF])
    )
    return lp_s, torch.cat([logp / temperature, rest]).log_softmax(-1)


def _routed(
    u: Tensor, ids: Tensor, logp: Tensor, columns: Tensor, tail: str, label: int,
    to_student: dict[int, int], at_one: tuple[Tensor, Tensor], present: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What policies see: the teacher's columns, an even tail; the label's log-probabilities."""
    lp_s, inf = u.log_softmax(-1), oracle.INF
    lp_t = torch.full((V_T,), -inf).to(u)
    if not present:
        lp_t[0] = 0.0
        logp_s = lp_s[max(label, 0)]
        if tail == "drop":  # of a column that is compared in its place
            logp_s = torch.zeros_like(logp_s) if label == 0 else torch.full_like(logp_s, -inf)
        return lp_s, lp_t, logp_s, torch.zeros_like(lp_s[0])
    if tail == "bucket":
        lp_t = lp_t + 0
        lp_t[:] = torch.log1p(-logp.exp().sum()) - torch.tensor(V_T - len(ids)).to(u).log()
    lp_t[ids] = logp
    lp_t = lp_t.log_softmax(-1)
    back = {s: t for t, s in to_student.items()}
    logp_t = lp_t[back[label]] if label in back else torch.full_like(lp_t[0], -inf)
    logp_s = lp_s[max(label, 0)]
    if tail == "drop":
        at = (columns == label).nonzero().flatten()
        logp_s = at_one[0][at[0]] if len(at) else torch.full_like(logp_s, -inf)
    return lp_s, lp_t, logp_s, logp_t


@pytest.mark.parametrize(("backend", "dtype"), widest())
@pytest.mark.parametrize(("tail", "kind", "pair"), TAIL_SETTINGS)
def test_every_divergence_and_policy(
    tail: str, kind: str, pair: tuple[str, str], backend: str, dtype: str, tiling: Tiling
) -> None:
    tiling(chunk=13, width=48)
    loss = Loss(*pair, options={} if tail == "bucket" else {"temperature": 1.7})
    agrees(kept(kind), tail, loss, backend, dtype)


@pytest.mark.parametrize(("backend", "dtype"), widest())
def test_more_columns_are_kept_than_the_student_has(backend: str, dtype: str) -> None:
    made = kept("linear", k=V_T - 1)
    place = (made.indices == made.problem.pairs[1][:, None, None]).nonzero()[:, 2]
    assert place.max() > V_S  # of some label, as the kernels number what is kept
    agrees(made, "bucket", Loss("forward_kl", "static"), backend, dtype)


def agrees(made: Kept, tail: str, loss: Loss, backend: str, dtype: str) -> None:
    """Assert that loss and gradients are the dense ones."""

    def dense(problem: Unlike) -> list[Tensor]:
        leaves = problem.leaves()
        z = leaves["logits"] if "logits" in leaves else oracle.real_logits(*leaves.values())  # type: ignore[arg-type]
        value = dense_loss(z.reshape(-1, V_S), made, tail, **loss.oracle())
        return with_gradients(value, leaves)

    agree(
        made.problem,
        lambda mine, **run: mine.ours(loss, made.teacher(tail), **run),
        dense,
        DTYPES[dtype],
        runs(backend, loss),
    )
