"""One process of two: steps under DeepSpeed ZeRO-3, in a plain loop and in the ``Trainer``.

Run by ``integrations/test_zero3.py``, which compares what is saved with one process.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from bgkernels.integrations.causal_lm import attach
from tests.integrations.test_transformers import SHANNON
from tests.models import REPORTED, batch, tiny

OPTIONS = {"routing": SHANNON, "temperature": 2.0}
RATE, STEPS, ROWS = 0.1, 2, 4
CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": ROWS // 2,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,
}


def whole(model: Any) -> dict[str, torch.Tensor]:
    """All parameters, which must be in parts."""
    parameters = dict(model.named_parameters())
    assert all(not p.numel() and p.ds_id is not None for p in parameters.values())
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        return {name: p.detach().clone() for name, p in parameters.items()}


def plain(student: Any, teacher: Any, **options: Any) -> dict[str, torch.Tensor]:
    """Parameters after some steps of a plain loop."""
    attach(student, teacher, **OPTIONS, **options)
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], RATE)
    engine, *_ = deepspeed.initialize(model=student, optimizer=optimizer, config=CONFIG)
    everything = batch(rows=ROWS)
    data = {k: v[dist.get_rank() :: 2] for k, v in everything.items()}
    items = (everything["labels"][:, 1:] != -100).sum() / dist.get_world_size()
    for _ in range(STEPS):
        engine.backward(engine(**data, num_items_in_batch=items).loss)
        engine.step()
    return whole(student)


if __name__ == "__main__":
    import time
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    t=time.time()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled
    deepspeed.init_distributed("gloo")
    print("init", time.time()-t)
    found = {}
    t=time.time()
    found["untied"] = plain(tiny(**REPORTED), tiny(seed=1, **REPORTED))
    print("untied", time.time()-t)
    t=time.time()
    teacher = deepspeed.initialize(model=tiny(seed=1, **REPORTED), config=CONFIG)[0]
    found["tied"] = plain(tiny("llama tied", **REPORTED), teacher)
    print("tied", time.time()-t)
    if dist.get_rank() == 0:
        torch.save(found, folder / "found.pt")
    dist.destroy_process_group()
