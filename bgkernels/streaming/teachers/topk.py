"""A top-k teacher has some columns of each row: its tensors, its checks, and what is seen of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bgkernels.rows.arithmetic import NEG_INF
from bgkernels.rows.extras import Tempered
from bgkernels.rows.sampling import gumbel_at
from bgkernels.rows.spec import Cap, RowSpec
from bgkernels.rows.stats import Statistics
from bgkernels.streaming import checks
from bgkernels.streaming.kept import Kept
from bgkernels.streaming.planner import Demand, Plan
from bgkernels.streaming.problem import Problem, Seen
from bgkernels.streaming.teachers.base import Comparison, Label, Teacher
from bgkernels.streaming.teachers.dense import state_demand
from bgkernels.streaming.teachers.topk_walk import ROW_BYTES, TopK, teacher_tilts


@dataclass(frozen=True, eq=False)
class TopKTeacher(Teacher):
    """A top-k teacher holds stored log-probabilities of each token's most probable columns.

    No teacher's head is multiplied: a step takes three matrix products instead of four. All
    columns that were not kept form the *tail*, which is handled in one of three ways:

    * ``"bucket"``: the tail is one category with the probability that the kept columns leave.
      Divergences compare ``k + 1`` categories: they are a lower bound of the exact ones, and never
      negative. This needs temperature 1, since the tail's probability at another one is unknown.
    * ``"renormalize"``: the teacher gives the tail no probability; it is renormalised over the kept
      columns. The student's tail is one category. Divergences that would be infinite are refused.
    * ``"drop"``: the tail is left out of both models, and each is renormalised over the kept
      columns.

    Routing sees the teacher column by column. With a bucket, the tail's probability is assumed to
    be spread evenly over the columns that were not kept, unless ``entropy`` and ``power_sum`` are
    given. The student's own statistics cover the whole vocabulary, except with ``"drop"``.

    Args:
        indices: ``(..., k)`` int64 or int32, the kept columns, each once; -1 pads a short row.
        logprobs: ``(..., k)`` log-probabilities at temperature 1, normalised over the whole
            vocabulary. Values at index -1 are ignored.
        tail: ``"bucket"``, ``"renormalize"`` or ``"drop"``.
        entropy: ``(...)`` Shannon entropy of the whole distribution in nats, or None.
        power_sum: ``(...)`` ``log Σ p^gamma`` of the whole distribution, or None.
        gamma: exponent of ``power_sum``; a policy with another exponent ignores ``power_sum``.
        vocab: number of the teacher's columns; None: the student's number.

    Example:
        >>> import torch, bgkernels as bg
        >>> kept = torch.randn(5, 50).log_softmax(-1).topk(8)
        >>> teacher = bg.TopKTeacher(kept.indices, kept.values)
    """

    indices: Tensor
    logprobs: Tensor
    tail: str = "bucket"
    entropy: Tensor | None = None
    power_sum: Tensor | None = None
    gamma: float = 0.1
    vocab: int | None = None

    names = ("indices", "logprobs", "entropy", "power_sum")
    compiles = False

    @property
    def k(self) -> int:
        """Number of columns kept a row, padding included."""
        return self.indices.shape[-1]

    @property
    def memory(self) -> int:  # type: ignore[override]
        return self.k + 1  # the student's logits of the kept columns and of the rest

    @property
    def excludes_columns(self) -> bool:  # type: ignore[override]
        return self.tail == "renormalize"

    def check_parameters(self, name: str, *, mixed: bool) -> None:
        if self.indices.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"`{name}.indices` must be int64 or int32; got {self.indices.dtype}")
        shape = tuple(self.indices.shape)
        checks.shape(f"{name}.logprobs", self.logprobs, shape, "that of the indices")
        for n, x in (("entropy", self.entropy), ("power_sum", self.power_sum)):
            if x is not None:
                checks.shape(f"{name}.{n}", x, shape[:-1], "the input's leading shape")
        checks.choice(f"{name}.tail", self.tail, ("bucket", "renormalize", "drop"))
        checks.number(f"{name}.gamma", self.gamma, low=0, open_low=True)
        if self.vocab is not None:
            checks.integer(f"{name}.vocab", self.vocab, low=1)

    def check_comparison(self, compared: int, temperature: float, label: Label) -> None:
        if not 1 <= self.k <= compared:
            raise ValueError(
                f"`teacher.indices` must keep from 1 to {compared} columns, which are compared; "
                f"got {self.k}"
            )
        if temperature != 1 and self.tail == "bucket":
            raise ValueError(
                f"`temperature` must be 1 for a TopKTeacher with tail='bucket'; got {temperature}: "
                "what the tail weighs at another one is not known; use tail='renormalize' or 'drop'"
            )
        captured = [n for n in ("entropy", "power_sum") if getattr(self, n) is not None]
        if temperature != 1 and captured:
            raise ValueError(
                f"`teacher.{captured[0]}` is of temperature 1, and `temperature` is {temperature}; "
                "leave it out, and routing sees the kept columns"
            )
        if self.indices.device.type == "cpu":
            check_columns(self, compared, label.valid)
        if label.word == "teacher_sample" and self.tail == "bucket":
            raise ValueError(
                "`target` cannot be 'teacher_sample' for a TopKTeacher with tail='bucket', which "
                "may draw an unknown column; pass a token that was drawn when the teacher ran"
            )

    def choose(self, word: str, seed: int) -> Tensor:
        """Return the best kept column, or a sample of them; -1 where none was kept.

        Where all columns are kept, the sample is the same token as from all logits.
        """
        ids = self.indices.long()
        score = self.logprobs.float().where(ids >= 0, NEG_INF)
        if word == "teacher_sample":
            rows = torch.arange(math.prod(ids.shape[:-1]), device=ids.device)
            score = score + gumbel_at(ids, rows.view(*ids.shape[:-1], 1), seed)
        return ids.gather(-1, score.argmax(-1, keepdim=True))[..., 0]

    def flat(self, rows: int, columns: int) -> TopKTeacher:
        n = self.indices.ndim - 1
        pairs = zip(self.names, self.tensors, strict=True)
        flat: dict[str, Any] = {
            name: x.reshape(rows, *x.shape[n:]) for name, x in pairs if x is not None
        }
        return replace(self, **flat)

    def specs(self, spec: RowSpec) -> tuple[RowSpec, ...]:
        """Return that of the whole (the student on both sides) and of the small problem."""
        tempered = tuple(e for e in spec.extras if isinstance(e, Tempered))
        if self.tail == "bucket" and any(e.temperature != 1 for e in tempered):
            raise NotImplementedError(
                f"{tempered[0]} of a TopKTeacher with tail='bucket' is not known; "
                "use tail='renormalize' or 'drop'"
            )
        drop, n = self.tail == "drop", self.k + 1
        extras, compared = (*(() if drop else tempered), *teacher_tilts(spec)), spec.compared
        whole = replace(spec, compared=0 if drop else compared, teacher=spec.student, extras=extras)
        small = replace(spec, columns=n, compared=n, student=Cap(), teacher=Cap(), logit_sum=False)
        return whole, small

    def seen(self, statistics: Statistics, problem: Problem, rows: Sequence[Tensor] | None) -> Seen:
        # Policies see single columns, divergences see categories; the label is the same.
        rows = list(statistics.values.unbind(0) if rows is None else rows)
        first, views = 0, []
        for pair in statistics.pairs():
            views.append(
                pair.row_stats(problem.ignore_index, rows[first : first + len(pair.values)])
            )
            first += len(pair.values)
        whole, small = views
        shared: tuple[str, ...] = ("nll", "lse_hard", "logit_mean", "label")
        if self.tail != "drop":
            shared += ("logp_s", "logp_t")
        columns = {name: getattr(whole, name) for name in shared}
        divergence = replace(small, vocab=problem.spec.compared, **columns)
        extras = small.extras.updated(whole.extras)
        if self.tail == "drop":
            single = ("entropy_t", "max_prob_t", "argmax_s", "argmax_t")
            columns = {name: getattr(whole, name) for name in single}
            return replace(divergence, extras=extras, **columns), divergence
        return replace(whole, kl_ts=small.kl_ts, kl_st=small.kl_st, extras=extras), divergence

    def demand(self, problem: Problem) -> Demand:
        tile = 0 if problem.masks_in_place else 4
        return Demand(tile_bytes=tile, row_bytes=ROW_BYTES * (self.k + 1)) + state_demand(problem)

    def walk(self, problem: Problem, plan: Plan, kept: Kept) -> Comparison:
        return TopK(self, problem, plan)


def check_columns(teacher: TopKTeacher, compared: int, valid: Tensor | None) -> None:
    """Check the kept columns and their probabilities, in the tokens that are ``valid (...)``."""
    rows = slice(None) if valid is None else valid
    ids, logp = teacher.indices[rows].long(), teacher.logprobs[rows].double()
    if ids.numel() and not -1 <= int(ids.min()) <= int(ids.max()) < compared:
        raise ValueError(
            f"`teacher.indices` must lie in [0, {compared}), or be -1 for padding; "
            f"got {int(ids.min())} to {int(ids.max())}"
        )
    ordered = ids.sort(-1).values
    if ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any():
        raise ValueError("`teacher.indices` must name a column once a row; got one twice")
    mass = logp.exp().where(ids >= 0, 0.0).sum(-1)
    most = 1 + 1e-3 + 8 * torch.finfo(teacher.logprobs.dtype).eps
    if (mass > most).any():
        raise ValueError(
            f"`teacher.logprobs` must be log-probabilities, which add up to 1 at most; "
            f"got {float(mass.max()):.4g} in a row; use log_softmax over the whole vocabulary first"
        )
