"""One process of two: a step through DDP in the ``Trainer``, and one through FSDP2 in a plain loop.

Run by ``integrations/test_trainers_distributed.py``, which compares what is saved with one process.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from bgkernels.integrations.causal_lm import attach
from tests.integrations.steps import SHANNON, trained
from tests.integrations.two_tokenizers import Pair
from tests.models import batch, tiny

OPTIONS = {"routing": SHANNON, "temperature": 2.0}


def ddp(folder: Path) -> dict[str, torch.Tensor]:
    """Parameters after one step of two processes on two examples each, twice accumulated."""
    student = tiny()
    trained(student, folder, gradient_accumulation_steps=2, ddp_backend="gloo")
    return {name: p.detach() for name, p in student.named_parameters()}


def mine(data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The rows of this process."""
    return {name: x[dist.get_rank() :: 2] for name, x in data.items()}


def fsdp(tied: bool, apart: bool = False) -> dict[str, torch.Tensor]:
    """Gradients of a sharded student that learns from a sharded teacher.

    Args:
        tied: whether the student's head is its embedding.
        apart: whether the heads are sharded apart from the rest.
    """
    mesh = init_device_mesh("cpu", (2,))
    student = tiny("llama tied" if tied else "llama")
    teacher = tiny(seed=1, hidden_size=24)
    attach(student, teacher, **OPTIONS)
    for model in (student, teacher):
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        if apart:  # as accelerate does
            tail = [model.model.norm, model.lm_head]
            fully_shard(tail, mesh=mesh, reshard_after_forward=model is teacher)
        fully_shard(model, mesh=mesh, reshard_after_forward=True)
    data = mine(batch(rows=4))
    items = (batch(rows=4)["labels"][:, 1:] != -100).sum() / dist.get_world_size()
    student(**data, num_items_in_batch=items).loss.backward()
    return {name: p.grad.full_tensor() for name, p in student.named_parameters()}


def two_tokenizers(folder: Path) -> dict[str, torch.Tensor]:
    """Gradients of a sharded student and a sharded teacher that has another tokenizer."""
    pair = Pair.load(folder)
    student, teacher = pair.models()
    attach(student, teacher, routing="static", **pair.both)
    for model in (student, teacher):
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    data, whole = mine(pair.batch(rows=4)), pair.batch(rows=4)
    items = (whole["labels"][:, 1:] != -100).sum() / dist.get_world_size()
    student(**data, num_items_in_batch=items).loss.backward()
    return {name: p.grad.full_tensor() for name, p in student.named_parameters()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    found = {"ddp": ddp(folder), "fsdp": fsdp(tied=False), "fsdp tied": fsdp(tied=True)}
    found["two tokenizers"] = two_tokenizers(folder)
    found["fsdp apart"] = fsdp(tied=False, apart=True)
    if dist.get_rank() == 0:
        torch.save(found, folder / "found.pt")
    dist.destroy_process_group()
