"""Special tokens by what they are for, since every family spells them its own way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

SPELLINGS = {
    "bos": ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "<｜begin▁of▁sentence｜>"),
    "eos": ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "<EOT>"),
    "unk": ("<unk>", "[UNK]"),
    "end_of_turn": ("<|im_end|>", "<|eot_id|>", "<|eot|>", "<end_of_turn>", "<turn|>", "<|end|>"),
    "start_of_turn": (
        "<|im_start|>", "<|start_header_id|>", "<|header_start|>", "<start_of_turn>", "<|turn>",
        "<|start|>",
    ),
    "end_of_header": ("<|end_header_id|>", "<|header_end|>", "<|message|>"),
    "system": ("<|system|>", "[SYSTEM_PROMPT]"),
    "user": ("<|user|>", "<｜User｜>", "[INST]"),
    "assistant": ("<|assistant|>", "<｜Assistant｜>", "[/INST]"),
    "fim_prefix": ("<|fim_prefix|>", "<fim_prefix>", "<｜fim▁begin｜>", "[PREFIX]", "<PRE>"),
    "fim_suffix": ("<|fim_suffix|>", "<fim_suffix>", "<｜fim▁hole｜>", "[SUFFIX]", "<SUF>"),
    "fim_middle": ("<|fim_middle|>", "<fim_middle>", "<｜fim▁end｜>", "[MIDDLE]", "<MID>"),
    "pad": ("<pad>", "<|pad|>", "[PAD]", "<｜▁pad▁｜>", "<|finetune_right_pad_id|>"),
}  # fmt: skip
"""Role → how tokenizers spell it, the first one that a vocabulary has being taken."""

SILENT = ("bos", "unk", "pad")
"""Roles that stand for no event of a text."""


def roles_of(specials: Mapping[str, int], declared: Mapping[str, int | None]) -> dict[str, int]:
    """The role of each special token that has one, each token having one role at most.

    Args:
        specials: special and added tokens as they are spelt, and their ids.
        declared: roles that the tokenizer names itself, which come first; a padding token comes
            last, since many models pad with the end of the text.

    Example:
        >>> roles_of({"<s>": 1, "</s>": 2, "<|im_end|>": 7}, {"eos": 7, "pad": 2})
        {'eos': 7, 'bos': 1, 'pad': 2}
    """
    found: dict[str, int] = {}

    def take(role: str, ids: Iterable[int | None]) -> None:
        for number in ids:
            if number is not None and role not in found and number not in found.values():
                found[role] = number

    for role, number in declared.items():
        if role != "pad":
            take(role, [number])
    for role, spellings in SPELLINGS.items():
        if role == "pad":
            take(role, [declared.get("pad")])
        take(role, [specials.get(x) for x in spellings])
    return found
