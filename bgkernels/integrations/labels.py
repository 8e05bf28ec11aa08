"""Labels of a teacher that was asked before, in a trainer: no teacher runs beside the student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bgkernels.integrations.probe.tokens import IGNORE
from bgkernels.integrations.teachers import select
from bgkernels.labels import Document, LabelBatch, LabelDataset

FIELDS = ("indices", "logprobs", "entropy", "power_sum")


class CachedTeacher:
    """A :class:`~bgkernels.labels.LabelDataset` as the teacher of a trainer, and its collator.

    Args:
        dataset: the labels; also the trainer's dataset.
        tail: what becomes of the probability that was not kept; see :class:`bgkernels.TopKTeacher`.

    Example:
        >>> teacher = CachedTeacher(LabelDataset("runs/labels"))  # doctest: +SKIP
        >>> trainer = HybridDistillationTrainer(
        ...     student, args, teacher=teacher, data_collator=teacher.collate,
        ...     train_dataset=teacher.dataset,
        ... )  # doctest: +SKIP
    """

    columns = tuple(f"teacher_{name}" for name in FIELDS)

    def __init__(self, dataset: LabelDataset, tail: str = "bucket") -> None:
        self.dataset, self.tail = dataset, tail

    def collate(self, documents: Sequence[Document]) -> dict[str, Tensor]:
        """A batch for a causal language model, with the labels in columns of their own."""
        batch = self.dataset.collate(documents)
        found = {
            "input_ids": batch.tokens,
            "attention_mask": batch.mask.long(),
            "labels": torch.nn.functional.pad(batch.target[:, :-1], (1, 0), value=IGNORE),
        }
        own = {f"teacher_{name}": getattr(batch, name) for name in FIELDS}
        return found | {name: x for name, x in own.items() if x is not None}

    def __call__(self, inputs: Mapping[str, Any], rows: Tensor | None) -> Any:
        """The teacher of the positions ``rows`` of the flattened batch."""
        columns = {name: inputs.get(f"teacher_{name}") for name in FIELDS}
        chosen: dict[str, Any] = {
            n: None if x is None else select(x, rows) for n, x in columns.items()
        }
        tokens = inputs["input_ids"]
        batch = LabelBatch(
            tokens, tokens, tokens, info=self.dataset.info, match=self.dataset.match, **chosen
        )
        return batch.teacher(self.tail)
