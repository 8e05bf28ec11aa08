"""Models whose parameters are split over the processes, and gathered where they are used.

FSDP2 (:func:`torch.distributed.fsdp.fully_shard`) gathers a decoder layer for the layer's forward
and backward, and what is outside of the layers (embedding, last norm, head) for the model's own. We
never run that forward, but a model's body, then a loss that reads its head. So a sharded model has
one more method, which calls any work as such a forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from bgkernels.training import ranks
from bgkernels.training.config import DemoConfig
from bgkernels.training.errors import OptionError
from bgkernels.training.models import CausalLM

T = TypeVar("T")
GATHERED = "call_gathered"
"""Name of that method."""


def place(model: CausalLM, config: DemoConfig, bf16: bool = False) -> CausalLM:
    """Bring a model to this process's device, or its share of it, in place.

    Args:
        model: whole, and the same on every process.
        config: says where, and how it is shared.
        bf16: as for :func:`shard`.

    Raises:
        OptionError: there is no such device, or nobody to share with.
    """
    device = ranks.device(config.device)
    if config.parallel == "fsdp":
        shard(model, device, bf16)
    else:
        model.network.to(device)
    return model


def shard(model: CausalLM, device: torch.device, bf16: bool = False) -> None:
    """Share out a model's parameters among all processes, layer by layer, in place.

    Args:
        model: whole, and the same on every process.
        device: of the shares; the model may be elsewhere, where there is room for it.
        bf16: gather parameters in bfloat16; shards, gradients and their sums stay as they are.

    Raises:
        OptionError: there is one process, which was not started by ``torchrun``.
    """
    if not ranks.together():
        raise OptionError(
            "--parallel fsdp splits models over the processes of torchrun; start this as "
            "`torchrun --nproc-per-node N -m bgkernels.training ...`"
        )
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    mesh = init_device_mesh(device.type, (ranks.size(),))
    share = partial(fully_shard, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    network = model.network
    for layer in _layers(network):
        share(layer)
    share(network)
    setattr(network, GATHERED, lambda work: work())
    register_fsdp_forward_method(network, GATHERED)


def _layers(network: Any) -> list[nn.Module]:
    """The modules that ``transformers`` wants in one piece: decoder layers."""
    names = network._no_split_modules or ()
    return [module for module in network.modules() if type(module).__name__ in names]


def whole(models: Iterable[CausalLM | None], work: Callable[[], T]) -> T:
    """What ``work`` returns, called where all parameters of the models are in memory.

    Every process must come here. Of models that are not sharded nothing is asked.

    Args:
        models: that the work reads, or None.
        work: may run bodies, read heads, and return a loss to differentiate.

    Example:
        >>> whole([None], lambda: 3)
        3
    """
    for network in dict.fromkeys(model.network for model in models if model is not None):
        if isinstance(network, FSDPModule):
            work = partial(getattr(network, GATHERED), work)
    return work()


def sharded(model: CausalLM) -> bool:
    """Whether all processes must run the model together, each as often as the others."""
    return isinstance(model.network, FSDPModule)
