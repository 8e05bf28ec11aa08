"""One process of ``accelerate launch``: runs a script, and says how it was trained."""

import importlib.util
import runpy
import sys

if importlib.util.find_spec("deepspeed"):
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled

sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
accelerator = runpy.run_path(sys.argv[0], run_name="__main__")["trainer"].accelerator
print(f"trained by {accelerator.num_processes} processes of {accelerator.distributed_type.name}")
