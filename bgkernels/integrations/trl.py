"""The loss in TRL's distillation trainers: off-policy or mixed (GKD), and on-policy.

Data, generation and arguments are TRL's, and ``beta`` keeps its meaning: it is the default
divergence. With ``loss={"routing": "soft"}`` the losses are TRL's own, to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import Trainer
from trl.experimental.gkd import GKDTrainer
from trl.trainer.distillation_trainer import DistillationTrainer

import bgkernels as bg
from bgkernels.integrations.causal_lm import IGNORE
from bgkernels.integrations.transformers import HybridLoss

OWN = {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask"}
OWN |= {"num_items_in_batch", "num_images", "num_tiles"}
"""What TRL puts into a generated batch for itself; the rest is for the model."""


class HybridGKDTrainer(HybridLoss, GKDTrainer):
    """TRL's ``GKDTrainer`` with the hybrid distillation loss and no logits.

    Args:
        *args, **kwargs: those of ``GKDTrainer``.
        loss: options of the loss, and ``target``, by name. Defaults: the divergence is
            ``generalized_jsd(beta)``; the hard label is the dataset's, or the teacher's argmax
            where some sequences are generated (``lmbda > 0``).

    Raises:
        HeadError: see :func:`bgkernels.integrations.heads.read`.

    Example:
        >>> trainer = HybridGKDTrainer(
        ...     student, teacher, GKDConfig("out", beta=0.5), train_dataset=data,
        ...     processing_class=tokenizer, loss={"routing": "entropy"},
        ... )  # doctest: +SKIP
    """

    def __init__(self, *args: Any, loss: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        options: dict[str, Any] = {
            "divergence": bg.divergences.generalized_jsd(self.beta),
            "target": "teacher_argmax" if self.lmbda else "labels",
        }
        self.distil(self.teacher_model, options | dict(loss or {}))

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The hybrid loss of the batch as it came, or as it was generated."""
        batch = {k: inputs[k] for k in ("input_ids", "attention_mask", "labels")}
        return Trainer.compute_loss(self, model, batch, return_outputs, num_items_in_batch)


class HybridOnPolicyTrainer(HybridLoss, DistillationTrainer):
    """TRL's ``DistillationTrainer`` (completions of the student) with the hybrid distillation loss.

    Args:
        *args, **kwargs: those of ``DistillationTrainer``.
        loss: options of the loss, and ``target``, by name. Defaults: the divergence is
            ``generalized_jsd(beta)`` at the temperature of generation, the hard label the
            teacher's argmax.

    Raises:
        HeadError: see :func:`bgkernels.integrations.heads.read`.

    Example:
        >>> trainer = HybridOnPolicyTrainer(
        ...     student, teacher, DistillationConfig("out", beta=1.0), train_dataset=prompts,
        ...     processing_class=tokenizer, loss={"routing": "entropy"},
        ... )  # doctest: +SKIP
    """

    def __init__(self, *args: Any, loss: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        options: dict[str, Any] = {
            "divergence": bg.divergences.generalized_jsd(self.beta),
            "temperature": self.temperature,
            "target": "teacher_argmax",
        }
        self.distil(self.teacher_model, options | dict(loss or {}))

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The hybrid loss of the completions, over the tokens of the whole step."""
        completions = inputs["completion_ids"]
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        prompts = torch.full_like(inputs["prompt_ids"], IGNORE)
        if model.training and inputs.get("num_items_in_batch") is not None:
            total = inputs["num_items_in_batch"].clamp(min=1)
            num_items_in_batch = total / self.accelerator.num_processes
        loss = model(
            **{key: value for key, value in inputs.items() if key not in OWN},
            input_ids=torch.cat([inputs["prompt_ids"], completions], 1),
            attention_mask=torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
            labels=torch.cat([prompts, completions.masked_fill(mask == 0, IGNORE)], 1),
            num_items_in_batch=num_items_in_batch,
        ).loss
        return (loss, None) if return_outputs else loss
