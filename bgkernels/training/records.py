"""Records of a data file: texts, prompts with completions, and conversations."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bgkernels.training.errors import CorpusError, extra

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RECORD_SUFFIXES = {".jsonl": "from_json", ".json": "from_json", ".parquet": "from_parquet"}
"""Data files, and how ``datasets.Dataset`` reads them."""

COLUMNS = "a column `text`, or `messages`, or `prompt` and `completion`"


@dataclass(frozen=True)
class Conversation:
    r"""Turns of a conversation, of which the assistant's are learnt.

    Args:
        turns: role and content of each.

    Example:
        >>> chat = Conversation((("user", "2 + 2?"), ("assistant", "4")))
        >>> chat.text
        'user: 2 + 2?\nassistant: 4\n'
    """

    turns: tuple[tuple[str, str], ...]

    @property
    def text(self) -> str:
        """All turns, without the template of any tokenizer."""
        return "".join(text for text, _ in self.parts())

    def parts(self) -> Iterator[tuple[str, bool]]:
        """Pieces of that text, and whether each is learnt."""
        for role, content in self.turns:
            yield f"{role}: ", False
            yield f"{content}\n", role == "assistant"

    def encode(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
        """Tokens, and which of them are learnt: by the tokenizer's chat template, if it has one.

        Raises:
            CorpusError: the template changes what it said of earlier turns.
        """
        if getattr(tokenizer, "chat_template", None) is None:
            pieces = [
                (tokenizer(text, add_special_tokens=False)["input_ids"], learnt)
                for text, learnt in self.parts()
            ]
            return [i for ids, _ in pieces for i in ids], [x for ids, x in pieces for _ in ids]
        messages = [{"role": role, "content": content} for role, content in self.turns]
        tokens: list[int] = []
        learnt: list[bool] = []
        for i, (role, _) in enumerate(self.turns):
            answer = role == "assistant"
            if answer:
                self._extend(tokens, learnt, _templated(tokenizer, messages[:i], True), False)
            self._extend(tokens, learnt, _templated(tokenizer, messages[: i + 1], False), answer)
        return tokens, learnt

    @staticmethod
    def _extend(tokens: list[int], learnt: list[bool], longer: list[int], answer: bool) -> None:
        """Append what ``longer`` has beyond ``tokens``."""
        if longer[: len(tokens)] != tokens:
            raise CorpusError(
                "the tokenizer's chat template rewrites earlier turns, so that answers cannot be "
                "told from prompts; use records of `prompt` and `completion`"
            )
        learnt += [answer] * (len(longer) - len(tokens))
        tokens[:] = longer


def _templated(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], prompt: bool
) -> list[int]:
    template: Any = tokenizer.apply_chat_template
    text = template(messages, tokenize=False, add_generation_prompt=prompt)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


Document = str | Conversation
"""A text that is learnt as a whole, or a conversation."""


def read_records(path: Path) -> list[Document]:
    """Read a JSON Lines or Parquet file.

    Raises:
        CorpusError: it cannot be read, or its columns are others.
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
        documents = [_document(path, i, row) for i, row in enumerate(rows)]
    found = [x for x in documents if (x if isinstance(x, str) else x.text).strip()]
    if not found:
        raise CorpusError(f"--corpus {path} holds no record with text")
    return found


def _document(path: Path, number: int, row: Mapping[str, Any]) -> Document:
    try:
        if row.get("messages"):
            return Conversation(
                tuple((str(m["role"]), _text(m["content"])) for m in row["messages"])
            )
        if row.get("completion") is not None:
            turns = (("user", _text(row["prompt"])), ("assistant", _text(row["completion"])))
            return Conversation(turns)
        return _text(row["text"])
    except (KeyError, TypeError) as error:
        raise CorpusError(
            f"--corpus {path}: record {number} must have {COLUMNS}; it has {', '.join(row)}"
        ) from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("not a text")
    return value


def texts_of(documents: Sequence[Document]) -> list[str]:
    """The documents as plain texts."""
    return [x if isinstance(x, str) else x.text for x in documents]
