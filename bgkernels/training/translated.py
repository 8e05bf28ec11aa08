"""A teacher that reads and writes the student's text in tokens of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import bgkernels as bg
from bgkernels.training.errors import ModelError
from bgkernels.training.models import CausalLM
from bgkernels.vocabularies import Translator, VocabularyError, VocabularyMatch, agreeing, match
from bgkernels.vocabularies.readers import reader_of


@dataclass(frozen=True)
class TranslatedLM(CausalLM):
    """A model whose text comes and goes in the tokens of another tokenizer, the student's.

    Args:
        source: the model, in its own tokens.
        reading: from the student's tokens to the model's.
        writing: from the model's tokens to the student's.
    """

    source: CausalLM = field(kw_only=True)
    reading: Translator = field(kw_only=True)
    writing: Translator = field(kw_only=True)

    @classmethod
    def of(cls, model: CausalLM, tokenizer: Any, student_tokenizer: Any, text: str) -> TranslatedLM:
        """The model as it is for a student.

        Args:
            model: a teacher.
            tokenizer: of the teacher.
            student_tokenizer: of the student.
            text: some of what is to be learnt, on which tokens of a pair must be used alike.

        Raises:
            ModelError: the tokenizers cannot be matched.
        """
        try:
            found = match(student_tokenizer, tokenizer)
            back = VocabularyMatch.between(found.teacher, found.student)
            found.check_heads(teacher=model.vocab)
            ids = (reader_of(x).encode([text]) for x in (student_tokenizer, tokenizer))
            found = agreeing(found, *ids)
        except VocabularyError as error:
            raise ModelError(f"--teacher and --student: {error}") from error
        return cls(
            model.network, model.logit_scale, model.logit_softcap, source=model,
            reading=Translator(found, tokenizer), writing=Translator(back, student_tokenizer),
        )  # fmt: skip

    @property
    def vocab(self) -> int:
        """Tokens of the student's tokenizer, which are those that others may sample."""
        return self.reading.match.student.size

    def recalling(self, keep: Callable[[CausalLM], CausalLM]) -> TranslatedLM:
        """The same translator of a model that keeps what it has read."""
        return replace(self, source=keep(self.source))

    @torch.no_grad()
    def as_teacher(self, tokens: Tensor) -> bg.MatchedTeacher:  # type: ignore[override]
        """This model as the teacher of ``(batch, length)`` tokens of the student."""
        made = self.reading(tokens)
        limit = self.source.limit
        if limit is not None and made.ids.shape[1] > limit:
            raise ModelError(
                f"--teacher takes at most {limit} tokens, and the text of a sequence has "
                f"{made.ids.shape[1]} of its own; lower --sequence-length"
            )
        teacher = self.source.as_teacher(made.ids.clamp(min=0).to(tokens.device))
        places = made.alignment.positions.to(tokens.device)
        return bg.MatchedTeacher(teacher, self.reading.match.pairs, positions=places)

    def answers(
        self, prompts: Tensor, length: int, speak: Callable[..., Tensor], stop: int | None
    ) -> Tensor:
        """What the model says after prompts, in the student's tokens.

        Answers that are too short end with the end of a text.

        Args:
            prompts: ``(rows, given)`` tokens of the student.
            length: tokens of the student to say.
            speak: :func:`~bgkernels.training.generation.generate`, for texts of the model's own.
            stop: a token of the student that ends a row, which is filled up with it; or None.

        Returns:
            ``(rows, length)``, where the prompts are.
        """
        ends = [x.match.teacher.roles.get("eos", 0) for x in (self.reading, self.writing)]
        own = self.reading(prompts).ids
        lengths = (own >= 0).sum(1).clamp(min=1)
        columns = min(self.source.vocab, self.reading.match.teacher.size)
        own = own.where(own >= 0, ends[0]).to(prompts.device)
        said = speak(self.source, own, 2 * length, columns, lengths=lengths)
        written = self.writing(said).ids[:, :length]
        text = torch.full((len(prompts), length), ends[1] if stop is None else stop)
        text[:, : written.shape[1]] = torch.where(written >= 0, written, text[:, :1])
        if stop is not None:
            text[(text == stop).cumsum(1) > 0] = stop
        return text.to(prompts.device)

    @torch.no_grad()
    def cost(self, tokens: Tensor, labels: Tensor) -> float:
        """Nats that a text costs the model, a token of the student.

        Of each sequence, the part between the first and the last common place of what is scored.

        Args:
            tokens: ``(sequences, length + 1)``.
            labels: ``(sequences, length)``, negative where nothing is scored.
        """
        nats, count = 0.0, 0
        for text, chosen in zip(tokens.split(16), (labels >= 0).split(16), strict=True):
            made = self.reading(text)
            ids = made.ids.clamp(min=0).to(text.device)
            teacher = self.source.as_teacher(ids[:, :-1])
            stats = bg.linear_row_stats(
                teacher.hidden, teacher.weight, None, ids[:, 1:], linear_bias=teacher.bias,
                logit_scale=self.logit_scale, logit_softcap=self.logit_softcap,
            )  # fmt: skip
            total = torch.nn.functional.pad(stats.nll.double().cumsum(1), (1, 0)).cpu()
            places = made.alignment.positions
            for row, (position, wanted) in enumerate(zip(places, chosen.cpu(), strict=True)):
                common = torch.nn.functional.pad(wanted, (0, 1)) & (position >= 0)
                at = common.nonzero()[:, 0]
                if len(at) > 1:
                    first, last = (position[at[[0, -1]]] - row * ids.shape[1]).tolist()
                    nats += float(total[row, last] - total[row, first])
                    count += int(at[-1] - at[0])
        return nats / max(count, 1)
