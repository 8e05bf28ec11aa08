"""The loss of a row, ``hard·CE + soft·T²·D + z_loss·lse²``, from row statistics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bgkernels.divergences import Divergence
from bgkernels.routing import Policy, Weight
from bgkernels.spec import ClosedForm, Extra
from bgkernels.stats import RowStats


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
        weights, kls = self.policy.closed, self.divergence.kls
        if weights is None or kls is None or self.policy.hard_term or self.policy.batchwide:
            return None
        return ClosedForm(*kls, weights, self.label_smoothing, self.z_loss)

    def rows(self, stats: RowStats) -> Tensor:
        """Loss of each row, ``(rows,)``; 0 where ignored."""
        hard, soft = (
            _checked(w, name, stats)
            for w, name in zip(self.policy(stats), ("hard", "soft"), strict=True)
        )
        total = torch.zeros_like(stats.nll)
        if _present(hard):
            total = total + hard * self._hard(stats)
        if _present(soft):
            divergence = self.divergence(stats)
            # A masked column can make D infinite in a token that gives it no weight.
            divergence = torch.where(
                (torch.as_tensor(soft) == 0) & ~divergence.isfinite(), 0.0, divergence
            )
            total = total + soft * self.temperature**2 * divergence
        if self.z_loss:
            total = total + self.z_loss * stats.lse_hard**2
        return torch.where(stats.valid, total, 0.0)

    def _hard(self, stats: RowStats) -> Tensor:
        if self.policy.hard_term:
            return self.policy.hard_term(stats)
        if not self.label_smoothing:
            return stats.nll
        uniform = stats.lse_hard - stats.logit_mean
        return (1 - self.label_smoothing) * stats.nll + self.label_smoothing * uniform


def _present(weight: Weight) -> bool:
    return isinstance(weight, Tensor) or weight != 0


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
        if not weight >= 0:
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
        negative = (weight.detach() < 0) & stats.valid
        if negative.any():
            worst = weight.detach()[negative].min() if weight.ndim else weight.detach()
            raise ValueError(
                "routing must return weights that are not negative; "
                f"the {name} weight falls to {worst:.4g}"
            )
        return weight
    return torch.where(weight < 0, float("nan"), weight)
