"""Small tokenizers of every kind, and the text that they cut."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "The cat sat on a mat. The dog sat on the cat, and the cat sat on the dog.\n",
    "def add(left, right):\n    return left + right  # 12 + 30 = 42\n",
    "Où est la bibliothèque ? C'est là-bas, à côté de l'été. 猫坐在垫子上。🙂\n",
    " a text that begins with a space\n\n\tand has a tab",
]


def byte_level(vocab: int, texts: list[str] = TEXTS, special: str = "<|endoftext|>") -> Tokenizer:
    """A byte-level BPE, as GPT-2 has it."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[special], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    return made


def spaced(vocab: int, texts: list[str] = TEXTS) -> Tokenizer:
    """A BPE with SentencePiece's spaces and byte tokens, as Llama 2 has it."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    learnt = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    learnt.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=tokens,
        show_progress=False,
        limit_alphabet=40,
        max_token_length=8,
    )
    learnt.train_from_iterator(texts, trainer)
    learnt.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return without_added(learnt, {"<unk>", "<s>", "</s>"})


def without_added(tokenizer: Tokenizer, kept: set[str]) -> Tokenizer:
    """The same tokenizer, whose other special tokens are ordinary ones."""
    import json

    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [x for x in content["added_tokens"] if x["content"] in kept]
    return Tokenizer.from_str(json.dumps(content))


def fast(tokenizer: Tokenizer, **special: str) -> Any:
    """A tokenizer of ``transformers``."""
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


class Tiktoken:
    """The methods of a ``tiktoken.Encoding``, over the tokens of a byte-level BPE."""

    special_tokens_set = frozenset({"<|endoftext|>"})

    def __init__(self, tokenizer: Tokenizer, contents: list[bytes]) -> None:
        self._tokenizer, self._contents = tokenizer, contents
        self.n_vocab = len(contents) + 3  # ids between, which mean nothing
        self._special = {"<|endoftext|>": self.n_vocab - 1}

    def encode_single_token(self, token: str) -> int:
        return self._special[token]

    def decode_single_token_bytes(self, token: int) -> bytes:
        if token == self.n_vocab - 1:
            return b"<|endoftext|>"
        if token >= len(self._contents) or not self._contents[token]:
            raise KeyError(token)
        return self._contents[token]

    def encode_ordinary(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids


class SentencePiece:
    """The methods of a ``SentencePieceProcessor``, over a BPE with its spaces."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    def id_to_piece(self, ids: list[int]) -> list[str]:
        return [self._tokenizer.id_to_token(i) for i in ids]

    def is_byte(self, i: int) -> bool:
        return 3 <= i < 259

    def is_control(self, i: int) -> bool:
        return i in (1, 2)

    def is_unknown(self, i: int) -> bool:
        return i == 0

    def unk_id(self) -> int:
        return 0

    def bos_id(self) -> int:
        return 1

    def eos_id(self) -> int:
        return 2

    def pad_id(self) -> int:
        return -1

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [x.ids for x in self._tokenizer.encode_batch(texts, add_special_tokens=False)]
