"""Causal language models, cut where the loss needs it: between body and head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from bgkernels.integrations import zero3
from bgkernels.integrations.probe import tap as taps
from bgkernels.integrations.probe.curve import Curve, NotAHead, fit
from bgkernels.integrations.probe.tokens import embeddings, probe_tokens, settings


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
        logits = nn.functional.linear(hidden, self.weight, self.bias)
        if self.logit_scale != 1:
            logits = logits * self.logit_scale
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


def linear(model: Any) -> nn.Linear:
    """The layer that an unwrapped model multiplies its last hidden states by.

    Raises:
        HeadError: there is none, it is quantised or adapted, or its weight is not in memory.
    """
    head = model.get_output_embeddings()
    if hasattr(head, "modules_to_save"):  # PEFT: a copy that is trained as a whole
        chosen = [] if head.disable_adapters else head.active_adapters
        trained = chosen and all(name in head.modules_to_save for name in chosen)
        head = head.modules_to_save[chosen[0]] if trained else head.original_module
    if nn.Linear not in (type(head), _unsharded(head)):
        what = "no output head" if head is None else f"a head of type {type(head).__name__}"
        raise HeadError(
            f"{type(model).__name__} has {what}; the loss reads the weight of a plain "
            "torch.nn.Linear. Leave `lm_head` out of quantisation and of an adapter's "
            "target_modules, or merge the adapter: model.merge_and_unload()"
        )
    if head.weight.is_meta:
        raise HeadError(
            "the weight of `lm_head` is not in memory here, but on the meta device; load it, or "
            "keep the head on a device"
        )
    linear: nn.Linear = head
    return linear


def _unsharded(layer: Any) -> type | None:
    """The class of a layer that FSDP2 shards by itself, as accelerate does with the head."""
    return type(layer).__bases__[-1] if isinstance(layer, FSDPModule) else None


def read(model: Any) -> Head:
    """The head of a causal language model, its parameters as they are now.

    Scale and soft-cap are what was measured when the model last ran; of one that never did, a few
    tokens are run.

    Args:
        model: a ``transformers`` model with a plain linear head, tied or not, wrapped or not.

    Raises:
        HeadError: there is none, it is quantised or adapted, its weight is not in memory, or the
            model does more to its logits.
    """
    model = causal_lm(model)
    head = linear(model)
    tap = taps.on(head)
    if tap.curve is None:
        verify(model)
    curve = tap.curve or Curve()  # sharded, and never run: nothing was read of it yet
    return Head(head.weight, head.bias, curve.scale, curve.cap)


def with_head(
    model: Any, function: Callable[[Tensor, Head], tuple[Tensor, Any]], hidden: Tensor
) -> tuple[Tensor, Any]:
    """``function(hidden, head)`` while the head's parameters are in memory, in its backward too.

    Args:
        model: see :func:`read`.
        function: returns a tensor, through which all gradients flow, and what else is wanted.
        hidden: states, through which they flow on.

    Raises:
        HeadError: see :func:`read`.
    """
    layer = linear(causal_lm(model))
    if zero3.gathers(layer):
        return zero3.within(layer, lambda x: function(x, read(model)), hidden)
    return function(hidden, read(model))


def hidden_states(model: Any, **inputs: Any) -> Tensor:
    """``(batch, length, hidden)``: what the head of an unwrapped model is applied to.

    The model runs its own forward, without the product with its head.

    Raises:
        HeadError: see :func:`until_head`.
    """
    return until_head(model, model.forward, inputs)[1]


def until_head(
    model: Any, forward: Callable[..., Any], inputs: Mapping[str, Any]
) -> tuple[Any, Tensor]:
    """Run a model up to its head, and what follows on no logits.

    The first time, a few positions go on, and scale and soft-cap are measured on them.

    Args:
        model: unwrapped.
        forward: of the model, its own or one around it.
        inputs: of the forward, without labels.

    Returns:
        Its output, whose logits mean nothing, and ``(batch, length, hidden)`` states.

    Raises:
        HeadError: the head is not called, or more than once, or not on a state a position, or the
            model does more to its logits than scale and soft-cap them.
    """
    head = linear(model)
    if zero3.away(head):
        raise HeadError(
            f"the parameters of {type(model).__name__} are partitioned by DeepSpeed ZeRO-3, and no "
            "engine gathers them; make one: model = deepspeed.initialize(model=model, config=...)"
            "[0], or accelerator.prepare(model)"
        )
    tap = taps.on(head)
    if tap.settings is None:
        tap.settings = settings(model)
    measuring = tap.curve is None
    tap.open(measuring)
    try:
        output = forward(**{**inputs, **tap.settings})
    finally:
        hidden, calls = tap.close(), tap.calls
    if hidden is None or calls != 1 or hidden.ndim != 3:
        times = {0: "never", 1: f"on a tensor of shape {tuple(getattr(hidden, 'shape', ()))}"}
        raise HeadError(
            f"{type(model).__name__} calls the head that get_output_embeddings() names "
            f"{times.get(calls, f'{calls} times')}; expected once, on (batch, length, hidden). "
            "Choose another class or checkpoint of the model"
        )
    if measuring:
        try:
            tap.curve = fit(output.logits, head.out_features, model.config.get_text_config())
        except NotAHead as found:
            raise HeadError(
                f"{type(model).__name__} does more to its logits than scale and soft-cap them "
                f"({found}), so they cannot be computed from its hidden states and head; choose "
                "another model"
            ) from None
    return output, hidden


def through(model: Any, function: Callable[..., Any], **inputs: Any) -> Any:
    """``function(causal_lm, **inputs)``, with the parameters of a sharded model gathered.

    FSDP does so around the forward of what it wraps, and DeepSpeed counts modules from there; it is
    replaced for this call.
    """
    inner = causal_lm(model)
    sharded = isinstance(model, (FSDPModule, FullyShardedDataParallel))
    sharded = sharded or any(map(zero3.partitioned, inner.parameters()))
    if not sharded:
        return function(inner, **inputs)
    own = inner.__dict__.get("forward")

    def restore() -> None:
        inner.__dict__.pop("forward", None)
        if own is not None:
            inner.forward = own

    def call(self: Any, **inputs: Any) -> Any:
        restore()  # the function may run the model
        return function(self, **inputs)

    inner.forward = MethodType(call, inner)
    try:
        return model(**inputs)
    finally:
        restore()


def verify(model: Any) -> None:
    """Check on a few tokens that a model's logits are those of one head, and measure its curve.

    Models whose weights are sharded or not in memory cannot be run here; they are measured in their
    first forward. The model's own loss does not matter: see
    :func:`bgkernels.integrations.probe.loss.examine` for a student's.

    Raises:
        HeadError: the model does something else to its hidden states or logits, or does not run.
    """
    model = causal_lm(model)
    taps.on(linear(model)).curve = None
    if runs_here(model):
        with tried(model) as tokens:
            decoder = getattr(model.config, "is_encoder_decoder", False)
            more = {"decoder_input_ids": tokens["input_ids"]} if decoder else {}
            hidden_states(model, **tokens, **more)


def runs_here(model: Any) -> bool:
    """Whether an unwrapped model can be run in this process alone."""
    return not any(
        p.is_meta or hasattr(p, "device_mesh") or zero3.partitioned(p) for p in model.parameters()
    ) and not any(isinstance(m, FullyShardedDataParallel) for m in model.modules())


@contextmanager
def tried(model: Any) -> Iterator[dict[str, Tensor]]:
    """Tokens for a model that is evaluated inside the block, and is afterwards as it was.

    Raises:
        HeadError: the model cannot run on these tokens.
    """
    training = {module: module.training for module in model.modules()}
    table = embeddings(model)
    device = (next(model.parameters()) if table is None else table).device
    model.eval()
    try:
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
        ):
            torch.manual_seed(0)
            yield {"input_ids": probe_tokens(model).to(device)}
    except HeadError:
        raise
    except Exception as error:  # whatever a model's code raises
        reason = (str(error) or "no message").splitlines()[0]
        raise HeadError(
            f"{type(model).__name__} cannot be tried on a few tokens: {type(error).__name__}: "
            f"{reason}. The loss is attached to models that run on `input_ids` alone"
        ) from error
    finally:
        for module, mode in training.items():
            module.training = mode


def _whole(x: Tensor, dtype: torch.dtype) -> Tensor:
    full_tensor = getattr(x, "full_tensor", None)  # of a DTensor, whose shards may be wider
    whole: Tensor = x if full_tensor is None else full_tensor().to(dtype)
    return whole.detach()
