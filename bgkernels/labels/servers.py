"""Labels from the log-probabilities that inference servers return, one JSON response a line.

Servers know the top of a distribution only: such labels have no sample, entropy or power sum. A row
may have one entry more than was asked for, the token that was drawn or given.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bgkernels import SoftLabels
from bgkernels.labels import store
from bgkernels.labels.errors import LabelError
from bgkernels.labels.shard import Document, ShardBuilder
from bgkernels.labels.store import Info
from bgkernels.labels.tokenizer import fingerprint
from bgkernels.training.files import digest

Row = dict[int, float] | None
"""Log-probabilities by token, or None where the server gave none."""

ABSENT = -9999.0
"""What vLLM writes for ``-inf``, which JSON lacks."""


def read_vllm(path: str | Path) -> Iterator[Document]:
    """Documents from what vLLM's ``/v1/completions`` or ``/v1/chat/completions`` returned.

    A document is a prompt and what followed it, for each choice. Ask for ``return_token_ids=true``
    and ``prompt_logprobs=k``; for the labels of generated tokens, also for ``logprobs=k`` (chat:
    ``logprobs=true, top_logprobs=k``) and ``return_tokens_as_token_ids=true``.

    Args:
        path: of a file with a response a line; empty lines are passed over.

    Raises:
        LabelError: a line is not such a response, by its number; the message says what is missing.
    """
    return _read(Path(path), "vLLM", vllm_rows)


def read_sglang(path: str | Path) -> Iterator[Document]:
    """Documents from what SGLang's ``/generate`` returned, a response or a list of them a line.

    Ask for ``return_logprob=true, logprob_start_len=0, top_logprobs_num=k``. The OpenAI-compatible
    endpoint of SGLang names tokens by their text, which does not identify them.

    Args:
        path: of a file with a response a line; empty lines are passed over.

    Raises:
        LabelError: a line is not such a response, by its number; the message says what is missing.
    """
    return _read(Path(path), "SGLang", sglang_rows)


def save_documents(
    documents: Sequence[Document],
    folder: str | Path,
    *,
    model: str,
    vocab: int,
    tokenizer: Any = None,
    temperature: float = 1.0,
    documents_per_shard: int = 256,
) -> None:
    """Write documents as a folder of labels, for :class:`~bgkernels.labels.LabelDataset`.

    Args:
        documents: such as ``list(read_vllm(path))``.
        folder: made where it is missing; shards that are there are kept.
        model: name of the teacher.
        vocab: columns of the teacher.
        tokenizer: of the teacher; its fingerprint is kept.
        temperature: of the log-probabilities; servers return those at 1 unless told otherwise.
        documents_per_shard: documents of a file.

    Raises:
        LabelError: a token or column is not in the vocabulary, the folder holds other labels, or
            the disk is full.
    """
    folder = Path(folder)
    info = Info(
        model=model,
        tokenizer="" if tokenizer is None else fingerprint(tokenizer),
        data=digest(x.numpy().tobytes() for document in documents for x in _tensors(document)),
        vocab=vocab,
        k=max((document.labels.indices.shape[1] for document in documents), default=0),
        temperature=temperature,
        documents=len(documents),
        documents_per_shard=documents_per_shard,
    )
    for number in range(info.shards):
        if store.finished(folder, number, info) is None:
            builder = ShardBuilder(vocab)
            for i in info.part(number):
                builder.add([documents[i].tokens], documents[i].labels)
            store.write_shard(folder, number, builder.tensors(), info)
    store.finish(folder, info)


def _tensors(document: Document) -> tuple[torch.Tensor, ...]:
    return document.tokens, document.labels.indices, document.labels.logprobs


Parse = Callable[[Any], Iterable[tuple[list[int], list[Row]]]]
"""From a response to tokens, and the distribution that each was drawn from."""


def _read(path: Path, server: str, parse: Parse) -> Iterator[Document]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                for tokens, rows in parse(json.loads(line)):
                    yield as_document(tokens, rows)
            except LabelError as error:
                raise LabelError(f"{path}, line {number}: {error}") from None
            except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
                raise LabelError(
                    f"{path}, line {number} is not a response of {server}, or not a whole one: "
                    f"{type(error).__name__}: {error}"
                ) from error


def as_document(tokens: list[int], rows: list[Row]) -> Document:
    """Labels at position i are of token i + 1; there are none after the last token."""
    if len(tokens) != len(rows):
        raise LabelError(f"{len(tokens)} tokens have {len(rows)} rows of log-probabilities")
    shifted = [_entries(row or {}) for row in [*rows[1:], None][: len(rows)]]
    k = max(map(len, shifted), default=0)
    indices = torch.full((len(tokens), k), -1)
    logprobs = torch.full((len(tokens), k), -math.inf)
    for i, entries in enumerate(shifted):
        if entries:
            columns, values = zip(*entries, strict=True)
            indices[i, : len(entries)] = torch.tensor(columns)
            logprobs[i, : len(entries)] = torch.tensor(values)
    return Document(torch.tensor(tokens, dtype=torch.int64), SoftLabels(indices, logprobs))


def _entries(row: dict[int, float]) -> list[tuple[int, float]]:
    """Columns and log-probabilities, the most probable first."""
    for column, value in row.items():
        if not isinstance(value, (int, float)) or not value <= 0.01 or column < 0:
            raise LabelError(f"token {column} has the log-probability {value!r}, which cannot be")
    total = sum(map(math.exp, row.values()))
    if total > 1.01:
        raise LabelError(f"the probabilities of a token sum to {total:.3f}")
    present = ((column, value) for column, value in row.items() if value > ABSENT)
    return sorted(present, key=lambda entry: -entry[1])


def vllm_rows(response: dict[str, Any]) -> Iterator[tuple[list[int], list[Row]]]:
    """Tokens of each choice, and the distribution that each was drawn from."""
    for choice in response["choices"]:
        prompt = choice.get("prompt_token_ids") or response.get("prompt_token_ids")
        given = choice.get("prompt_logprobs") or response.get("prompt_logprobs")
        if not prompt:
            raise LabelError("there is no `prompt_token_ids`; ask for return_token_ids=true")
        rows: list[Row] = [None] * len(prompt)
        if given:
            rows = [
                row and {int(column): entry["logprob"] for column, entry in row.items()}
                for row in given
            ]
        if len(rows) != len(prompt):
            raise LabelError(f"{len(prompt)} prompt tokens have {len(rows)} prompt_logprobs")
        drawn = list(_generated(choice.get("logprobs") or {}))
        echoed = _echo(prompt, drawn, choice.get("token_ids"))
        rows = rows if given else [row for _, row in drawn[:echoed]] or rows
        drawn = drawn[echoed:]
        if not given and not echoed and not drawn:
            raise LabelError("there are no log-probabilities; ask for prompt_logprobs or logprobs")
        _check_drawn(choice.get("token_ids"), [token for token, _ in drawn], echoed)
        yield [*prompt, *(token for token, _ in drawn)], [*rows, *(row for _, row in drawn)]


Drawn = list[tuple[int, Row]]


def _echo(prompt: list[int], drawn: Drawn, generated: list[int] | None) -> int:
    """How many of the tokens with log-probabilities repeat the prompt: all of it (echo) or none."""
    if [token for token, _ in drawn[: len(prompt)]] != prompt:
        return 0
    first_alone = drawn[0][1] is None  # nothing predicts the first token of a prompt
    counted = generated is not None and len(drawn) >= len(prompt) + len(generated) > len(generated)
    return len(prompt) if first_alone or counted else 0


def _check_drawn(token_ids: list[int] | None, drawn: list[int], echoed: int) -> None:
    """Refuse an answer some of whose tokens have no log-probabilities, or those of others."""
    if not token_ids or not (drawn or echoed):
        return
    generated = token_ids[echoed:] if len(token_ids) == echoed + len(drawn) else token_ids
    if generated != drawn:
        raise LabelError(
            f"`token_ids` has {len(generated)} generated tokens and `logprobs` {len(drawn)}"
            + (", which are others" if len(generated) == len(drawn) else "")
            + "; a token would be lost or mislabelled: leave this answer out, or ask for it again "
            "with log-probabilities of every token"
        )


def _generated(logprobs: dict[str, Any]) -> Iterator[tuple[int, Row]]:
    """Drawn tokens and their distributions, from either endpoint."""
    if "content" in logprobs:
        for entry in logprobs["content"] or ():
            both = [entry, *entry["top_logprobs"]]
            yield _number(entry["token"]), {_number(x["token"]): x["logprob"] for x in both}
        return
    columns = [logprobs.get(name) or [] for name in ("tokens", "token_logprobs", "top_logprobs")]
    for token, value, top in zip(*columns, strict=True):
        row = {_number(name): x for name, x in (top or {}).items()}
        yield _number(token), None if value is None else {_number(token): value} | row


def _number(token: str) -> int:
    """The number in ``token_id:17``."""
    match = re.fullmatch(r"token_id:(\d+)", token)
    if match is None:
        raise LabelError(
            f"the token {token!r} is given by its text, which does not identify it; ask for "
            "return_tokens_as_token_ids=true"
        )
    return int(match[1])


def sglang_rows(
    response: dict[str, Any] | list[dict[str, Any]],
) -> Iterator[tuple[list[int], list[Row]]]:
    """Tokens of each answer, and the distribution that each was drawn from."""
    for one in response if isinstance(response, list) else [response]:
        if "choices" in one:
            raise LabelError(
                "this is of the OpenAI-compatible endpoint, which names tokens by their text; use "
                "/generate with return_logprob=true"
            )
        meta, tokens, rows = one["meta_info"], [], []
        if "input_token_logprobs" not in meta:
            raise LabelError("there is no `input_token_logprobs`; ask for return_logprob=true")
        for side in ("input", "output"):
            chosen = meta.get(f"{side}_token_logprobs") or []
            best = meta.get(f"{side}_top_logprobs") or []
            if len(chosen) != len(best):
                raise LabelError(
                    f"{len(chosen)} {side} tokens have {len(best)} rows of {side}_top_logprobs; "
                    "ask for top_logprobs_num=k"
                )
            for (value, token, *_), top in zip(chosen, best, strict=True):
                tokens.append(int(token))
                rows.append(None if value is None else _row([[value, token], *(top or [])]))
        if rows and rows[0] is not None:
            raise LabelError("the first tokens are missing; ask for logprob_start_len=0")
        yield tokens, rows


def _row(entries: list[list[Any]]) -> Row:
    return {int(token): value for value, token, *_ in entries}
