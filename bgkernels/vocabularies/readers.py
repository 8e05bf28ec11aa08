"""Vocabularies of the tokenizers that people use, whose packages need not be installed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol

from bgkernels.vocabularies.errors import VocabularyError
from bgkernels.vocabularies.roles import roles_of
from bgkernels.vocabularies.vocabulary import Vocabulary

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""How SentencePiece writes a space."""
BYTE = re.compile(r"<0x([0-9A-F]{2})>")
"""How it writes a byte."""
SAMPLE = "The cat sat on a mat."


class Reader(Protocol):
    """One kind of tokenizer."""

    def vocabulary(self) -> Vocabulary:
        """What its ids stand for."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without special tokens around it."""


def read(tokenizer: Any) -> Vocabulary:
    """The bytes that each token of a tokenizer stands for.

    Args:
        tokenizer: a fast tokenizer of ``transformers``, a ``tokenizers.Tokenizer``, a
            ``SentencePieceProcessor``, a ``tiktoken.Encoding``, or what has their methods.

    Raises:
        VocabularyError: it is of another kind; or it does not give a plain sentence back, since it
            changes letters or drops spaces.

    Example:
        >>> from bgkernels.training.tokens import train_tokenizer
        >>> vocabulary = read(train_tokenizer(["a text, and a text"], vocab=264))
        >>> vocabulary.size, vocabulary.roles
        (264, {'eos': 0})
    """
    reader = reader_of(tokenizer)
    vocabulary = reader.vocabulary()
    back = b"".join(vocabulary[i] for i in reader.encode([SAMPLE])[0])
    if back not in (SAMPLE.encode(), b" " + SAMPLE.encode()):
        raise VocabularyError(
            f"the bytes of text do not come back from {type(tokenizer).__name__}: {SAMPLE!r} "
            f"became {back.decode(errors='replace')!r}; tokenizers that change letters, drop "
            "spaces or lack letters cannot be matched with others"
        )
    return vocabulary


def reader_of(tokenizer: Any) -> Reader:
    """How a tokenizer is read.

    Raises:
        VocabularyError: no known way.
    """
    for kind in (HuggingFace, Tokenizers, Tiktoken, SentencePiece):
        if all(hasattr(tokenizer, name) for name in kind.METHODS):
            reader: Reader = kind(tokenizer)
            return reader
    if hasattr(tokenizer, "sp_model"):
        return SentencePiece(tokenizer.sp_model)
    raise VocabularyError(
        "a tokenizer must be a fast one of transformers, a tokenizers.Tokenizer, a "
        "SentencePieceProcessor or a tiktoken.Encoding (or have their methods); got "
        f"{type(tokenizer).__name__}"
    )


class Tokenizers:
    """A ``tokenizers.Tokenizer``, whose JSON says how its tokens are written."""

    METHODS: ClassVar[tuple[str, ...]] = ("to_str", "encode_batch")

    def __init__(self, tokenizer: Any, declared: Mapping[str, int | None] | None = None) -> None:
        self.tokenizer, self.declared = tokenizer, declared or {}

    def vocabulary(self) -> Vocabulary:
        """What its ids stand for."""
        content = json.loads(self.tokenizer.to_str())
        model, added = content["model"], content.get("added_tokens") or []
        named = model["vocab"]
        if not isinstance(named, dict):  # Unigram: pairs of a piece and its score
            named = {piece: i for i, (piece, _) in enumerate(named)}
        written = Writing(content)
        extra = {x["content"]: x["id"] for x in added}
        tokens = [b""] * (1 + max([*named.values(), *extra.values()], default=-1))
        fallback = []
        for token, i in named.items():
            if written.byte(token):
                fallback.append(i)
            tokens[i] = written.content(token)
        for token, i in extra.items():
            tokens[i] = written.literal(token)
        return Vocabulary.of(tokens, roles_of(extra, self.declared), fallback)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        made = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [x.ids for x in made]


class HuggingFace(Tokenizers):
    """A fast tokenizer of ``transformers``, which names its special tokens."""

    METHODS: ClassVar[tuple[str, ...]] = ("backend_tokenizer",)

    def __init__(self, tokenizer: Any) -> None:
        roles = ("bos", "eos", "unk", "pad")
        declared = {role: getattr(tokenizer, f"{role}_token_id", None) for role in roles}
        super().__init__(tokenizer.backend_tokenizer, declared)
        self.outer = tokenizer

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        made = self.outer(list(texts), add_special_tokens=False, verbose=False)
        ids: list[list[int]] = made["input_ids"]
        return ids


class Writing:
    """How the tokens of a ``tokenizers`` file are written.

    Args:
        content: of the file.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        parts = [*_parts(content.get("decoder")), *_parts(content.get("pre_tokenizer"))]
        kinds = {part.get("type") for part in parts}
        replaced = [part for part in parts if part.get("type") == "Replace"]
        self.alphabet = byte_alphabet() if "ByteLevel" in kinds else None
        self.spaced = "Metaspace" in kinds or any(SPACE in str(part) for part in replaced)
        fallback = content["model"].get("byte_fallback") or "ByteFallback" in kinds
        self.bytes = self.alphabet is None and bool(fallback)

    def byte(self, token: str) -> bool:
        """Whether it is a byte token."""
        return self.bytes and BYTE.fullmatch(token) is not None

    def content(self, token: str) -> bytes:
        """The bytes of a token of the model."""
        if self.byte(token):
            return bytes.fromhex(token[3:5])
        if self.alphabet is not None and all(c in self.alphabet for c in token):
            return bytes(self.alphabet[c] for c in token)
        return self.literal(token)

    def literal(self, token: str) -> bytes:
        """The bytes of an added token."""
        return _utf8(token.replace(SPACE, " ") if self.spaced else token)


class SentencePiece:
    """A ``SentencePieceProcessor``."""

    METHODS = ("id_to_piece", "is_byte", "is_control")

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def vocabulary(self) -> Vocabulary:
        """What its ids stand for."""
        known, ids = self.tokenizer, range(self.tokenizer.vocab_size())
        pieces = known.id_to_piece(list(ids))
        fallback = [i for i in ids if known.is_byte(i)]
        silent = {i for i in ids if known.is_control(i) or known.is_unknown(i)}
        tokens = [_utf8(piece.replace(SPACE, " ")) for piece in pieces]
        for i in fallback:
            tokens[i] = bytes.fromhex(pieces[i][3:5])
        declared = {
            role: number if (number := getattr(known, f"{role}_id")()) >= 0 else None
            for role in ("bos", "eos", "unk", "pad")
        }
        return Vocabulary.of(tokens, roles_of({pieces[i]: i for i in silent}, declared), fallback)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        ids: list[list[int]] = self.tokenizer.encode(list(texts))
        return ids


class Tiktoken:
    """A ``tiktoken.Encoding``."""

    METHODS = ("decode_single_token_bytes", "encode_ordinary", "n_vocab")

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def vocabulary(self) -> Vocabulary:
        """What its ids stand for."""
        known = self.tokenizer
        special = {x: known.encode_single_token(x) for x in known.special_tokens_set}
        tokens = [self._content(i) for i in range(known.n_vocab)]
        return Vocabulary.of(tokens, roles_of(special, {}))

    def _content(self, token: int) -> bytes:
        try:
            content: bytes = self.tokenizer.decode_single_token_bytes(token)
        except KeyError:  # an id between the others
            return b""
        return content

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        return [self.tokenizer.encode_ordinary(text) for text in texts]


def byte_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE writes bytes with (Radford et al. 2019).

    Printable characters of Latin-1 stand for themselves, and the other bytes, in their order, for
    the characters from 256 on.

    Example:
        >>> alphabet = byte_alphabet()
        >>> alphabet["a"], alphabet["Ġ"], len(alphabet)
        (97, 32, 256)
    """
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}


def _parts(component: Any) -> Iterator[Mapping[str, Any]]:
    """A decoder or pre-tokenizer, and those that it is a sequence of."""
    if isinstance(component, Mapping):
        yield component
        for inner in (component.get("decoders") or []) + (component.get("pretokenizers") or []):
            yield from _parts(inner)


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
