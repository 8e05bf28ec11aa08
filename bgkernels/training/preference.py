"""Direct preference optimisation in the training loop."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from bgkernels.integrations.dpo import dpo_loss, linear_sequence_log_probs
from bgkernels.training.models import CausalLM
from bgkernels.training.sharding import whole
from bgkernels.training.tokens import IGNORED, Batch
from bgkernels.training.writing import Numbered


def sequence_log_probs(model: CausalLM, batch: Batch, memory_budget: int | None = None) -> Tensor:
    """``(sequences,)`` log-probabilities of the labels of each sequence, in nats, fp64.

    Args:
        model: whose they are.
        batch: sequences, each with a label.
        memory_budget: bytes of temporaries; None: the library's default.
    """

    def read() -> Tensor:
        hidden, head = model.hidden(batch.tokens[:, :-1]), model.head
        return linear_sequence_log_probs(
            hidden,
            head.weight.to(hidden.dtype),  # another one under autocast
            batch.labels,
            ignore_index=IGNORED,
            linear_bias=None if head.bias is None else head.bias.to(hidden.dtype),
            logit_scale=model.logit_scale,
            logit_softcap=model.logit_softcap,
            memory_budget=memory_budget,
        )

    return whole([model], read)


@dataclass(frozen=True)
class Preference:
    """An objective of the loop: DPO, and a little of the chosen answers' cross-entropy.

    The second term keeps the chosen answers from becoming improbable together with the rejected
    ones (Pang et al. 2024; Llama 3 has it with the weight 0.2).

    Args:
        policy: the model that learns.
        reference: what it was before, frozen.
        beta: what leaving the reference costs.
        hard_weight: of that cross-entropy, in nats a token.
        accumulate: batches of a step.
        memory_budget: bytes of temporaries; None: the library's default.
    """

    policy: CausalLM
    reference: CausalLM
    beta: float
    hard_weight: float = 0.2
    accumulate: int = 1
    memory_budget: int | None = None

    def rewrite(self, batches: list[Batch], numbers: Iterable[int], step: int) -> list[Batch]:
        """The batches themselves."""
        return batches

    def ask(self, batches: Numbered, numbers: Iterable[int], step: int) -> None:
        """Nothing: both models are here."""

    def __call__(self, batch: Batch, step: int, items: Tensor) -> Tensor:
        """Scalar loss of chosen sequences, then as many rejected ones."""
        with torch.no_grad():
            before = sequence_log_probs(self.reference, batch, self.memory_budget)
        now = sequence_log_probs(self.policy, batch, self.memory_budget)
        tokens = (batch.labels[: len(now) // 2] != IGNORED).sum()
        cross_entropy = -now.chunk(2)[0].sum() / tokens
        loss = dpo_loss(now, before, beta=self.beta) + self.hard_weight * cross_entropy
        return loss / self.accumulate
