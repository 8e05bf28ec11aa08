"""The other libraries' losses on a GPU, each with what it computes in the oracle's words."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Problem
from benchmarks.entries import dense, liger, paper

HALVES = {"routing": "additive", "routing_params": {"hard": 0.5, "soft": 0.5}}
KL_ALONE = {"routing": "additive", "routing_params": {"hard": 0.0, "soft": 1.0}}


@dataclass(frozen=True)
class Contestant:
    """A loss of a problem at temperature 1.

    Args:
        loss: the loss.
        oracle: the same loss in the words of ``bgkernels.oracle.hybrid_loss``.
        needs: a package.
    """

    loss: Callable[[Problem], Tensor]
    oracle: dict[str, Any] = field(default_factory=dict)
    needs: str | None = None

    def missing(self) -> str | None:
        """None, or why it cannot run."""
        if self.needs and importlib.util.find_spec(self.needs) is None:
            return f"{self.needs} is not installed"
        return None


@functools.cache
def _compiled() -> Callable[[Problem], Tensor]:
    return torch.compile(dense, dynamic=False)


def compiled(p: Problem) -> Tensor:
    return _compiled()(p)


def liger_fused(p: Problem) -> Tensor:
    """Liger's Triton operator; its beta 0 is the forward KL."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=0.0, ignore_index=-100, temperature=1.0)
    made = loss(p.input, p.weight, p.t_input, p.t_weight, p.target)
    assert isinstance(made, Tensor)
    return made


def orda(p: Problem) -> Tensor:
    from orda_kernel import SeparateTeacher, distillation_loss

    made = distillation_loss(
        p.input, p.weight, p.target, SeparateTeacher(hidden=p.t_input, weight=p.t_weight),
        student_ce_weight=0.5, teacher_ce_weight=0.0, kl_weight=0.5,
    )  # fmt: skip
    assert isinstance(made.loss, Tensor)
    return made.loss


def trl(p: Problem) -> Tensor:
    """TRL's kernel gives the divergence of each token; every token takes part here."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    divergence, _ = ChunkedDivergenceFunction.apply(
        p.input, p.weight, None, p.t_input, p.t_weight, None, 0.0, 1.0
    )
    made = divergence.mean()
    assert isinstance(made, Tensor)
    return made


PEERS: dict[str, Contestant] = {
    "dense torch, eager": Contestant(dense),
    "dense torch, compiled": Contestant(compiled),
    "the paper's formula, eager": Contestant(paper),
    "TRL ChunkedDivergence: KL alone": Contestant(trl, KL_ALONE, "trl"),
    "Liger chunked JSD: CE + KL, fixed": Contestant(liger, HALVES, "liger_kernel"),
    "Liger FusedLinearJSD: KL alone": Contestant(liger_fused, KL_ALONE, "liger_kernel"),
    "ORDA: CE + KL, fixed": Contestant(orda, HALVES, "orda_kernel"),
}
