"""Text that a model writes: the beginning of the corpus's, and the model's own continuation."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch

from bgkernels.training.config import given
from bgkernels.training.generation import ROWS, Speaker, continue_text, generate
from bgkernels.training.models import CausalLM
from bgkernels.training.sampling import row_seeds
from bgkernels.training.tokens import Batch


class Numbered(Protocol):
    """Training batches by number, each the same whenever it is asked for."""

    def __getitem__(self, number: int) -> Batch: ...


@dataclass(frozen=True)
class Writer:
    """Continues batches, so that what a model wrote can be learnt from.

    Args:
        model: the writer.
        vocab: leading columns to sample from, those that all models have.
        prompt: share of a sequence that is given; only what follows is learnt.
        seed: of the samples, together with the number of the batch. So a batch is the same
            whichever others are written beside it.
        stop: the token that ends a text, after which nothing is learnt; None: texts go on.
        speak: says what follows, here or on a server of the model.
    """

    model: CausalLM
    vocab: int
    prompt: float
    seed: int
    stop: int | None = None
    speak: Speaker = generate

    def __call__(self, batches: Sequence[Batch], numbers: Sequence[int]) -> list[Batch]:
        """The batches of these numbers, written on."""
        tokens = torch.cat([batch.tokens for batch in batches])
        length = tokens.shape[1]
        prompt = given(self.prompt, length - 1)
        sizes = [len(batch.tokens) for batch in batches]
        seeds: list[int] = []
        for number, rows in zip(numbers, sizes, strict=True):
            seeds += row_seeds(self.seed * 1_000_003 + number, rows)
        text = continue_text(
            self.model, tokens[:, :prompt], length - prompt, self.vocab, seeds,
            stop=self.stop, speak=self.speak,
        )  # fmt: skip
        written = Batch.of(text).after(prompt).until(self.stop)
        parts = zip(written.tokens.split(sizes), written.labels.split(sizes), strict=True)
        return [Batch(*part) for part in parts]


@dataclass
class WrittenBatches:
    """Batches that a model which does not change continues, several at once.

    Args:
        batches: of the corpus.
        write: continues them.
        stride: between the numbers that are asked for: how many processes share the batches out. So
            each writes its own ones only, and all of them at the same steps.
        ahead: of batches before this number the next group is written while one is learnt from, as
            is of use where a server writes; 0: none.
    """

    batches: Numbered
    write: Writer
    stride: int = 1
    ahead: int = 0
    _group: tuple[int, list[Batch]] = field(default=(-1, []), init=False, repr=False)
    _begun: dict[int, Future[list[Batch]]] = field(default_factory=dict, init=False, repr=False)

    def __getitem__(self, number: int) -> Batch:
        size = max(1, ROWS // len(self.batches[number].tokens))
        place = number // self.stride % size
        start = number - place * self.stride
        if self._group[0] != start:
            self._group = start, self._written(start, size)
        return self._group[1][place]

    def _written(self, start: int, size: int) -> list[Batch]:
        """A group of batches; the next one is begun."""
        begun, later = self._begun.pop(start, None), start + size * self.stride
        group = begun.result() if begun else self._write(start, size)
        if later < self.ahead:
            self._begun[later] = self._thread.submit(self._write, later, size)
        return group

    def _write(self, start: int, size: int) -> list[Batch]:
        numbers = range(start, start + size * self.stride, self.stride)
        return self.write([self.batches[n] for n in numbers], numbers)

    @cached_property
    def _thread(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, "written")
