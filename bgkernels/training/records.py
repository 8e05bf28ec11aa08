"""Records of a data file: texts, prompts with completions, and conversations."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bgkernels.training.conversations import Conversation, Message
from bgkernels.training.errors import CorpusError, extra
from bgkernels.training.tasks.exercise import Exercise

RECORD_SUFFIXES = {".jsonl": "from_json", ".json": "from_json", ".parquet": "from_parquet"}
"""Data files, and how ``datasets.Dataset`` reads them."""

REMEDY = "; leave it out, or train on the others by --skip-unusable"
COLUMNS = "a column `text`, or `messages`, or `prompt` and `completion`"


Document = str | Conversation | Exercise
"""A text that is learnt as a whole, a conversation, or a problem with its solution."""


def read_records(path: Path, unusable: list[str] | None = None) -> list[Document]:
    """Read a JSON Lines or Parquet file.

    Args:
        path: of the file.
        unusable: gathers why records cannot be used, which are left out; None: they are errors.

    Raises:
        CorpusError: it cannot be read, its columns are others, or a record cannot be used.
    """
    with extra():
        import datasets
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as cache:
        try:
            read = getattr(datasets.Dataset, RECORD_SUFFIXES[path.suffix])
            rows = read(str(path), cache_dir=cache, keep_in_memory=True)
        except Exception as error:  # the library raises what its parsers raise
            said = str(error.__cause__ or error) or "it is empty"
            reason = said.splitlines()[0]
            raise CorpusError(f"--corpus {path} cannot be read as records: {reason}") from error
        documents = []
        for i, row in enumerate(rows):
            try:
                documents.append(_document(i, row))
            except CorpusError as error:
                if unusable is None:
                    raise CorpusError(f"--corpus {path}: {error}{REMEDY}") from error
                unusable.append(str(error))
    found = [x for x in documents if (x if isinstance(x, str) else x.text).strip()]
    if not found:
        reason = f"; {unusable[0]}" if unusable else ""
        raise CorpusError(f"--corpus {path} holds no record with text{reason}")
    return found


def _document(number: int, row: Mapping[str, Any]) -> Document:
    """A record.

    Raises:
        CorpusError: it has other columns, or contents that are no text; names the record.
    """
    try:
        if row.get("messages"):
            return conversation(row["messages"], number=number, tools=row.get("tools"))
        if row.get("completion") is not None:
            prompt, completion = _turns(row["prompt"], "user"), _turns(row["completion"])
            return conversation(
                [*prompt, *completion], len(prompt), number=number, tools=row.get("tools")
            )
        return _text(row["text"])
    except CorpusError as error:
        raise CorpusError(f"record {number} cannot be used: {error}") from error
    except (KeyError, TypeError) as error:
        raise CorpusError(
            f"record {number} must have {COLUMNS}; it has {', '.join(row)}"
        ) from error


def _turns(value: Any, role: str = "assistant") -> list[Message]:
    """Messages of a prompt or a completion, given as such or as text."""
    return list(value) if isinstance(value, list) else [{"role": role, "content": _text(value)}]


def conversation(messages: Sequence[Message], first: int = 0, **options: Any) -> Conversation:
    """A conversation of messages as chat formats have them.

    Args:
        messages: with a role, and content: a text, parts of type text, or null beside tool calls.
        first: messages before this one are a prompt.
        **options: of :class:`Conversation`.

    Raises:
        CorpusError: content that is no text.
    """
    made = [{**_present(m), "content": _content(i, m)} for i, m in enumerate(messages)]
    more = any(m.keys() - {"role", "content"} for m in made)
    return Conversation(
        tuple((str(m["role"]), m["content"]) for m in made),
        0 if all(m["role"] != "assistant" for m in made[:first]) else first,
        messages=tuple(made) if more else None,
        **options,
    )


def _present(message: Message) -> dict[str, Any]:
    """What a message has; a file's columns are null where others have something."""
    found = {k: v for k, v in message.items() if v is not None}
    return {**found, "role": message["role"]}


def _content(number: int, message: Message) -> str:
    content = message["content"] if not message.get("tool_calls") else message.get("content")
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    for part in parts:
        kind = "text" if isinstance(part, str) else dict(part or {}).get("type", "text")
        if kind != "text":
            raise CorpusError(
                f"the content of turn {number} has a part of type {kind!r}; only text can be learnt"
            )
    return "".join(x if isinstance(x, str) else _text(x.get("text")) for x in parts)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("not a text")
    return value


def texts_of(documents: Sequence[Document]) -> list[str]:
    """The documents as plain texts."""
    return [x if isinstance(x, str) else x.text for x in documents]
