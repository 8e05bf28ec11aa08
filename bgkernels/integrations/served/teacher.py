"""A served model as the teacher of a batch."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor

import bgkernels as bg
from bgkernels.integrations.heads import Head
from bgkernels.integrations.served.check import K, examine
from bgkernels.integrations.served.head import CheckpointHead, read_head
from bgkernels.integrations.served.texts import Text, texts_of
from bgkernels.labels.served.api import HiddenStates, LogProbabilities, find_model
from bgkernels.labels.served.client import Client

KEPT = 4096
"""Texts that were asked ahead and not yet taken; beyond, the oldest is forgotten."""

Url = str | Sequence[str] | Client


class ServedTeacher:
    """A language model behind a server of vLLM as teacher: exact, over the whole vocabulary.

    The server sends the last hidden states of a batch's texts, and the teacher's head, read from
    its checkpoint alone, is here; so no logits travel, and every divergence and policy is what it
    is with the teacher loaded. Each text is a request; padding and what follows a text's last label
    are not sent. The server must run as ``vllm serve MODEL --runner pooling --convert embed
    --pooler-config '{"task": "token_embed", "use_activation": false}'``.

    Several teachers are several of these in a ``bg.MixtureTeacher``; see ``docs/served.md``.

    Args:
        url: ``http://host:port``; several servers of one model share the load. Or a
            :class:`~bgkernels.labels.served.client.Client`, with a key and limits.
        head: path or name of the checkpoint that is served, or what was read of it.
        model: what the server calls it; None: its only one, by the name of ``head``.
        tokenizer: of the student, which must be the server's; None: that of ``head``, if it has
            one.
        dtype: in which states travel, and of the head; None: as the head is stored.
        reference: the URL of a server of the same model that generates, which knows
            log-probabilities to compare with.
        check: see :func:`~bgkernels.integrations.served.check.examine`.

    Attributes:
        head: weight, bias, scale and soft-cap of the teacher.
        ahead: how many batches a trainer has it read before they are needed.

    Raises:
        ServerError: the server cannot be asked, or is not the teacher.
        HeadError: the head cannot be read.

    Example:
        >>> teacher = ServedTeacher("http://localhost:8000", "Qwen/Qwen2.5-72B")  # doctest: +SKIP
        >>> attach(student, teacher, temperature=2.0)  # doctest: +SKIP
    """

    columns: tuple[str, ...] = ()
    ahead = 2

    def __init__(
        self,
        url: Url,
        head: str | PathLike[str] | CheckpointHead,
        *,
        model: str | None = None,
        tokenizer: Any = None,
        dtype: torch.dtype | None = None,
        reference: Url | None = None,
        check: bool = True,
    ) -> None:
        client = url if isinstance(url, Client) else Client(url)
        served = find_model(client, model)
        known = head if isinstance(head, CheckpointHead) else read_head(head, dtype)
        self.head = known.head.detached(known.head.weight.dtype)
        self.name = known.name
        self.states = HiddenStates(client, served.name, self.head.weight.dtype)
        self.limit = served.limit
        self._asked: dict[tuple[int, ...], Future[Tensor]] = {}
        self._heads = {self.head.weight.device: self.head}
        self._lock = threading.Lock()
        if check:
            words = tokenizer or _tokenizer(head)
            probabilities = reference and _reference(reference)
            trusted = served if model is None else replace(served, root="")
            examine(self.states, trusted, known, words, probabilities or None)

    def __repr__(self) -> str:
        return f"ServedTeacher({self.states.client.name!r}, {self.name!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> ServedTeacher:
        return self  # connections have no copy

    def ask(self, inputs: Mapping[str, Any], rows: Tensor | None) -> None:
        """Send the texts of a batch that will be taken later by a call with the same arguments."""
        with self._lock:
            for text in texts_of(inputs, rows):
                self._future(text)
            while len(self._asked) > KEPT:
                self._asked.pop(next(iter(self._asked))).cancel()

    def __call__(self, inputs: Mapping[str, Any], rows: Tensor | None) -> bg.LinearTeacher:
        """Hidden states at ``rows``, and the head, where the tokens are.

        Raises:
            ServerError: the server does not answer, or with something else.
            ValueError: the batch is not made of tokens alone, or of tokens that the teacher lacks.
        """
        texts, tokens = texts_of(inputs, rows), inputs["input_ids"]
        with self._lock:
            futures = [self._future(text) for text in texts]
            for text in texts:
                self._asked.pop(text.tokens, None)
        count = tokens.numel()
        hidden = torch.zeros(count, self.head.weight.shape[1], dtype=self.states.dtype)
        try:
            for text, future in zip(texts, futures, strict=True):
                hidden[text.places] = future.result()[text.chosen]
        except BaseException:
            for future in futures:
                future.cancel()
            raise
        hidden = hidden.view(*tokens.shape, -1) if rows is None else hidden[rows.cpu()]
        head = self._head(tokens.device)
        return bg.LinearTeacher(
            hidden.to(tokens.device), head.weight, head.bias, head.logit_scale, head.logit_softcap
        )  # fmt: skip

    def close(self) -> None:
        """Forget what was asked, and send nothing any more."""
        self.states.client.close()

    def _future(self, text: Text) -> Future[Tensor]:
        """The states of a text, asked for now if they were not before."""
        vocab = self.head.weight.shape[0]
        if text.tokens not in self._asked:
            if max(text.tokens) >= vocab or (self.limit or len(text.tokens)) < len(text.tokens):
                raise ValueError(
                    f"a text has {len(text.tokens)} tokens up to number {max(text.tokens)}, and "
                    f"{self!r} reads at most {self.limit} tokens below number {vocab}; cut the "
                    "texts, and use a student with the teacher's tokenizer"
                )
            client = self.states.client
            self._asked[text.tokens] = client.submit(self.states, text.tokens)
        return self._asked[text.tokens]

    def _head(self, device: torch.device) -> Head:
        """The head on a device, moved there once."""
        if device not in self._heads:
            own, bias = self.head, self.head.bias
            bias = None if bias is None else bias.to(device)
            self._heads[device] = replace(own, weight=own.weight.to(device), bias=bias)
        return self._heads[device]


def _tokenizer(head: Any) -> Any:
    """The tokenizer of a checkpoint, if it has one."""
    from transformers import AutoTokenizer

    if isinstance(head, CheckpointHead):
        return None
    try:
        return AutoTokenizer.from_pretrained(head)
    except (OSError, ValueError, ImportError, KeyError):
        return None


def _reference(url: Url) -> LogProbabilities:
    client = url if isinstance(url, Client) else Client(url)
    return LogProbabilities(client, find_model(client).name, K)
