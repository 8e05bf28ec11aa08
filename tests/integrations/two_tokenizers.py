"""Two tokenizers, a student and a teacher of theirs, and the dense loss of their coarse tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from bgkernels.vocabularies import VocabularyMatch, align, match
from tests.models import tiny
from tests.vocabularies import toys

SIZE: dict[str, Any] = {"max_position_embeddings": 128, "eos_token_id": None, "bos_token_id": None}


@dataclass(frozen=True)
class Pair:
    """Two tokenizers. Those of another process are other ones, unless they are loaded."""

    student: Any
    teacher: Any

    @classmethod
    def make(cls) -> Pair:
        end = "<|endoftext|>"
        return cls(
            toys.fast(toys.byte_level(330), eos_token=end, pad_token=end),
            toys.fast(toys.spaced(500), bos_token="<s>", eos_token="</s>", unk_token="<unk>"),
        )

    @classmethod
    def load(cls, folder: Path) -> Pair:
        return cls(*(AutoTokenizer.from_pretrained(folder / f.name) for f in fields(cls)))

    def save(self, folder: Path) -> None:
        for name, tokenizer in vars(self).items():
            tokenizer.save_pretrained(folder / name)

    @property
    def both(self) -> dict[str, Any]:
        """As arguments of ``attach``."""
        return {"tokenizer": self.student, "teacher_tokenizer": self.teacher}

    def models(self, padding: int = 6) -> tuple[Any, Any]:
        """A student whose head is padded, and a teacher that is wider."""
        student = tiny(vocab_size=len(self.student) + padding, pad_token_id=None, **SIZE)
        wide = {"vocab_size": len(self.teacher), "hidden_size": 24, "pad_token_id": None}
        return student, tiny(seed=1, **wide, **SIZE)

    def batch(self, rows: int = 3) -> dict[str, Tensor]:
        made = self.student(toys.TEXTS[:rows], return_tensors="pt", padding=True)
        labels = made["input_ids"].masked_fill(made["attention_mask"] == 0, -100)
        return {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]} | {
            "labels": labels
        }

    def differentiated(self, rows: int) -> Any:
        """The student in float64, with the gradients of the dense loss of a token of a batch."""
        student, teacher = (m.double() for m in self.models())
        data = self.batch(rows)
        (self.dense(student, teacher, data) / (data["labels"][:, 1:] != -100).sum()).backward()
        return student

    def dense(
        self,
        student: Any,
        teacher: Any,
        data: dict[str, Tensor],
        found: VocabularyMatch | None = None,
    ) -> Tensor:
        """Half the cross-entropy and half KL of the coarse distributions, summed row by row."""
        found, terms = found or match(self.student, self.teacher), []
        for ids, mask, labels in zip(*data.values(), strict=True):
            own = ids[mask.bool()]
            text = self.student.decode(own)
            theirs = torch.tensor(self.teacher(text, add_special_tokens=False)["input_ids"])
            rows = coarse(student, teacher, own, theirs, found)
            for (hard, kl), label in zip(rows, labels[mask.bool()][1:], strict=True):
                terms.append(hard[label] if kl is None else 0.5 * hard[label] + 0.5 * kl)
        return torch.stack(terms).sum()


def coarse(
    student: Any, teacher: Any, own: Tensor, theirs: Tensor, found: VocabularyMatch
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The costs of all tokens at each position but the last, and KL if they can be compared."""
    p, q = (
        m(x[None]).logits[0].double().log_softmax(-1)
        for m, x in ((student, own), (teacher, theirs))
    )
    places = align(found, own[None], theirs[None]).positions[0].tolist()
    for row, place in zip(p[:-1], places[:-1], strict=True):
        if place < 0:
            yield -row, None
            continue
        kept = row.exp()[found.pairs[0]], q[place].detach().exp()[found.pairs[1]]
        s, t = (torch.cat([x, 1 - x.sum(0, keepdim=True)]).clamp(min=1e-300) for x in kept)
        yield -row, (t * (t.log() - s.log())).sum()
