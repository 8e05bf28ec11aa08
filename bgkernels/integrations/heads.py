"""Causal language models, cut where the loss needs it: between body and head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

_SCALES = (("logit_scale", 1), ("lm_head_multiplier", 1), ("logits_scaling", -1))
"""Config keys of a factor on the logits, and its power: Cohere, Falcon-H1, Granite."""


class HeadError(ValueError):
    """The head of a model cannot be read as one matrix, a bias, a scale and a soft-cap."""


@dataclass(frozen=True, eq=False)
class Head:
    """Hidden states to real logits: ``cap·tanh(scale·(x @ weight.T + bias) / cap)``.

    Args:
        weight: ``(vocab, hidden)``.
        bias: ``(vocab,)`` or None.
        logit_scale, logit_softcap: what the model does to the product.
    """

    weight: Tensor
    bias: Tensor | None
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Real logits of ``(..., hidden)`` states; for a few of them only."""
        logits = nn.functional.linear(hidden, self.weight, self.bias) * self.logit_scale
        cap = self.logit_softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    def detached(self, dtype: torch.dtype) -> Head:
        """The head of a teacher: whole tensors without gradient, gathered ones in ``dtype``."""
        bias = None if self.bias is None else _whole(self.bias, dtype)
        return Head(_whole(self.weight, dtype), bias, self.logit_scale, self.logit_softcap)


def causal_lm(model: Any) -> Any:
    """The causal language model inside DDP, FSDP, ``torch.compile`` and PEFT wrappers.

    Raises:
        HeadError: a PEFT method that changes the sequence, or no such model.
    """
    for wrapper in ("_orig_mod", "module", "_orig_mod"):
        model = getattr(model, wrapper, model)
    if hasattr(model, "get_base_model"):
        if getattr(model.active_peft_config, "is_prompt_learning", False):
            raise HeadError(
                "the model has a prompt-learning adapter, which adds positions that have no "
                "label; use LoRA or another adapter of weights"
            )
        model = model.get_base_model()
    if not hasattr(model, "get_output_embeddings"):
        raise HeadError(
            f"expected a transformers causal language model; got {type(model).__name__}"
        )
    return model


def read(model: Any) -> Head:
    """The head of a causal language model, its parameters as they are now.

    Args:
        model: a ``transformers`` model with a plain linear head, tied or not, wrapped or not.

    Raises:
        HeadError: there is none, it is quantised or adapted, or its weight is not in memory.
    """
    model = causal_lm(model)
    head = model.get_output_embeddings()
    if hasattr(head, "modules_to_save"):  # PEFT: a copy that is trained as a whole
        head = head.modules_to_save[head.active_adapters[0]]
    if type(head) is not nn.Linear:
        what = "no output head" if head is None else f"a head of type {type(head).__name__}"
        raise HeadError(
            f"{type(model).__name__} has {what}; the loss reads the weight of a plain "
            "torch.nn.Linear. Leave `lm_head` out of quantisation and of an adapter's "
            "target_modules, or merge the adapter: model.merge_and_unload()"
        )
    if head.weight.is_meta or hasattr(head.weight, "ds_id"):
        raise HeadError(
            "the weight of `lm_head` is not in memory here (a meta device, or DeepSpeed ZeRO-3); "
            "use FSDP2 or ZeRO-2, or keep the head on a device"
        )
    return Head(head.weight, head.bias, *_real_logits(model.config.get_text_config()))


def _real_logits(config: Any) -> tuple[float, float | None]:
    """Scale and soft-cap of a configuration (Gemma 2 has the latter)."""
    scale = 1.0
    for key, power in _SCALES:
        value = getattr(config, key, None)
        if isinstance(value, str):
            raise HeadError(f"the model's {key} is {value!r}; only a number can be read")
        scale *= float(value) ** power if value is not None else 1.0
    cap = getattr(config, "final_logit_softcapping", None)
    return scale, float(cap) if cap else None


def hidden_states(model: Any, **inputs: Any) -> Tensor:
    """``(batch, length, hidden)``: what the head of an unwrapped model is applied to."""
    hidden: Tensor = model.base_model(**inputs, use_cache=False, return_dict=True).last_hidden_state
    return hidden


def through(model: Any, function: Callable[..., Any], **inputs: Any) -> Any:
    """``function(causal_lm, **inputs)``, with the parameters of a sharded model gathered.

    FSDP does so around the forward of what it wraps, which is replaced for this call.
    """
    inner = causal_lm(model)
    sharded = isinstance(model, (FSDPModule, FullyShardedDataParallel))
    if not sharded:
        return function(inner, **inputs)
    own = inner.__dict__.get("forward")
    inner.forward = MethodType(function, inner)
    try:
        return model(**inputs)
    finally:
        del inner.forward
        if own is not None:
            inner.forward = own


def verify(model: Any) -> None:
    """Check on four tokens that body and head together are the whole of the model.

    Models whose weights are sharded or not in memory are passed: they cannot be run here.

    Raises:
        HeadError: the model does something else to its hidden states or logits.
    """
    model, head = causal_lm(model), read(model)
    if any(p.is_meta or hasattr(p, "device_mesh") for p in model.parameters()):
        return
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        raise HeadError(
            "config.output_router_logits is set, and the router's auxiliary loss would be lost; "
            "set it to False"
        )
    probe = torch.arange(4, device=model.get_input_embeddings().weight.device)[None]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            got = head(hidden_states(model, input_ids=probe).to(head.weight.device)).float()
            forward = getattr(model, "_original_forward", model.forward)  # without autocast
            expected = forward(input_ids=probe, use_cache=False).logits.float().to(got.device)
    finally:
        model.train(training)
    tolerance = 1e-4 if head.weight.dtype == torch.float32 else 3e-2
    if not (got - expected).abs().max() <= tolerance * expected.abs().max():
        raise HeadError(
            f"{type(model).__name__} does more to its logits than scale and soft-cap them, so they "
            "cannot be computed from its hidden states and head; choose another model"
        )


def _whole(x: Tensor, dtype: torch.dtype) -> Tensor:
    full_tensor = getattr(x, "full_tensor", None)  # of a DTensor, whose shards may be wider
    whole: Tensor = x if full_tensor is None else full_tensor().to(dtype)
    return whole.detach()
