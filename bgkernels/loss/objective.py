"""The loss of a row, ``hard·CE + soft·T²·D + z_loss·lse²``, from row statistics."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bgkernels.backends import BACKENDS
from bgkernels.backends.base import Tile, statistics_of_tile
from bgkernels.divergences import Divergence
from bgkernels.routing import Policy, Weight
from bgkernels.rows.spec import ClosedForm, Extra, RowSpec
from bgkernels.rows.stats import RowStats
from bgkernels.streaming.sources import View


@dataclass(frozen=True)
class Objective:
    """A divergence and a policy joined to one loss a row.

    Args:
        divergence: the soft term, at temperature ``temperature``, multiplied by its square (Hinton
            et al. 2015).
        policy: the weights of both terms.
        temperature: of the comparison; the hard term is at temperature 1.
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

    @property
    def extras(self) -> tuple[Extra, ...]:
        """The extra statistics to compute, each once."""
        wanted = self.policy.extras + (self.divergence.extras if self.policy.uses_teacher else ())
        return tuple(dict.fromkeys(wanted))

    @property
    def closed_form(self) -> ClosedForm | None:
        """The same loss as a formula that backends know, if it is one."""
        weights, divergence = self.policy.closed, self.divergence.closed
        if weights is None or divergence is None or self.policy.hard_term or self.policy.batchwide:
            return None
        return ClosedForm(divergence, weights, self.label_smoothing, self.z_loss)

    def refuse_infinite(self) -> None:
        """Raise if the divergence is infinite where only the student has mass."""
        if self.policy.uses_teacher and _infinite(self.divergence):
            raise NotImplementedError(
                f"the divergence {self.divergence.name!r} is infinite where the teacher rules out "
                "what the student may say, as a TopKTeacher with tail='renormalize' does outside "
                "its columns; use tail='bucket' or 'drop'"
            )

    def rows(self, views: Sequence[View], weights: Tensor | None = None) -> Tensor:
        """Loss of each row, ``(rows,)``; 0 where ignored.

        Args:
            views: of the teachers.
            weights: ``(rows, teachers)``, how much each counts; None for a single one.
        """
        votes, first = [self._votes(view.routing) for view in views], views[0].routing
        total, hard = torch.zeros_like(first.nll), votes[0][0]
        if weights is not None:
            hard = _mean([hard for hard, _ in votes], shares(weights))
        if _present(hard):
            total = total + hard * self._hard(first)
        for i, (view, (_, soft)) in enumerate(zip(views, votes, strict=True)):
            if weights is not None:
                soft = soft * weights[:, i]
            if _present(soft):
                divergence = self.divergence(view.divergence)
                # A masked column can make D infinite in a token that gives it no weight.
                divergence = torch.where(
                    (torch.as_tensor(soft) == 0) & ~divergence.isfinite(), 0.0, divergence
                )
                total = total + soft * self.temperature**2 * divergence
        if self.z_loss:
            total = total + self.z_loss * first.lse_hard**2
        return torch.where(first.valid, total, 0.0)

    def _votes(self, stats: RowStats) -> tuple[Weight, Weight]:
        """The weights that routing gives, checked."""
        hard, soft = self.policy(stats)
        return _checked(hard, "hard", stats), _checked(soft, "soft", stats)

    def _hard(self, stats: RowStats) -> Tensor:
        if self.policy.hard_term:
            return self.policy.hard_term(stats)
        if not self.label_smoothing:
            return stats.nll
        uniform = stats.lse_hard - stats.logit_mean
        return (1 - self.label_smoothing) * stats.nll + self.label_smoothing * uniform


def shares(weights: Tensor) -> Tensor:
    """Weights ``(rows, teachers)`` as shares of their sum, equal ones where that is 0."""
    total = weights.sum(1, keepdim=True)
    return torch.where(total == 0, 1 / weights.shape[1], weights / total)


def _mean(values: Sequence[Weight], shares: Tensor) -> Tensor:
    """The mean over teachers, of those that have a share."""
    return sum(
        (torch.where(s == 0, 0.0, s * x) for x, s in zip(values, shares.unbind(1), strict=True)),
        torch.zeros_like(shares[:, 0]),
    )


def blend(views: Sequence[View], weights: Tensor | None) -> RowStats:
    """What the caller sees of several teachers: their mean, and the first one's integers."""
    first = views[0].routing
    if weights is None:
        return first
    columns = zip(*(view.routing.tensors() for view in views), strict=True)
    share = shares(weights)
    return first.replaced(
        _mean(xs, share) if xs[0].is_floating_point() else xs[0] for xs in columns
    )


@functools.lru_cache(maxsize=64)
def _infinite(divergence: Divergence) -> bool:
    """Whether it is infinite for a student (½, ½) and a teacher (1, 0)."""
    spec = RowSpec(2, 2, extras=divergence.extras)
    z, label = torch.zeros(1, 2, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    tile = Tile(z, torch.tensor([[0.0, float("-inf")]], dtype=z.dtype), 0, 0)
    final = statistics_of_tile(BACKENDS["eager"], tile, label, spec)
    return not bool(divergence(final.stats).isfinite().all())


def _present(weight: Weight) -> bool:
    return isinstance(weight, Tensor) or weight != 0


ROUNDING = 1e-6
"""By how much a weight such as ``1 - p`` may fall below zero."""


def _checked(weight: Weight, name: str, stats: RowStats) -> Weight:
    """A weight of the right shape and sign.

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
    if weight.device.type == "cpu" and not torch.compiler.is_compiling():
        negative = (weight.detach() < -ROUNDING) & stats.valid
        if negative.any():
            worst = weight.detach()[negative].min() if weight.ndim else weight.detach()
            raise ValueError(
                "routing must return weights that are not negative; "
                f"the {name} weight falls to {worst:.4g}"
            )
        return weight
    return torch.where(weight < -ROUNDING, float("nan"), weight)
