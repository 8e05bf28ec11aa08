"""Problems with two vocabularies, and their loss written densely from its definition."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import bgkernels as bg
from tests import oracle
from tests.problems import Loss, Params, called, make, normal, with_gradients
from tests.streaming.categories import mean_loss

V_S, V_T, MATCHED = 83, 97, 61
LEADING, TEACHER_ROWS = (3, 8), 31
INF = float("inf")


@dataclass(frozen=True)
class Unlike:
    """Tensors of a student and of a teacher with another vocabulary, and what matches.

    Args:
        student, teacher: as those of ``tests.problems.Problem``.
        pairs: ``(2, m)``.
        positions: ``(...)``, or None.
        target: labels.
        rest: ``"bucket"`` or ``"drop"``.
        student_cap, teacher_cap: ``{logit_scale, logit_softcap}``.
    """

    student: dict[str, Tensor]
    teacher: dict[str, Tensor]
    pairs: Tensor
    positions: Tensor | None
    target: Tensor
    rest: str = "bucket"
    student_cap: Params = None  # type: ignore[assignment]
    teacher_cap: Params = None  # type: ignore[assignment]

    def to(self, dtype: torch.dtype) -> Unlike:
        student, teacher = (
            {name: x.to(dtype) for name, x in side.items()} for side in (self.student, self.teacher)
        )
        return replace(self, student=student, teacher=teacher)

    def leaves(self) -> dict[str, Tensor]:
        return {name: x.detach().clone().requires_grad_() for name, x in self.student.items()}

    def library_teacher(self) -> bg.MatchedTeacher:
        if "logits" in self.teacher:
            inner: Any = bg.LogitsTeacher(**self.teacher)
        else:
            inner = bg.LinearTeacher(**self.teacher, **(self.teacher_cap or {}))
        return bg.MatchedTeacher(inner, self.pairs, self.rest, self.positions)

    def ours(self, loss: Loss, teacher: Any = None, **run: Any) -> list[Tensor]:
        leaves, teacher = self.leaves(), teacher or self.library_teacher()
        options = {**loss.library(), **(self.student_cap or {}), **run}
        return with_gradients(called(leaves, teacher, self.target, **options), leaves)

    def dense(self, loss: Loss) -> list[Tensor]:
        leaves = self.leaves()
        z = _logits(leaves, self.student_cap or {}).reshape(-1, V_S)
        t = _logits(self.teacher, self.teacher_cap or {}).reshape(-1, V_T)
        return with_gradients(dense_loss(z, t, self, **loss.oracle()), leaves)


def _logits(tensors: dict[str, Tensor], cap: Params) -> Tensor:
    """Real logits, of low-precision ones kept in fp32."""
    if "logits" in tensors:
        y = tensors["logits"]
        y = (y.float() if y.dtype.itemsize < 4 else y) * cap.get("logit_scale", 1.0)
        bound = cap.get("logit_softcap")
        return y if bound is None else bound * torch.tanh(y / bound)
    y = oracle.real_logits(*tensors.values(), **cap)  # type: ignore[arg-type]
    return y.float() if y.dtype.itemsize < 4 else y


def unlike(kind: str = "linear", rest: str = "bucket", seed: int = 0, **caps: Any) -> Unlike:
    """Matched columns in no order; labels of every sort; tokens without a row of the teacher."""
    g = torch.Generator().manual_seed(seed)
    source = make(kind, leading=LEADING, hidden=(6, 5), vocab=(V_S, V_T), seed=seed)
    ids = [torch.randperm(n, generator=g)[:MATCHED] for n in (V_S, V_T)]
    if "logits" in source.teacher:
        teacher = {"logits": normal(TEACHER_ROWS, V_T, seed=seed + 51, std=2.0)}
    else:
        teacher = {**source.teacher, "hidden": normal(TEACHER_ROWS, 5, seed=seed + 51)}
    positions = torch.randperm(TEACHER_ROWS, generator=g)[: 3 * 8].reshape(LEADING)
    positions[:, 2::4] = -1
    target = torch.randint(V_S, LEADING, generator=g)
    target[:, 3] = target[0, 6] = -100
    return Unlike(source.student, teacher, torch.stack(ids), positions, target, rest, **caps)


def categories(x: Tensor, ids: Tensor, rest: str, temperature: float) -> Tensor:
    """Log-probabilities of the matched columns ``ids``, and of the rest."""
    lp = (x / temperature).log_softmax(-1)
    others = torch.ones(x.shape[-1], dtype=torch.bool).index_fill(0, ids, False)
    if rest == "drop":
        return (x[:, ids] / temperature).log_softmax(-1)
    return torch.cat([lp[:, ids], lp[:, others].logsumexp(-1, keepdim=True)], -1)


def dense_loss(
    z: Tensor, t: Tensor, problem: Unlike, *, divergence: str, routing: str,
    divergence_params: Any, routing_params: Any, temperature: float = 1.0,
    label_smoothing: float = 0.0, z_loss: float = 0.0,
) -> Tensor:  # fmt: skip
    """The loss as it is defined: categories for the divergence, whole vocabularies for routing."""
    ours, theirs = problem.pairs
    places = torch.arange(len(z)) if problem.positions is None else problem.positions.reshape(-1)
    present, t = places >= 0, t[places.clamp_min(0)].to(z)
    coarse = [categories(x, ids, problem.rest, temperature) for x, ids in ((z, ours), (t, theirs))]
    valid = problem.target.reshape(-1) != -100
    label = problem.target.reshape(-1).masked_fill(~valid, 0)
    sure = torch.full_like(t, -INF)
    sure[:, 0] = 0.0
    lp_s, lp_t = z.log_softmax(-1), torch.where(present[:, None], t.log_softmax(-1), sure)
    column = torch.full((z.shape[-1],), -1).index_copy(0, ours, theirs)[label]
    logp_t = lp_t.gather(1, column.clamp_min(0)[:, None])[:, 0].masked_fill(column < 0, -INF)
    logp_t = logp_t.masked_fill(~present, 0.0)
    row = oracle.Row(
        tuple(problem.target.shape), z, lp_s, lp_t, label, valid, oracle._at(lp_s, label), logp_t
    )
    return mean_loss(
        row, oracle.DIVERGENCES[divergence](*coarse, **(divergence_params or {})),
        routing=routing, routing_params=routing_params, temperature=temperature,
        label_smoothing=label_smoothing, z_loss=z_loss, absent=~present,
    )  # fmt: skip
