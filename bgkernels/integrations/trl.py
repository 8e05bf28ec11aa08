"""The loss in TRL's trainers: fine-tuning on given answers, mixed (GKD), and on-policy.

Data, generation and arguments are TRL's, and ``beta`` keeps its meaning: it is the default
divergence. With ``loss={"routing": "soft"}`` the losses are TRL's own, to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from transformers import Trainer
from trl.experimental.gkd import GKDTrainer
from trl.trainer.distillation_trainer import DistillationTrainer
from trl.trainer.sft_trainer import SFTTrainer

import bgkernels as bg
from bgkernels.integrations.probe.tokens import IGNORE
from bgkernels.integrations.trainers.arguments import the_teacher
from bgkernels.integrations.transformers import HybridLoss
from bgkernels.integrations.translated import TranslatedTeacher

OWN = {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask"}
OWN |= {"num_items_in_batch", "num_images", "num_tiles"}
"""What TRL puts into a generated batch for itself; the rest is for the model."""


class HybridSFTTrainer(HybridLoss, SFTTrainer):
    """TRL's ``SFTTrainer`` with the hybrid distillation loss.

    Everything else is TRL's: chat templates, completion-only and assistant-only losses, packing,
    PEFT, a router's loss with ``router_aux_loss_coef``, evaluation. Of Liger's kernels only those
    of layers are used.

    Args:
        *args, **kwargs: those of ``SFTTrainer``.
        teacher: see :func:`bgkernels.integrations.causal_lm.attach`.
        teacher_model: another name for ``teacher``, that of TRL's other trainers.
        teacher_tokenizer: of the teacher, where it is not the student's (``processing_class``).
        loss: options of the loss, and ``target``, by name.

    Raises:
        HeadError: see :func:`bgkernels.integrations.causal_lm.attach`.
        ValueError: an argument that needs logits, or ``loss_type="dft"``.

    Example:
        >>> trainer = HybridSFTTrainer(
        ...     student, SFTConfig("out"), teacher=teacher, train_dataset=data,
        ...     processing_class=tokenizer, loss={"routing": "entropy"},
        ... )  # doctest: +SKIP
    """

    def __init__(
        self,
        *args: Any,
        teacher: Any = None,
        teacher_model: Any = None,
        teacher_tokenizer: Any = None,
        loss: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        teacher = the_teacher(teacher, teacher_model)
        super().__init__(*args, **kwargs)
        kind = getattr(self.args, "loss_type", "nll")
        if kind != "nll":
            raise ValueError(
                f"`loss_type` must be 'nll', since the loss is the hybrid one; got {kind!r}. "
                "Choose the hybrid loss by the argument `loss`"
            )
        self.distil(teacher, loss or {}, teacher_tokenizer)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The hybrid loss over the tokens of the whole step, and a router's loss as TRL adds it."""
        batch = {**inputs, "num_items_in_batch": num_items_in_batch}
        if self.aux_loss_enabled:
            batch |= {"output_router_logits": True, "extra_losses": False}
        outputs = model(**batch)
        loss = outputs["loss"]
        whole_step = num_items_in_batch is not None
        if whole_step and self.args.average_tokens_across_devices:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        mode = "train" if model.training else "eval"
        if self.aux_loss_enabled:
            aux = outputs["aux_loss"]
            steps = self.current_gradient_accumulation_steps if whole_step else 1
            loss = loss + self.router_aux_loss_coef * aux.to(loss.device) / steps
            self._metrics[mode]["aux_loss"].append(
                float(self.accelerator.reduce(aux.detach(), "mean"))
            )
        if model.training:
            read = inputs["attention_mask"] if "attention_mask" in inputs else inputs["input_ids"]
            tokens = read.sum() if "attention_mask" in inputs else torch.tensor(read.numel())
            total = self.accelerator.reduce(tokens.to(loss.device), "sum")
            self._total_train_tokens += int(total) // self.get_tp_size()
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        return (loss, outputs) if return_outputs else loss

    def get_train_dataloader(self) -> Any:
        """TRL's, whose batches tell where their labels are."""
        with self._rows_counted():
            return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """TRL's, whose batches tell where their labels are."""
        with self._rows_counted():
            return super().get_eval_dataloader(eval_dataset)

    @contextmanager
    def _rows_counted(self) -> Iterator[None]:
        collator = self.data_collator
        self.data_collator = self.collating(collator)
        try:
            yield
        finally:
            self.data_collator = collator


class HybridGKDTrainer(HybridLoss, GKDTrainer):
    """TRL's ``GKDTrainer`` with the hybrid distillation loss and no logits.

    Args:
        *args, **kwargs: those of ``GKDTrainer``.
        loss: options of the loss, and ``target``, by name. Defaults: the divergence is
            ``generalized_jsd(beta)``; the hard label is the dataset's, or the teacher's argmax
            where some sequences are generated (``lmbda > 0``).

    Raises:
        HeadError: see :func:`bgkernels.integrations.heads.read`.
        ValueError: ``teacher_tokenizer``, which the other trainers take.

    Example:
        >>> trainer = HybridGKDTrainer(
        ...     student, teacher, GKDConfig("out", beta=0.5), train_dataset=data,
        ...     processing_class=tokenizer, loss={"routing": "entropy"},
        ... )  # doctest: +SKIP
    """

    def __init__(
        self,
        *args: Any,
        loss: Mapping[str, Any] | None = None,
        teacher_tokenizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if teacher_tokenizer is not None:
            raise ValueError(
                "`teacher_tokenizer`: HybridGKDTrainer mixes given and generated text, whose hard "
                "labels differ where the teacher has another tokenizer; use HybridSFTTrainer for "
                "the one, or HybridOnPolicyTrainer for the other"
            )
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
        teacher_tokenizer: of the teacher, where it is not the student's (``processing_class``).
            Then there are soft labels alone, at the positions that have one; the sum is divided by
            the number of all tokens.

    Raises:
        HeadError: see :func:`bgkernels.integrations.heads.read`.
        ValueError: two tokenizers and another ``routing`` than ``"soft"``.

    Example:
        >>> trainer = HybridOnPolicyTrainer(
        ...     student, teacher, DistillationConfig("out", beta=1.0), train_dataset=prompts,
        ...     processing_class=tokenizer, loss={"routing": "entropy"},
        ... )  # doctest: +SKIP
    """

    def __init__(
        self,
        *args: Any,
        loss: Mapping[str, Any] | None = None,
        teacher_tokenizer: Any = None,
        **kwargs: Any,
    ) -> None:
        given = signature(DistillationTrainer).bind(*args, **kwargs).arguments
        own = {"target": "teacher_argmax"}
        teacher = None
        if teacher_tokenizer is not None:  # TRL takes no teacher of another vocabulary, but none
            teacher = the_teacher(None, given.pop("teacher_model", None))
            own = {"target": "labels", "routing": "soft"}
        super().__init__(**given)
        options: dict[str, Any] = {
            "divergence": bg.divergences.generalized_jsd(self.beta),
            "temperature": self.temperature,
            **own,
            **(loss or {}),
        }
        self.distil(teacher or self.teacher_model, options, teacher_tokenizer)
        if teacher is not None and self.attachment.policy.name != "soft":
            raise ValueError(
                "`routing` must be 'soft' where the student writes the text and the teacher has "
                f"another tokenizer; got {self.attachment.policy.name!r}: a hard label would be "
                "the student's own token"
            )

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
        batch = {
            **{key: value for key, value in inputs.items() if key not in OWN},
            "input_ids": torch.cat([inputs["prompt_ids"], completions], 1),
            "attention_mask": torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
            "labels": torch.cat([prompts, completions.masked_fill(mask == 0, IGNORE)], 1),
        }
        if isinstance(source := self.attachment.teacher, TranslatedTeacher):
            batch = source.only_soft(batch)
        loss = model(**batch, num_items_in_batch=num_items_in_batch).loss
        return (loss, None) if return_outputs else loss
