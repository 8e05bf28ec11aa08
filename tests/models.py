"""Tiny models of real classes, and the loss of a batch of theirs, dense and in fp64."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

VOCAB = 64

SIZE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DEEPSEEK: dict[str, Any] = {
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2,
    "topk_group": 1, "moe_intermediate_size": 8, "first_k_dense_replace": 1, "head_dim": 4,
    "num_key_value_heads": 2, "n_shared_experts": 1,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2", {"final_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3", {"class": "Gemma3ForCausalLM", "config": "Gemma3TextConfig"}),
    "deepseek": ("DeepseekV3", DEEPSEEK),
    "cohere": ("Cohere", {"logit_scale": 0.25}),
    "granite": ("Granite", {"logits_scaling": 8.0}),
}
"""Name of the classes, and what differs from ``SIZE``."""


def tiny(family: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A causal language model of random weights."""
    import transformers

    name, own = FAMILIES[family]
    own = own | changes
    config = getattr(transformers, own.pop("config", f"{name}Config"))
    model = getattr(transformers, own.pop("class", f"{name}ForCausalLM"))
    torch.manual_seed(seed)
    made = model(config(**SIZE | own))
    made.set_experts_implementation("eager")  # grouped products have no fp64
    return made


REPORTED: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
"""The size of models in reported cases."""


def make(name: str, config: str | None = None, seed: int = 0, **options: Any) -> Any:
    """A model of random weights, by the name of its class."""
    import transformers

    family = name.removesuffix("ForCausalLM").removesuffix("ForConditionalGeneration")
    torch.manual_seed(seed)
    settings = getattr(transformers, config or f"{family}Config")(**options)
    return getattr(transformers, name)(settings).train()


def batch(rows: int = 3, length: int = 9) -> dict[str, Tensor]:
    """Prompts without labels, padding on the right."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    labels = ids.clone()
    for i in range(rows):
        labels[i, : i + 2] = -100
        labels[i, length - i :] = -100
        mask[i, length - i :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def tokenizer() -> Any:
    """Words ``w3`` … ``w63`` to their numbers; a chat is its messages, each ended by ``<eos>``."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(3, VOCAB))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
        chat_template="{% for m in messages %}{{ m.content }} <eos> {% endfor %}",
    )


def sentence(words: int, seed: int) -> str:
    """That many random words."""
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{int(i)}" for i in torch.randint(3, VOCAB, (words,), generator=generator))


def dense(student: Any, teacher: Any, data: dict[str, Tensor], temperature: float) -> Tensor:
    """Summed ``(1-w)·CE + w·T²·KL``, ``w = H_t / log V`` at temperature 1, from full logits."""
    inputs = {k: v for k, v in data.items() if k != "labels"}
    z_s = student(**inputs).logits[:, :-1]
    with torch.no_grad():
        z_t = teacher(**inputs).logits[:, :-1]
    labels = data["labels"][:, 1:]
    valid = labels != -100
    z_s, z_t, labels = z_s[valid], z_t[valid], labels[valid]
    lp_s, lp_t = (torch.log_softmax(z / temperature, -1) for z in (z_s, z_t))
    sure = torch.log_softmax(z_t, -1)
    entropy = -(sure.exp() * sure).sum(-1) / math.log(z_t.shape[-1])
    kl = (lp_t.exp() * (lp_t - lp_s)).sum(-1)
    ce = torch.nn.functional.cross_entropy(z_s, labels, reduction="none")
    return ((1 - entropy) * ce + entropy * temperature**2 * kl).sum()
