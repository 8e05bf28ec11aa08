"""Where the labels of whole texts come from: a teacher that is loaded, or another source."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import bgkernels as bg
from bgkernels.labels.errors import LabelError
from bgkernels.training.models import CausalLM
from bgkernels.vocabularies import VocabularyMatch

Answer = bg.LinearTeacher | bg.SoftLabels
"""The teacher at all tokens of a batch of texts, one after the other, or its labels there."""


class Placed(NamedTuple):
    """An answer at some of the tokens of a batch of texts.

    Args:
        answer: of as many rows.
        at: ``(tokens,)`` bool, where it is.
    """

    answer: Answer
    at: Tensor


class LabelSource(Protocol):
    """Labels texts, in order."""

    @property
    def name(self) -> str:
        """Of the teacher."""

    @property
    def weights(self) -> str:
        """Digest of its weights; empty where unknown."""

    @property
    def vocab(self) -> int:
        """Its columns."""

    @property
    def match(self) -> VocabularyMatch | None:
        """Of the vocabulary of the texts with the teacher's; None: they are one."""

    @property
    def whole(self) -> bool:
        """Whether answers are whole distributions, with entropy, power sum and samples.

        Else they are log-probabilities of some columns, at temperature 1.
        """

    def answers(self, shards: Iterable[list[Tensor]], size: int) -> Iterator[Answer | Placed]:
        """What the teacher says of each batch of ``size`` texts, shard by shard.

        Args:
            shards: ``(length,)`` tokens of the texts of each.
            size: texts of a batch; the last of a shard may have fewer.
        """


class LoadedTeacher:
    """A model in this process, which reads a batch at a time.

    Args:
        model: the teacher.
    """

    match = None
    whole = True

    def __init__(self, model: CausalLM) -> None:
        self.model, self.vocab, self.weights = model, model.vocab, model.digest
        self.name = str(getattr(model.network, "name_or_path", ""))

    @torch.no_grad()
    def answers(self, shards: Iterable[list[Tensor]], size: int) -> Iterator[bg.LinearTeacher]:
        """Hidden states, and the head."""
        for texts in shards:
            self._check_length(max(map(len, texts)))
            apart = _padding_changes(self.model, texts)
            for start in range(0, len(texts), size):
                yield _teacher(self.model, texts[start : start + size], apart)

    def _check_length(self, longest: int) -> None:
        if self.model.limit is not None and longest > self.model.limit:
            raise LabelError(
                f"the teacher takes at most {self.model.limit} tokens, and a text has {longest} of "
                "its own; lower --max-length"
            )


def _padding_changes(model: CausalLM, texts: list[Tensor]) -> bool:
    """Whether the labels of a short text depend on how long the text beside it is.

    So it is where positions are encoded by the longest sequence of a batch (longrope, dynamic NTK).
    It is tried with the shortest and the longest text.
    """
    texts = sorted((text for text in texts if len(text)), key=len)
    if not texts or len(texts[0]) == len(texts[-1]):
        return False
    shortest, longest = texts[0], texts[-1]
    alone, padded = (
        model.hidden(tokens.to(model.device)[None])[0, : len(shortest)].float()
        for tokens in (shortest, torch.cat([shortest, longest[len(shortest) :]]))
    )
    tolerance = 1e-3 if model.head.weight.dtype == torch.float32 else 3e-2
    return bool((alone - padded).abs().max() > tolerance * alone.abs().max())


def _teacher(model: CausalLM, texts: list[Tensor], apart: bool) -> bg.LinearTeacher:
    """The model's hidden states of all tokens, one after the other, and its head.

    Args:
        model: the teacher.
        texts: of one batch.
        apart: texts of different lengths do not share a forward.
    """
    if apart and len({len(text) for text in texts}) > 1:
        parts: dict[int, Tensor] = {}
        for length in {len(text) for text in texts}:
            equal = [i for i, text in enumerate(texts) if len(text) == length]
            found = _teacher(model, [texts[i] for i in equal], apart=False)
            parts |= dict(zip(equal, found.hidden.tensor_split(len(equal)), strict=True))
        hidden = torch.cat([parts[i] for i in range(len(texts))])
        return replace(found, hidden=hidden)
    tokens = pad_sequence(texts, batch_first=True)  # causal: what follows the end is not seen
    if tokens.shape[1] == 0:
        tokens = tokens.new_zeros(len(texts), 1)
    lengths = torch.tensor([len(text) for text in texts])
    inside = torch.arange(tokens.shape[1]) < lengths[:, None]
    device = model.head.weight.device
    whole = model.as_teacher(tokens.to(device))
    return bg.LinearTeacher(
        whole.hidden[inside.to(device)],
        whole.weight,
        whole.bias,
        whole.logit_scale,
        whole.logit_softcap,
    )
