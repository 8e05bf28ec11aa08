"""Teachers without their tensors: what a call is told of them, and what is seen of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from bgkernels.rows.spec import Cap, RowSpec, Tilt
from bgkernels.rows.state import NEG_INF
from bgkernels.rows.stats import Final, RowStats


class View(NamedTuple):
    """What is seen of one teacher, a number a row.

    Args:
        routing: by policies and by the caller.
        divergence: by divergences.
    """

    routing: RowStats
    divergence: RowStats


@dataclass(frozen=True)
class Source:
    """A dense teacher: one column of logits for each that is compared.

    Args:
        count: number of its tensors: ``(hidden, weight, bias | None)``, ``(logits,)``, or none.
        cap: the map from raw to real logits.
    """

    count: int = 0
    cap: Cap = Cap()

    @property
    def memory(self) -> int:
        """Tensors that pass 2 needs beside the statistics."""
        return 0

    def specs(self, spec: RowSpec) -> tuple[RowSpec, ...]:
        """Of each :class:`~bgkernels.rows.stats.Final` that the teacher gives."""
        return (replace(spec, teacher=self.cap),)

    def view(self, finals: tuple[Final, ...]) -> View:
        """What is seen of the teacher."""
        return View(finals[0].stats, finals[0].stats)


Weigh = Callable[[list[RowStats]], Tensor]
"""From the statistics of each teacher to weights ``(rows, teachers)``."""

Trust = Tensor | Weigh | None
"""How much each of several teachers counts: ``(rows, teachers)``, or what gives it; or one does."""


def trusted(trust: Trust, views: list[View], part: slice = slice(None)) -> Tensor | None:
    """The weights of the rows ``part``, of which ``views`` are, ``(rows, teachers)``."""
    if trust is None or isinstance(trust, Tensor):
        return None if trust is None else trust[part]
    return weights_of(trust, [view.routing for view in views], normalised=False)


@dataclass(frozen=True)
class MixtureSource(Source):
    """The distribution that several dense teachers make together.

    Its tensors are the teachers', one after the other, and their weights or None.

    Args:
        parts: the teachers.
        function: of the teachers' statistics, where it gives the weights.
    """

    parts: tuple[Source, ...] = ()
    function: Weigh | None = None

    @property
    def memory(self) -> int:
        """What mixes the tiles."""
        return 1

    def weigh(self, stats: list[RowStats]) -> Tensor:
        """The weights that the function gives."""
        assert self.function is not None
        return weights_of(self.function, stats, normalised=True)


def weights_of(function: Weigh, stats: list[RowStats], *, normalised: bool) -> Tensor:
    """What a function of the teachers' statistics says, ``(rows, teachers)``, checked.

    Where looking would wait for the device, weights that are wrong become NaN.

    Raises:
        TypeError, ValueError: it returned no tensor, or one of another shape, or weights that are
            negative or, ``normalised``, do not add up to 1.
    """
    rows = len(stats[0].valid)
    weights = function([s.replaced([x.detach() for x in s.tensors()]) for s in stats])
    if not isinstance(weights, Tensor):
        raise TypeError(f"`weights` must return a tensor; got {type(weights).__name__}")
    if weights.shape != (rows, len(stats)):
        raise ValueError(
            f"`weights` must return (tokens, teachers) = {(rows, len(stats))}; "
            f"got {tuple(weights.shape)}"
        )
    weights = weights.detach().double()
    wrong = wrong_weights(weights, normalised=normalised) & stats[0].valid
    if weights.device.type == "cpu" and wrong.any():
        rule = ", and add up to 1 for kind='distribution'" if normalised else ""
        raise ValueError(
            f"`weights` must be finite and not negative{rule}; got {weights[wrong][0].tolist()}"
        )
    return torch.where(wrong[:, None], float("nan"), weights)


def wrong_weights(weights: Tensor, *, normalised: bool) -> Tensor:
    """Where weights ``(..., teachers)`` are negative, infinite or, ``normalised``, not of sum 1."""
    wrong = ~((weights >= 0) & weights.isfinite()).all(-1)
    return wrong | ((weights.sum(-1) - 1).abs() > 1e-3) if normalised else wrong


@dataclass(frozen=True)
class TopKSource(Source):
    """A teacher of which each row keeps ``k`` columns: see :class:`bgkernels.streaming.teachers.topk.TopK`.

    Args:
        k: columns kept a row, padding included.
        tail: what the others are: ``"bucket"``, ``"renormalize"`` or ``"drop"``.
        gamma: exponent of the captured power sum.
        columns: number of compared columns.
    """

    k: int = 1
    tail: str = "bucket"
    gamma: float = 0.1
    columns: int = 0

    @property
    def memory(self) -> int:
        """The student's logits of all categories."""
        return 1

    def specs(self, spec: RowSpec) -> tuple[RowSpec, ...]:
        """Of the whole (the student on both sides) and of the small problem."""
        spec, n = replace(spec, logit_sum=False), self.k + 1
        compared = 0 if self.tail == "drop" else spec.compared
        tilts = self.teacher_tilts(spec)
        whole = replace(spec, compared=compared, teacher=spec.student, extras=tilts)
        return whole, replace(spec, columns=n, compared=n, student=Cap(), teacher=Cap())

    def teacher_tilts(self, spec: RowSpec) -> tuple[Tilt, ...]:
        """The power sums of the teacher alone, which policies read."""
        return tuple(t for t in spec.tilts if t.a == 0 < t.b and not t.moments)

    def view(self, finals: tuple[Final, ...]) -> View:
        """Policies see single columns, divergences see categories; the label is the same."""
        whole, small = (final.stats for final in finals)
        hard = ("nll", "lse_hard", "logit_mean", "label")
        soft = () if self.tail == "drop" else ("logp_s", "logp_t")
        shared = {name: getattr(whole, name) for name in (*hard, *soft)}
        divergence = replace(small, vocab=self.columns, **shared)
        extras = {**small.extras, **whole.extras}
        if self.tail == "drop":
            own = {
                n: getattr(whole, n) for n in ("entropy_t", "max_prob_t", "argmax_s", "argmax_t")
            }
            return View(replace(divergence, extras=extras, **own), divergence)
        routing = replace(whole, kl_ts=small.kl_ts, kl_st=small.kl_st, extras=extras)
        return View(routing, divergence)

    def categories(self, ids: Tensor, logprobs: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
        """The teacher's log-probabilities ``(rows, k + 1)``, and how many columns the last holds.

        What rounding leaves of the tail is at least half an ulp of 1, so that the student may have
        mass there.
        """
        kept = ids >= 0
        logp = torch.where(kept, logprobs.to(wide), NEG_INF)
        missing = (self.columns - kept.sum(1)).clamp_min(0).double()
        tail = torch.full_like(missing, NEG_INF)
        if self.tail == "bucket":
            floor = min(torch.finfo(x).eps for x in (logprobs.dtype, torch.float32)) / 2
            mass = 1 - logp.double().exp().sum(1)
            tail = torch.where(missing > 0, mass.clamp_min(floor).log(), tail)
        elif self.tail == "drop":
            missing = torch.zeros_like(missing)
        return torch.cat([logp, tail.to(wide)[:, None]], 1), missing
