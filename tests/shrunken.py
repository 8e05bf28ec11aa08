"""Configurations of ``transformers``, made so small that any machine builds the model."""

from __future__ import annotations

from typing import Any

SMALL: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "emb_dim": 32,
    "intermediate_size": 48, "ffn_dim": 48, "d_ff": 48, "ffn_hidden_size": 48, "d_inner": 48,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "depth": 2,
    "encoder_layers": 2, "decoder_layers": 2, "num_decoder_layers": 2, "num_encoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "d_kv": 8, "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "moe_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_topk": 2, "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "n_group": 1, "topk_group": 1,
    "n_groups": 1, "first_k_dense_replace": 1, "embedding_size": 32, "input_embedding_size": 32,
    "output_embedding_size": 40, "state_size": 4, "ssm_state_size": 4, "mamba_d_state": 4,
    "expand": 2, "shared_expert_intermediate_size": 16, "mamba_n_heads": 4, "mamba_d_head": 16,
    "mamba_n_groups": 1, "mamba_num_heads": 4, "mamba_head_dim": 16, "num_buckets": 2,
    "word_embed_proj_dim": 32, "rotary_dim": 8, "expert_intermediate_size": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 4,
    "patch_size": 4, "image_size": 8, "num_channels": 3, "projection_dim": 32, "hidden_act": "gelu",
    "mm_hidden_size": 32, "out_hidden_size": 32, "embed_dim": 32, "output_dim": 32,
    "encoder_hidden_size": 32, "cross_hidden_size": 32, "qformer_hidden_size": 32,
    "num_mel_bins": 8,
    "num_query_tokens": 2, "max_source_positions": 32, "initializer_range": 0.1, "init_std": 0.1,
    "attention_dropout": 0.0, "dropout": 0.0, "hidden_dropout": 0.0, "block_size": 2,
    "axial_pos_embds_dim": (8, 24), "axial_pos_shape": (4, 16), "attention_window": 4,
    "lru_width": 32, "mlp_dim": 48, "fc_inner_size": 48, "inner_dim": 48, "ffn_size": 48,
}  # fmt: skip
KEPT = {"hidden_act"}
"""Settings of vision towers that stay as they are."""
OWN: dict[str, dict[str, Any]] = {
    "FalconH1ForCausalLM": {"mamba_d_ssm": 64},
    "Mamba2ForCausalLM": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "CohereCompassForCausalLM": {"layer_types": ["full_attention", "full_attention"]},
    "Dots1ForCausalLM": {"num_key_value_heads": 2, "n_shared_experts": 1},
}
"""What a class needs beside."""


def shrunken(model_type: str, made: Any, kind: str) -> Any:
    """A small configuration of a class.

    Args:
        model_type: of the configuration.
        made: the class.
        kind: of it.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    family = made.config_class or CONFIG_MAPPING[model_type]
    config = small(family, OWN.get(made.__name__, {}))
    if kind == "encoder–decoder":
        config.decoder_start_token_id = 1
    elif hasattr(config, "is_decoder"):
        config.is_decoder = True
    return config


def small(family: Any, own: dict[str, Any]) -> Any:
    """A configuration of a family, and those that it holds, in small numbers."""
    plain = family()
    names = set(vars(plain)) | set(getattr(family, "attribute_map", {}))
    given = {k: v for k, v in SMALL.items() if k in names and k not in KEPT}
    inner = {
        k: v for k, v in vars(plain).items() if hasattr(v, "to_dict") and hasattr(v, "model_type")
    }
    given |= {k: small(type(v), own.get(k, {})) for k, v in inner.items()}
    if "qk_rope_head_dim" in names:  # attention through latents: keys of every head apart
        given |= {k: v for k, v in {"head_dim": 4, "num_key_value_heads": 4}.items() if k in names}
    rope = getattr(plain, "rope_parameters", None)
    if isinstance(rope, dict) and "mrope_section" in rope:
        given["rope_parameters"] = rope | {"mrope_section": [2, 1, 1]}
    given |= {k: v for k, v in own.items() if k not in inner}
    try:
        return family(**given)
    except Exception:
        for name, x in given.items():
            setattr(plain, name, x)
        return plain
