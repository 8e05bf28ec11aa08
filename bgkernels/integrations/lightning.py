"""A Lightning module that distils one causal language model into another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from bgkernels.integrations import measures
from bgkernels.integrations.causal_lm import attach
from bgkernels.integrations.probe.watch import NotDistillingError
from bgkernels.integrations.teachers import ModelTeacher
from bgkernels.integrations.translated import TranslatedTeacher

MakeOptimizer = Callable[[Iterable[Parameter]], Optimizer]


class HybridDistillationModule(LightningModule):
    """Trains ``student`` by the hybrid distillation loss; a batch is what its forward takes.

    The loss is logged at each step, its parts at the end of each epoch. The teacher is no part of
    the module: it is neither trained, nor moved by strategies, nor in a checkpoint. The loss of a
    batch is the mean over its own tokens, and Lightning gives accumulated batches equal weight; to
    weigh them by tokens, put ``num_items_in_batch`` into each: the tokens of the step divided by
    the number of batches.

    Args:
        student, teacher: see :func:`bgkernels.integrations.causal_lm.attach`.
        tokenizer, teacher_tokenizer: of both, where they are two, as for ``attach``; the teacher's
            tokens are made of a batch before it is moved.
        loss: options of the loss, and ``target``, by name.
        optimizer: makes the optimiser of the parameters that are trained.

    Raises:
        HeadError: see :func:`bgkernels.integrations.heads.read`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> size = dict(hidden_size=8, intermediate_size=8, num_attention_heads=2, vocab_size=32)
        >>> config = LlamaConfig(num_hidden_layers=1, **size)
        >>> student, teacher = LlamaForCausalLM(config), LlamaForCausalLM(config)
        >>> module = HybridDistillationModule(student, teacher, loss={"routing": "confidence"})
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        *,
        tokenizer: Any = None,
        teacher_tokenizer: Any = None,
        loss: Mapping[str, Any] | None = None,
        optimizer: MakeOptimizer = torch.optim.AdamW,
    ) -> None:
        super().__init__()
        self.student = student
        both = {"tokenizer": tokenizer, "teacher_tokenizer": teacher_tokenizer}
        self.attachment = attach(student, teacher, **both, **(loss or {}))
        self.make_optimizer = optimizer

    def forward(self, **batch: Tensor) -> Any:
        """The student's outputs."""
        return self.student(**batch)

    def on_fit_start(self) -> None:
        """Put the teacher where the student is."""
        self._place_teacher()

    def on_validation_start(self) -> None:
        """Put the teacher where the student is."""
        self._place_teacher()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Add what a teacher with another tokenizer reads."""
        source = self.attachment.teacher
        return source.read(batch) if isinstance(source, TranslatedTeacher) else batch

    def training_step(self, batch: Mapping[str, Tensor], index: int) -> Tensor:
        """The loss of a batch; a curriculum is told the step."""
        if hasattr(self.attachment.policy, "step"):
            self.attachment.policy.step = self.global_step
        loss = self._loss(batch)
        self.log("loss", loss.detach(), prog_bar=True)
        return loss

    def validation_step(self, batch: Mapping[str, Tensor], index: int) -> None:
        """Log the loss of held-out data."""
        self.log("val_loss", self._loss(batch), prog_bar=True, sync_dist=True)

    def on_train_epoch_end(self) -> None:
        """Log the parts of the loss."""
        self._log_parts(training=True, prefix="")

    def on_validation_epoch_end(self) -> None:
        """Log the parts of the loss of held-out data."""
        self._log_parts(training=False, prefix="val_")

    def configure_optimizers(self) -> Optimizer:
        """The optimiser of the parameters that are trained."""
        return self.make_optimizer(p for p in self.parameters() if p.requires_grad)

    def _loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        loss: Tensor | None = self(**batch).loss
        if loss is None:
            raise NotDistillingError(
                f"the batch has no `labels` (it has {', '.join(batch)}), so there is no loss, and "
                "the teacher is not used; let the collator add them"
            )
        return loss

    def _log_parts(self, training: bool, prefix: str) -> None:
        sums = self.attachment.measures[training].pop()
        if sums is not None:
            found = measures.means(sums)
            self.log_dict({prefix + k: v for k, v in found.items()}, sync_dist=True)

    def _place_teacher(self) -> None:
        if isinstance(self.attachment.teacher, ModelTeacher):
            self.attachment.teacher.to(self.device)
