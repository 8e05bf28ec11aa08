"""The loss of a row is ``hard·CE + soft·T²·D + z_loss·lse²``, from row statistics."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bgkernels.rows.arithmetic import NEG_INF
from bgkernels.rows.extras import Extra, Pair, Tilt
from bgkernels.rows.spec import INTS, RowSpec
from bgkernels.rows.state import absorb_column, empty
from bgkernels.rows.stats import AT_ONE, RowStats, Statistics, distinct, finalize
from bgkernels.streaming import checks
from bgkernels.streaming.problem import Problem, Seen

Weight = Tensor | float
Weights = Callable[[RowStats], tuple[Weight, Weight]]


@dataclass(frozen=True)
class Divergence:
    """A divergence is a function of the statistics of each row.

    Args:
        name: how it is called in messages and tables.
        rows: ``RowStats -> (rows,)`` values in nats; must treat every row alone. All that it sees
            is at the temperature of the loss.
        extras: the extra statistics that ``rows`` reads.
    """

    name: str
    rows: Callable[[RowStats], Tensor]
    extras: tuple[Extra, ...] = ()

    def __call__(self, stats: RowStats) -> Tensor:
        """Return the divergence of each row."""
        return self.rows(stats)


@dataclass
class Policy:
    """A policy is a rule for the ``(hard, soft)`` weights of each token.

    Args:
        name: how it is called in messages and tables.
        weights: ``RowStats -> (hard, soft)``, each ``(rows,)`` or a number; not negative. What it
            sees of each model by itself is at temperature 1.
        extras: the extra statistics that ``weights`` reads; tilts are at temperature 1.
        batchwide: whether a row's weight depends on other rows; such a policy sees all tokens at
            once, in recompute mode.
        hard_term: ``RowStats -> (rows,)``, instead of the cross-entropy.
        uses_teacher: False if neither term nor weight reads the teacher, whose head is then never
            multiplied.
        fixed: whether the weights are numbers, for which no statistic is read.
    """

    name: str
    weights: Weights = field(repr=False)
    extras: tuple[Extra, ...] = field(default=(), repr=False)
    batchwide: bool = False
    hard_term: Callable[[RowStats], Tensor] | None = field(default=None, repr=False)
    uses_teacher: bool = field(default=True, repr=False)
    fixed: bool = field(default=False, repr=False)

    def __call__(self, stats: RowStats) -> tuple[Weight, Weight]:
        """Return the weights of each row."""
        return self.weights(stats)


@dataclass(frozen=True)
class Objective:
    """An objective joins a divergence and a policy to one loss a row.

    Args:
        divergence: the soft term, at temperature ``temperature``, multiplied by its square (Hinton
            et al. 2015).
        policy: the weights of both terms, from statistics at temperature 1.
        temperature: of the divergence; the hard term is at temperature 1.
        label_smoothing: ε of the cross-entropy, not of a policy's own hard term:
            ``(1-ε)·nll + ε·(lse - mean logit)``, as ``torch.nn.functional.cross_entropy``.
        z_loss: weight of the student's squared log-sum-exp (PaLM, Chowdhery et al. 2022), on every
            valid row.
    """

    divergence: Divergence
    policy: Policy
    temperature: float = 1.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def extras(self, *, at_one: bool) -> tuple[Extra, ...]:
        """Return the extra statistics to compute, each once.

        Args:
            at_one: whether statistics at temperature 1 are read by others than the policy.
        """
        policy, tempered = self.policy, self.temperature != 1.0
        wanted = list(policy.extras)
        if tempered:
            wanted = [e.at(self.temperature) if isinstance(e, Tilt) else e for e in wanted]
            if at_one or (policy.uses_teacher and not policy.fixed):
                wanted.append(AT_ONE)
        wanted += self.divergence.extras if policy.uses_teacher else ()
        return distinct(wanted)

    def refuse_infinite(self) -> None:
        """Raise if the divergence is infinite where only the student has mass."""
        if self.policy.uses_teacher and _infinite(self.divergence):
            raise NotImplementedError(
                f"the divergence {self.divergence.name!r} is infinite where the teacher rules out "
                "what the student may say, as a TopKTeacher with tail='renormalize' does outside "
                "its columns; use tail='bucket' or 'drop'"
            )

    def seen(
        self, problem: Problem, blocks: Sequence[Statistics], rows: Sequence[Tensor] | None = None
    ) -> list[Seen]:
        """Return what is seen of each part of the teacher: by policies at temperature 1.

        Args:
            problem: of the rows.
            blocks: their statistics.
            rows: all rows of their matrix as autograd is to know them; None: without a history.
        """
        pairs = problem.seen(blocks, rows)
        if self.temperature == 1.0 or AT_ONE not in pairs[0][0].extras:  # nobody looks at it
            return pairs
        at_one = (s.at_one(self.temperature, self.policy.extras) for s, _ in pairs)
        return [(s, tempered) for s, (_, tempered) in zip(at_one, pairs, strict=True)]

    def differentiate(
        self,
        problem: Problem,
        blocks: Sequence[Statistics],
        values: Tensor,
        rows: slice,
        scale: Tensor | float,
    ) -> tuple[Tensor, Tensor]:
        """Return each row's loss times ``scale``, and the derivative of their sum by ``values``."""
        grads, complete = torch.zeros_like(values), problem.items == problem.labels.size(0)
        with torch.enable_grad():
            leaves = [row for block in blocks for row in block.leaves()]
            pairs = self.seen(problem, blocks, leaves)
            weights = problem.teacher.part_weights([s for s, _ in pairs], rows)
            loss = self.rows(pairs, weights, complete=complete)
        if isinstance(scale, Tensor):
            scale = scale.expand(loss.shape).to(loss.dtype)
        else:
            scale = torch.full_like(loss, scale)
        if loss.requires_grad:
            reached = reachable(loss)
            indices = [i for i, leaf in enumerate(leaves) if id(leaf) in reached]
            wanted = [leaves[i] for i in indices]
            derivatives = torch.autograd.grad(loss, wanted, scale) if wanted else ()
            for i, grad in zip(indices, derivatives, strict=True):
                grads[i].copy_(grad)
        return loss.detach() * scale, grads

    def rows(
        self, pairs: Sequence[Seen], weights: Tensor | None = None, *, complete: bool = False
    ) -> Tensor:
        """Return the loss of each row, ``(rows,)``; 0 where the row is ignored.

        Args:
            pairs: what is seen of each part of the teacher.
            weights: ``(rows, parts)``, how much each counts; None for a single one.
            complete: whether it is known that no row is ignored.
        """
        votes, first = [self._votes(routing) for routing, _ in pairs], pairs[0][0]
        total, hard = None, votes[0][0]
        if weights is not None:
            hard = _mean([hard for hard, _ in votes], shares(weights))
        if _present(hard):
            total = hard * self._hard(first)
        for i, ((_, tempered), (_, soft)) in enumerate(zip(pairs, votes, strict=True)):
            if weights is not None:
                soft = soft * weights[:, i]
            if _present(soft):
                divergence = self.divergence.rows(tempered)
                if isinstance(soft, Tensor) and not _surely_finite(divergence):
                    # A masked column can make D infinite in a token that gives it no weight.
                    unseen = (soft == 0) & ~divergence.isfinite()
                    divergence = torch.where(unseen, 0.0, divergence)
                term = soft * divergence
                if self.temperature != 1:
                    term = term * self.temperature**2
                total = term if total is None else total + term
        if self.z_loss:
            term = self.z_loss * first.lse_hard**2
            total = term if total is None else total + term
        total = torch.zeros_like(first.nll) if total is None else total
        return total if complete else torch.where(first.valid, total, 0.0)

    def _votes(self, stats: RowStats) -> tuple[Weight, Weight]:
        """Return the weights that routing gives, checked."""
        hard, soft = self.policy.weights(stats)
        hard, soft = _checked(hard, "hard", stats), _checked(soft, "soft", stats)
        if stats.matched is None:
            return hard, soft
        weights = (torch.as_tensor(x, device=stats.nll.device) for x in (hard, soft))
        hard, soft = (x.to(stats.nll.dtype) for x in weights)
        return torch.where(stats.matched, hard, 1.0), torch.where(stats.matched, soft, 0.0)

    def _hard(self, stats: RowStats) -> Tensor:
        if self.policy.hard_term is not None:
            return self.policy.hard_term(stats)
        if not self.label_smoothing:
            return stats.nll
        uniform = stats.lse_hard - stats.logit_mean
        return (1 - self.label_smoothing) * stats.nll + self.label_smoothing * uniform


def reachable(x: Tensor) -> set[int]:
    """Return the identities of the leaves that a tensor's history reaches.

    Autograd could say which of many leaves are used, but takes longer than the rest of the loss.
    """
    nodes = [] if x.grad_fn is None else [x.grad_fn]
    visited, leaves = set(nodes), {id(x)}
    for node in nodes:  # grows on the way
        variable = getattr(node, "variable", None)
        if variable is not None:
            leaves.add(id(variable))
            continue
        parents = [parent for parent, _ in node.next_functions if parent and parent not in visited]
        visited.update(parents)
        nodes += parents
    return leaves


def shares(weights: Tensor) -> Tensor:
    """Divide weights ``(rows, teachers)`` by their sum; where that is 0, all are equal."""
    total = weights.sum(1, keepdim=True)
    return torch.where(total == 0, 1 / weights.shape[1], weights / total)


def _mean(values: Sequence[Weight], shares: Tensor) -> Tensor:
    """Return the mean over those teachers that have a share."""
    return sum(
        (torch.where(s == 0, 0.0, s * x) for x, s in zip(values, shares.unbind(1), strict=True)),
        torch.zeros_like(shares[:, 0]),
    )


def blend(pairs: Sequence[Seen], weights: Tensor | None) -> RowStats:
    """Return what a caller sees of several teachers: their mean, and the first one's integers."""
    first = pairs[0][0]
    if weights is None:
        return first
    columns = zip(*(routing.tensors() for routing, _ in pairs), strict=True)
    share = shares(weights)
    return first.replaced(
        _mean(xs, share) if xs[0].is_floating_point() else xs[0] for xs in columns
    )


@functools.lru_cache(maxsize=64)
def _infinite(divergence: Divergence) -> bool:
    """Tell whether a divergence is infinite for a student (½, ½) and a teacher (1, 0)."""
    spec = RowSpec(2, 2, extras=divergence.extras)
    zero, label = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    state = empty(1, spec, dtype=torch.float64, device=zero.device)
    for name in ("score", "z_y", "v_y", "label"):
        state[name].fill_(0)
    state = absorb_column(state, label + 1, zero, zero + NEG_INF)
    lp, lq = torch.full((1, 2), 0.5).double().log(), torch.tensor([[0.0, NEG_INF]]).double()
    for i, extra in enumerate(spec.extras):
        if extra.second_read:
            state.extra(i).copy_(torch.stack(extra.absorb_pair(Pair(lp, lq, lp, lq))))
    values = torch.zeros(spec.field_count, 1, dtype=torch.float64)
    finalize(state, label, values)
    statistics = Statistics((spec,), values, label.expand(len(INTS), 1))
    return not bool(divergence(statistics.row_stats(-1)).isfinite().all())


def _present(weight: Weight) -> bool:
    return isinstance(weight, Tensor) or weight != 0


def _surely_finite(x: Tensor) -> bool:
    """Tell whether all numbers are finite; False where looking would wait for the device."""
    return checks.legible(x) and math.isfinite(x.detach().sum())


ROUNDING = 1e-6
"""By how much a weight such as ``1 - p`` may fall below zero."""


def _checked(weight: Weight, name: str, stats: RowStats) -> Weight:
    """Return a weight whose shape and sign have been checked.

    Where looking would wait for the device, a negative weight becomes NaN.
    """
    rows = stats.nll.shape
    if not isinstance(weight, Tensor):
        if not isinstance(weight, (int, float)):
            kind = type(weight).__name__
            raise TypeError(
                f"routing must return tensors or numbers; the {name} weight is a {kind}"
            )
        if not weight >= -ROUNDING:
            raise ValueError(
                f"routing must return weights that are not negative; the {name} weight is {weight}"
            )
        return weight
    if weight.shape not in (rows, torch.Size()):
        raise ValueError(
            f"routing must return weights of shape {tuple(rows)}; "
            f"the {name} weight is {tuple(weight.shape)}"
        )
    if checks.legible(weight):
        if not weight.numel() or weight.detach().min() >= -ROUNDING:
            return weight
        negative = (weight.detach() < -ROUNDING) & stats.valid
        if negative.any():
            worst = weight.detach()[negative].min() if weight.ndim else weight.detach()
            raise ValueError(
                "routing must return weights that are not negative; "
                f"the {name} weight falls to {worst:.4g}"
            )
        return weight
    return torch.where(weight < -ROUNDING, float("nan"), weight)
