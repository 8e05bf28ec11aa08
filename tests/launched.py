"""One process of ``accelerate launch``: runs a script, and says how it was trained."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

BEGIN, STATE = AcceleratorState.__init__, Accelerator.get_state_dict


def begin(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    """accelerate's own, which on CPUs takes no notice of a configuration of FSDP."""
    BEGIN(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin


def gathered(self: Any, model: Any, **kwargs: Any) -> Any:
    """accelerate's own, whose values are not waited for on CPUs."""
    state = STATE(self, model, **kwargs)
    for name, x in (state or {}).items():  # None where another process writes it
        state[name] = x.full_tensor().clone() if hasattr(x, "full_tensor") else x
    return state


AcceleratorState.__init__, Accelerator.get_state_dict = begin, gathered
if importlib.util.find_spec("deepspeed"):
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled

sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
trainer = runpy.run_path(sys.argv[0], run_name="__main__")["trainer"]
head = trainer.model.get_output_embeddings()
parts = hasattr(head.weight, "ds_id") or type(head).__name__ == "FSDPLinear"
kind = trainer.accelerator.distributed_type.name
print(f"{kind}: {trainer.accelerator.num_processes} processes, {parts=}")
