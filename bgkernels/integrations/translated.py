"""A teacher with a tokenizer of its own: it reads the student's text in its own tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import bgkernels as bg
from bgkernels.integrations import heads
from bgkernels.integrations.probe.tokens import IGNORE
from bgkernels.integrations.teachers import ModelTeacher, select
from bgkernels.vocabularies import Alignment, Translator, VocabularyMatch, match

IDS, MASK, POSITIONS = "teacher_input_ids", "teacher_attention_mask", "teacher_positions"


class TranslatedTeacher(ModelTeacher):
    """A causal language model as teacher of a student that has another tokenizer.

    The text of each batch is read from the student's tokens and encoded anew; special tokens are
    put in their places by their role. Tokens at which both models have read the same bytes have a
    soft label, on the tokens that both know; the others learn from the hard label alone.

    Args:
        model: see :class:`~bgkernels.integrations.teachers.ModelTeacher`.
        tokenizer: of the student, or the :class:`~bgkernels.vocabularies.VocabularyMatch` of both.
        teacher_tokenizer: of the teacher.
        rest: what becomes of tokens that only one model knows, as for
            :class:`bgkernels.MatchedTeacher`.

    Attributes:
        aligned: how many tokens were read, how many of them had a soft label, and in how many
            sequences the bytes of the tokenizers differed.

    Raises:
        HeadError: see :class:`~bgkernels.integrations.teachers.ModelTeacher`.
        VocabularyError: the tokenizers cannot be matched, or the teacher's head lacks columns.

    Example:
        >>> teacher = TranslatedTeacher("big-model", tokenizer, big_tokenizer)  # doctest: +SKIP
        >>> attach(student, teacher)  # doctest: +SKIP
    """

    columns: tuple[str, ...] = (IDS, MASK, POSITIONS)

    def __init__(
        self, model: Any, tokenizer: Any, teacher_tokenizer: Any, rest: str = "bucket"
    ) -> None:
        super().__init__(model)
        known = isinstance(tokenizer, VocabularyMatch)
        self.match = tokenizer if known else match(tokenizer, teacher_tokenizer)
        head = heads.linear(heads.causal_lm(self.model))
        self.match.check_heads(teacher=head.out_features)
        self.translate = Translator(self.match, teacher_tokenizer)
        self.rest, self.aligned = rest, {"tokens": 0, "soft": 0, "differing": 0}
        self._pairs = self.match.pairs

    def collator(self, collate: Callable[[Any], Any]) -> Callable[[Any], dict[str, Any]]:
        """A collator whose batches have the teacher's tokens too, while they are on the CPU.

        Args:
            collate: makes a batch with ``input_ids``.
        """
        return lambda items: self.read(collate(items))

    def read(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch with the teacher's tokens, and for each position the teacher's in its row or -1.

        Raises:
            ValueError: no ``input_ids``, or several documents in a row, apart by their
                ``position_ids``.
            VocabularyError: no position of the batch agrees.
        """
        ids = batch.get("input_ids")
        if not isinstance(ids, Tensor):
            raise ValueError(
                "a teacher with another tokenizer reads the text from `input_ids`, and the batch "
                f"has {', '.join(batch)}"
            )
        _check_whole(batch)
        mask = batch.get("attention_mask")
        real = ids if mask is None else torch.where(mask.bool(), ids, -1)
        made = self.translate(real.cpu())
        made.alignment.check()
        self._note(made.alignment)
        rows, width = made.ids.shape
        first = torch.arange(rows)[:, None] * width
        places = made.alignment.positions
        own = {
            IDS: made.ids.clamp(min=0),
            MASK: (made.ids >= 0).long(),
            POSITIONS: torch.where(places >= 0, places - first, -1),
        }
        return {**batch, **{name: x.to(ids.device) for name, x in own.items()}}

    def only_soft(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch that is read, in which only positions with a soft label have a hard one.

        Text that the student has written has nothing to teach it where the teacher is silent. A
        column that pads its head, should it have drawn it, stands for no text.

        Args:
            batch: with ``input_ids``, ``attention_mask`` and ``labels``.
        """
        mask = batch["attention_mask"]
        text = mask * (batch["input_ids"] < self.match.student.size)
        read = {**self.read({**batch, "attention_mask": text}), "attention_mask": mask}
        silent = torch.nn.functional.pad(read[POSITIONS][:, :-1] < 0, (1, 0))
        return {**read, "labels": read["labels"].masked_fill(silent, IGNORE)}

    def __call__(  # type: ignore[override]
        self, inputs: Mapping[str, Any], rows: Tensor | None
    ) -> bg.MatchedTeacher:
        """The teacher of the positions ``rows`` of the student's flattened batch."""
        if IDS not in inputs:
            inputs = self.read(inputs)
        ids, places = inputs[IDS], inputs[POSITIONS]
        first = torch.arange(len(ids), device=ids.device)[:, None] * ids.shape[1]
        chosen = select(torch.where(places >= 0, places + first, -1), rows)
        soft = chosen >= 0
        teacher = super().__call__({"input_ids": ids, "attention_mask": inputs[MASK]}, chosen[soft])
        device = teacher.hidden.device
        number = soft.flatten().cumsum(0).view_as(soft) - 1
        if self._pairs.device != device:
            self._pairs = self._pairs.to(device)
        return bg.MatchedTeacher(
            teacher, self._pairs, self.rest, torch.where(soft, number, -1).to(device)
        )

    def _note(self, found: Alignment) -> None:
        soft, odd = (found.positions >= 0).sum(), (found.differing > 0).sum()
        for name, count in (("tokens", found.tokens), ("soft", soft), ("differing", odd)):
            self.aligned[name] += int(count)


def _check_whole(batch: Mapping[str, Any]) -> None:
    """Refuse rows of several documents that attention keeps apart."""
    places = batch.get("position_ids")
    if isinstance(places, Tensor) and places.dim() == 2 and (places.diff(dim=1) < 0).any():
        raise ValueError(
            "`position_ids` begin again within a row: packed documents, which a teacher with "
            "another tokenizer would read as one text; train without packing"
        )
