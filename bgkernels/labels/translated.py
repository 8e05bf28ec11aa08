"""Labels of a teacher that has another tokenizer than the texts, which are a student's."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import bgkernels as bg
from bgkernels.labels.errors import LabelError
from bgkernels.labels.sources import Answer, LabelSource, LoadedTeacher, Placed
from bgkernels.training.models import CausalLM
from bgkernels.vocabularies import Translator, VocabularyError, agreeing, match

SAMPLE = 200_000
"""Tokens of the texts on which pairs must be used alike."""


class TranslatedSource:
    """A source of labels that reads the texts of a student in tokens of its own.

    Args:
        source: the teacher.
        translate: from the student's tokens to the teacher's.

    Attributes:
        soft, tokens: how many tokens have been labelled, of how many.
    """

    def __init__(self, source: CausalLM | LabelSource, translate: Translator) -> None:
        self.source = LoadedTeacher(source) if isinstance(source, CausalLM) else source
        self.name, self.weights = self.source.name, self.source.weights
        self.vocab, self.whole = self.source.vocab, self.source.whole
        self.translate, self.match = translate, translate.match
        self.soft = self.tokens = 0

    @classmethod
    def of(
        cls,
        source: CausalLM | LabelSource,
        documents: Sequence[Tensor],
        student_tokenizer: Any,
        teacher_tokenizer: Any,
    ) -> TranslatedSource:
        """A source whose pairs of tokens are those that both tokenizers use alike in the texts.

        Args:
            source: the teacher.
            documents: ``(length,)`` tokens of the student.
            student_tokenizer: made them.
            teacher_tokenizer: of the teacher.

        Raises:
            VocabularyError: the tokenizers cannot be matched.
        """
        found = match(student_tokenizer, teacher_tokenizer)
        texts, count = [], 0
        for document in documents:
            if count >= SAMPLE:
                break
            texts.append(torch.as_tensor(document))
            count += len(document)
        ids = pad_sequence(texts, True, -1) if texts else torch.empty(0, 0, dtype=torch.int64)
        found = agreeing(found, ids, Translator(found, teacher_tokenizer)(ids).ids)
        return cls(source, Translator(found, teacher_tokenizer))

    def answers(self, shards: Iterable[list[Tensor]], size: int) -> Iterator[Placed]:
        """What the teacher says of each batch, at the tokens of the student that it speaks of."""
        places: deque[Tensor] = deque()

        def texts() -> Iterator[list[Tensor]]:
            for shard in shards:
                ids, positions = self._read(shard)
                for start in range(0, len(shard), size):
                    part = slice(start, start + size)
                    places.append(_rows(positions[part], ids[part]))
                yield ids

        for answer in self.source.answers(texts(), size):
            assert not isinstance(answer, Placed)
            rows = places.popleft()
            yield Placed(_picked(answer, rows[rows >= 0]), rows >= 0)

    def _read(self, shard: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The teacher's tokens of each text, and for each of the student's its place there or -1.

        Raises:
            LabelError: no token of the texts has a soft label.
        """
        made = self.translate(pad_sequence(shard, True, -1))
        try:
            made.alignment.check()
        except VocabularyError as error:
            raise LabelError(f"--student-tokenizer: {error}") from error
        self.tokens += made.alignment.tokens
        self.soft += int((made.alignment.positions >= 0).sum())
        first = torch.arange(len(shard))[:, None] * made.ids.shape[1]
        places = torch.where(made.alignment.positions >= 0, made.alignment.positions - first, -1)
        own = [place[: len(text)] for place, text in zip(places, shard, strict=True)]
        return [row[row >= 0] for row in made.ids], own


def _rows(places: Sequence[Tensor], texts: Sequence[Tensor]) -> Tensor:
    """Places in each text as rows of all of them, one after the other."""
    starts = torch.tensor([0, *map(len, texts)]).cumsum(0).tolist()
    moved = [torch.where(x >= 0, x + start, -1) for x, start in zip(places, starts, strict=False)]
    return torch.cat(moved)


def _picked(answer: Answer, rows: Tensor) -> Answer:
    if isinstance(answer, bg.LinearTeacher):
        return replace(answer, hidden=answer.hidden[rows.to(answer.hidden.device)])
    return bg.SoftLabels(**{name: x[rows.to(x.device)] for name, x in answer.tensors().items()})


def spread(labels: bg.SoftLabels, at: Tensor) -> bg.SoftLabels:
    """Labels as those of more tokens, of which the others have none; samples are left out.

    Args:
        labels: of so many tokens as are marked.
        at: ``(tokens,)`` bool.
    """
    fill = {"indices": -1, "logprobs": -inf}
    kept = {name: x.cpu() for name, x in labels.tensors().items() if name != "sample"}
    for name, x in kept.items():
        whole = x.new_full((len(at), *x.shape[1:]), fill.get(name, 0))
        whole[at] = x
        kept[name] = whole
    return bg.SoftLabels(**kept)
