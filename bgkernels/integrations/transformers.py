"""The loss in the ``Trainer`` of ``transformers``.

For a ``Trainer`` that is a subclass already, :func:`bgkernels.integrations.causal_lm.attach` is
enough: call it on the model first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from bgkernels.integrations import heads, measures, zero3
from bgkernels.integrations.causal_lm import Attachment, attach
from bgkernels.integrations.probe.tokens import IGNORE
from bgkernels.integrations.probe.watch import NotDistillingError, never_asked
from bgkernels.integrations.teachers import ModelTeacher
from bgkernels.integrations.trainers.arguments import (
    check_arguments,
    cuts_no_batches,
    the_teacher,
)
from bgkernels.integrations.translated import TranslatedTeacher


class LossRows:
    """A collator that also tells where the labels are, while they are still on the CPU.

    The positions go with the batch as ``loss_rows``, so that choosing the rows of the loss does not
    wait for the device.

    Args:
        collator: makes a batch with ``labels``, or with ``shift_labels`` aligned with the inputs.

    Example:
        >>> collate = LossRows(lambda items: {"labels": torch.tensor(items)})
        >>> collate([[-100, 5, 6], [-100, -100, 7]])["loss_rows"]
        tensor([0, 1, 4])
    """

    def __init__(self, collator: Callable[[Any], Any]) -> None:
        self.collator = collator

    def __call__(self, items: Any) -> Any:
        """The collator's batch and ``loss_rows``, ``(n,)`` int64."""
        batch = self.collator(items)
        if isinstance(batch.get("shift_labels"), Tensor):
            used = batch["shift_labels"] != IGNORE
        elif isinstance(batch.get("labels"), Tensor):
            used = torch.nn.functional.pad(batch["labels"][..., 1:] != IGNORE, (0, 1))
        else:
            return batch
        return {**batch, "loss_rows": used.flatten().nonzero().squeeze(1)}


def asked_ahead(batches: Iterator[Any], attachment: Attachment) -> Iterator[Any]:
    """Batches; a teacher that can work ahead is asked about each before it is taken."""
    waiting: deque[Any] = deque()
    ahead = getattr(attachment.teacher, "ahead", 0)
    for batch in batches:
        attachment.ask(batch)
        waiting.append(batch)
        if len(waiting) > ahead:
            yield waiting.popleft()
    yield from waiting


class HybridLoss(Trainer):
    """What a trainer needs beside the loss itself, put in front of a subclass of ``Trainer``.

    The parts of the loss are logged with it, by the names of
    :class:`~bgkernels.integrations.measures.Measures`; a curriculum follows the trainer's step.
    """

    attachment: Attachment
    _asking: tuple[Any, Iterator[Any]] = (None, iter(()))

    def distil(
        self, teacher: Any, options: Mapping[str, Any], teacher_tokenizer: Any = None
    ) -> None:
        """Attach the loss to the trainer's model, and put the teacher beside it.

        Args:
            teacher: see :func:`bgkernels.integrations.causal_lm.attach`.
            options: of the loss.
            teacher_tokenizer: of a teacher with another tokenizer than ``processing_class``.
        """
        check_arguments(self)
        if self.args.n_gpu > 1:
            raise ValueError(
                "several GPUs in one process (nn.DataParallel) are not supported; start the script "
                "with torchrun or accelerate launch, or set CUDA_VISIBLE_DEVICES to one"
            )
        model = self.accelerator.unwrap_model(self.model)
        if teacher_tokenizer is not None:
            if self.processing_class is None:
                raise TypeError("`teacher_tokenizer` needs the student's: pass `processing_class`")
            tokenizers = {"tokenizer": self.processing_class}
            options = {**options, **tokenizers, "teacher_tokenizer": teacher_tokenizer}
        self.attachment = attach(model, teacher, **options)
        self.model_accepts_loss_kwargs = True
        source = self.attachment.teacher
        if isinstance(source, ModelTeacher):
            plugin: Any = getattr(self.accelerator.state, "deepspeed_plugin", None)
            if plugin and zero3.away(heads.linear(heads.causal_lm(source.model))):
                source.model = zero3.engine(source.model, plugin.deepspeed_config)
            source.to(self.accelerator.device)

    def collating(self, collator: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """A collator that tells what the loss needs while batches are on the CPU."""
        source = self.attachment.teacher
        if isinstance(source, TranslatedTeacher):
            collator = source.collator(collator)
        return LossRows(collator) if cuts_no_batches(self) else collator

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any) -> Any:
        """The batches of a step, while a served teacher reads those after it."""
        if self._asking[0] is not epoch_iterator:
            self._asking = epoch_iterator, asked_ahead(epoch_iterator, self.attachment)
        return super().get_batch_samples(self._asking[1], *args)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """A step of the trainer; a curriculum is told which."""
        if hasattr(self.attachment.policy, "step"):
            self.attachment.policy.step = self.state.global_step
        loss: Tensor = super().training_step(*args, **kwargs)
        if not self.attachment.asked:
            raise NotDistillingError(never_asked())
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, and with a loss its parts, averaged over the tokens of all processes."""
        for name, training in (("loss", True), ("eval_loss", False)):
            sums = self.attachment.measures[training].pop() if name in logs else None
            if sums is not None:
                found = measures.means(self.accelerator.reduce(sums, "sum"))
                logs |= {name.removesuffix("loss") + key: value for key, value in found.items()}
        super().log(logs, *args, **kwargs)


class HybridDistillationTrainer(HybridLoss):
    """A ``Trainer`` whose loss is the hybrid distillation loss.

    Everything else is the ``Trainer``'s: arguments, gradient accumulation, mixed precision,
    gradient checkpointing, DDP, FSDP and DeepSpeed, PEFT models, evaluation, checkpoints. The
    dataset needs ``labels``, as for any causal language model; positions with -100 cost no head
    product. The teacher is neither trained nor saved.

    Args:
        model: the student.
        args: ``TrainingArguments``.
        teacher: see :func:`bgkernels.integrations.causal_lm.attach`.
        teacher_model: another name for ``teacher``, TRL's.
        teacher_tokenizer: of the teacher, where it is not the student's (``processing_class``).
        loss: options of the loss, and ``target``, by name.
        **kwargs: the ``Trainer``'s other arguments.

    Raises:
        HeadError: see :func:`bgkernels.integrations.heads.read`.
        TypeError, ValueError: an option that is unknown or out of range, by name.

    Example:
        >>> trainer = HybridDistillationTrainer(
        ...     student, args, teacher=teacher, train_dataset=data,
        ...     loss={"routing": "entropy", "temperature": 2.0},
        ... )  # doctest: +SKIP
    """

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *,
        teacher: Any = None,
        teacher_model: Any = None,
        teacher_tokenizer: Any = None,
        loss: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        teacher = the_teacher(teacher, teacher_model)
        super().__init__(model, args, **kwargs)
        self.distil(teacher, loss or {}, teacher_tokenizer)
        self.data_collator = self.collating(self.data_collator)

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the columns that the teacher reads."""
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        wanted = getattr(self.attachment.teacher, "columns", ())
        columns += [name for name in wanted if name not in columns]
