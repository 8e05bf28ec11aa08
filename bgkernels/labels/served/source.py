"""Labels of whole texts from a server, with requests of many texts under way."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from math import inf
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

import bgkernels as bg
from bgkernels.labels.served.api import HiddenStates, LogProbabilities
from bgkernels.labels.served.client import Client
from bgkernels.labels.sources import Answer

R = TypeVar("R")


@dataclass(frozen=True)
class ServedStates:
    """A server that sends hidden states: labels are those of the teacher loaded, to rounding.

    Args:
        states: of texts.
        head: the teacher's head, with ``(0, hidden)`` states.
        name: of the teacher.
        weights: digest of its head.
    """

    states: HiddenStates
    head: bg.LinearTeacher
    name: str
    weights: str
    match = None
    whole = True

    @property
    def vocab(self) -> int:
        """Columns of the head."""
        return self.head.weight.shape[0]

    def answers(self, shards: Iterable[list[Tensor]], size: int) -> Iterator[Answer]:
        """Hidden states, and the head."""
        for parts in in_batches(self.states.client, self._read, shards, size):
            yield replace(self.head, hidden=torch.cat(parts))

    def _read(self, text: Tensor) -> Tensor:
        return self.states(text.tolist()) if len(text) else self.head.hidden


@dataclass(frozen=True)
class ServedLogProbabilities:
    """A server that sends the most probable tokens: no sample, entropy or power sum.

    Args:
        source: of texts.
        name: of the teacher.
        vocab: its columns.
    """

    source: LogProbabilities
    name: str
    vocab: int
    weights: str = ""
    match = None
    whole = False

    def answers(self, shards: Iterable[list[Tensor]], size: int) -> Iterator[Answer]:
        """Labels; a row has as many as the server sent."""
        for parts in in_batches(self.source.client, self._read, shards, size):
            k = max(labels.indices.shape[1] for labels in parts)
            yield bg.SoftLabels(
                torch.cat([pad(x.indices, (0, k - x.indices.shape[1]), value=-1) for x in parts]),
                torch.cat(
                    [pad(x.logprobs, (0, k - x.logprobs.shape[1]), value=-inf) for x in parts]
                ),
            )

    def _read(self, text: Tensor) -> bg.SoftLabels:
        if not len(text):
            return bg.SoftLabels(torch.empty(0, 0, dtype=torch.int64), torch.empty(0, 0))
        return self.source(text.tolist()).labels


def in_batches(
    client: Client, read: Callable[[Tensor], R], shards: Iterable[list[Tensor]], size: int
) -> Iterator[list[R]]:
    """What ``read`` returns of the texts of each batch; later batches and shards are under way.

    Args:
        client: whose threads call it.
        read: makes requests.
        shards: texts of each.
        size: texts of a batch; the last of a shard may have fewer.
    """
    sizes: deque[int] = deque()

    def texts() -> Iterator[Tensor]:
        for shard in shards:
            sizes.extend(len(shard[start : start + size]) for start in range(0, len(shard), size))
            yield from shard

    answers = client.in_order(read, texts())
    for first in answers:
        yield [first, *islice(answers, sizes.popleft() - 1)]
