"""DeepSpeed ZeRO-3, whose parameters are in memory only while the module that has them runs.

So a layer is called as a module, with another function in the place of its forward: DeepSpeed's own
hooks gather the layer's parameters around the function and around its backward, and reduce and
partition their gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def partitioned(x: Tensor) -> bool:
    """Whether DeepSpeed keeps a parameter in parts, one on each process."""
    return hasattr(x, "ds_id")


def shape(x: Tensor) -> torch.Size:
    """The shape of a parameter, of all its parts together."""
    whole: torch.Size = getattr(x, "ds_shape", x.shape)
    return whole


def gathers(layer: nn.Module) -> bool:
    """Whether an engine of DeepSpeed gathers the parameters of a layer when it is called."""
    hooks = layer._forward_pre_hooks.values()
    return any(map(partitioned, layer.parameters(recurse=False))) and any(
        str(getattr(hook, "__module__", "")).startswith("deepspeed.") for hook in hooks
    )


def away(layer: nn.Module) -> bool:
    """Whether the parameters of a layer are in parts, and nothing would gather them."""
    parts = [p for p in layer.parameters(recurse=False) if partitioned(p) and not p.numel()]
    return bool(parts) and not gathers(layer)


def within(
    layer: nn.Module, function: Callable[[Tensor], tuple[Tensor, Any]], x: Tensor
) -> tuple[Tensor, Any]:
    """``function(x)``, with the parameters of a layer in memory, in its backward too.

    Args:
        layer: that an engine gathers.
        function: returns a tensor, through which all gradients flow, and what else is wanted.
        x: its input, through which they flow on.
    """
    before, rest = layer.__dict__.get("forward"), []

    def forward(x: Tensor) -> Tensor:
        value, more = function(x)
        rest.append(more)
        return value

    layer.forward = forward
    try:
        value = layer(x)
    finally:
        del layer.forward
        if before is not None:
            layer.forward = before
    return value, rest[-1]


def engine(model: nn.Module, config: Mapping[str, Any]) -> Any:
    """A frozen model under an engine of its own, which gathers its parameters as it runs.

    Args:
        model: in parts.
        config: of DeepSpeed, for the student; what it says of parameters is used.
    """
    import deepspeed

    dtype = next(model.parameters()).dtype
    of_parameters = {
        name: value
        for name, value in config["zero_optimization"].items()
        if name != "offload_optimizer" and value != "auto"
    }
    made, *_ = deepspeed.initialize(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": of_parameters,
            "bf16": {"enabled": dtype == torch.bfloat16},
            "fp16": {"enabled": dtype == torch.float16},
        },
    )
    return made
