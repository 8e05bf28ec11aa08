"""Every token of a passage with what a pair of models makes of it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import bgkernels as bg
from bgkernels.training.analysis.risk import choice_risk
from bgkernels.training.evaluate import row_stats
from bgkernels.training.maps import TokenMap, hear
from bgkernels.training.models import CausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    voices = {
        name: hear(model, tokenizer, text, range(1, len(text)))
        for name, model in {"teacher": teacher, "student": student}.items()
    }
    return TokenMap(tokens, ambiguous, soft_share, kl, costs, voices=voices)
