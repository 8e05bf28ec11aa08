"""Every token of a passage with what is known of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import bgkernels as bg
from bgkernels.training.analysis.risk import choice_risk
from bgkernels.training.evaluate import row_stats
from bgkernels.training.models import CausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Layer:
    """How one map is shown.

    Args:
        title, text: what it is, and how to read it.
        scale: ``"kind"``: purple for bridges at 0, green for gardens at the most; ``"amount"``:
            white at 0, orange at the most; ``"sign"``: purple below 0, green above.
    """

    title: str
    text: str
    scale: str = "kind"


LAYERS = {
    "ambiguity": Layer("Entropy", "teacher's entropy / log V: near 0 at bridges, high in gardens"),
    "soft_weight": Layer("Soft weight", "share of the soft label by the routing policy"),
    "kl": Layer("Divergence", "KL(teacher‖student), nats", "amount"),
    "risk": Layer(
        "Risk",
        "κ-proxy: nats that the student's choice of this token adds later, estimated",
        "sign",
    ),
}
"""The maps, by field of :class:`TokenMap`."""


@dataclass(frozen=True)
class TokenMap:
    """A passage, token by token.

    Args:
        tokens: as text.
        ambiguity: the teacher's ``H / log V`` where it predicts each token.
        soft_weight: the policy's soft weight, as a share of both weights.
        kl: KL(teacher‖student), nats.
        risk: estimated risk of the student's choice, nats; empty where not asked for.
    """

    tokens: tuple[str, ...]
    ambiguity: tuple[float, ...]
    soft_weight: tuple[float, ...]
    kl: tuple[float, ...]
    risk: tuple[float, ...] = ()

    def layers(self) -> dict[str, tuple[float, ...]]:
        """The maps that there are."""
        found = {name: getattr(self, name) for name in LAYERS}
        return {name: values for name, values in found.items() if values}


@torch.no_grad()
def read_passage(
    student: CausalLM,
    teacher: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    text: Tensor,
    policy: bg.routing.Policy,
    **risk: Any,
) -> TokenMap:
    """Map a passage.

    Args:
        student, teacher: the pair.
        tokenizer: to show tokens as text.
        text: ``(length + 1,)`` tokens; the first is given.
        policy: whose weights are shown.
        **risk: ``horizon``, ``rollouts`` and ``seed`` of
            :func:`~bgkernels.training.analysis.risk.choice_risk`; without them no risk is
            estimated, which is most of the work.
    """
    text = text.to(student.device)
    inputs, target = text[None, :-1], text[None, 1:]
    stats = row_stats(student, teacher, inputs, target, policy)
    hard, soft = (torch.as_tensor(w).expand_as(stats.nll) for w in policy(stats))
    share = soft / (hard + soft).clamp_min(torch.finfo(stats.nll.dtype).tiny)
    ambiguity = stats.entropy_t / math.log(max(2, stats.vocab))
    ambiguous, soft_share, kl = (tuple(x[0].tolist()) for x in (ambiguity, share, stats.kl_ts))
    costs = tuple(choice_risk(student, teacher, text, **risk).tolist()) if risk else ()
    tokens = tuple(str(tokenizer.decode([token])) for token in text[1:].tolist())
    return TokenMap(tokens, ambiguous, soft_share, kl, costs)
