"""A student trained by as many processes as there are; run by ``test_training_ranks.py``.

Interrupted by a signal to the last process, then resumed; the first one saves what came of it.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from bgkernels.training import distill, models, ranks, sharding
from bgkernels.training.config import DataConfig, DemoConfig, ModelShape, TrainConfig
from bgkernels.training.corpus import load_corpus
from bgkernels.training.demo import run_demo
from bgkernels.training.errors import Interrupted
from bgkernels.training.materials import prepare
from bgkernels.training.progress import Silent
from tests.training.signals import Signals

CASES = [("entropy", "ddp"), ("gkd", "ddp"), ("entropy", "fsdp"), ("gkd", "fsdp")]
"""Methods, and how the models are shared."""
ADAPTED = ("static", "fsdp")
"""The same, of a student with an adapter whose activations are computed again."""
if find_spec("peft"):
    CASES.append(ADAPTED)


RUNS = {"straight": False, "stopped": True, "resumed": False}
"""Runs of a case, and whether a signal stops them; the last two are one."""


def student(folder: Path, case: tuple[str, str], accumulate: int, stopped: bool = False):
    """Weights and losses of a student trained on ``folder``'s corpus, and the error that came."""
    method, parallel = case
    parallel = parallel if ranks.together() else "ddp"
    config = replace(
        DemoConfig.quick(),
        data=DataConfig(
            folder.parent / "corpus", vocab=300, sequence_length=16, batch_size=2, held_out=0.1
        ),
        student_training=TrainConfig(
            5,
            1e-2,
            accumulate=accumulate,
            validate_every=5,
            gradient_checkpointing=case == ADAPTED,
        ),
        lora=3 if case == ADAPTED else None,
        output=folder / " ".join(case),
        parallel=parallel,
        device="cpu",
    )
    materials = prepare(config, load_corpus(config.data))
    stream = materials.batches.stream  # runs of 30 learnt tokens: batches have some, all or none
    batches = replace(materials.batches, learnt=torch.arange(len(stream)) % 90 < 30)
    materials = replace(materials, batches=batches)
    teacher = models.small_llama(ModelShape(16, 1, 1), len(materials.tokenizer), 16, 2)
    teacher.freeze()
    if parallel == "fsdp":
        sharding.shard(teacher, torch.device("cpu"))
    display = Silent()
    if stopped and ranks.rank() == ranks.size() - 1:
        display = Signals(2, signal.SIGTERM)
    try:
        trained, history = distill.train_student(config, materials, method, teacher, display)
    except Interrupted as stop:
        return None, [], str(stop)
    state = get_model_state_dict(trained.network, options=StateDictOptions(full_state_dict=True))
    return state, history.losses, None


def bf16() -> dict[str, list[str]]:
    """Dtypes of a sharded model's head, and whether it is a share: gathered, kept, and gradient."""
    model = models.small_llama(ModelShape(16, 2, 1), 32, 8, 0)
    sharding.shard(model, torch.device("cpu"), bf16=True)
    found = {}

    def note(name: str, x: torch.Tensor) -> None:
        found[name] = [str(x.dtype), type(x).__name__]

    def work():
        note("gathered", model.head.weight.data)
        return model.hidden(torch.arange(8)[None]).float().sum()

    sharding.whole([model, None, model], work).backward()
    note("kept", model.head.weight.data)
    note("gradient", model.network.model.layers[0].mlp.up_proj.weight.grad)
    return found


def demo(folder: Path):
    """The measures of a whole demo: both models trained, scored and saved under FSDP."""
    training = TrainConfig(4, 1e-2, validate_every=4, accumulate=2 // ranks.size())
    config = replace(
        DemoConfig.quick(),
        data=DataConfig(
            folder.parent / "corpus", vocab=300, sequence_length=16, batch_size=2, held_out=0.1
        ),
        teacher_training=training,
        student_training=training,
        methods=("entropy",),
        output=folder,
        parallel="fsdp" if ranks.together() else "ddp",
        device="cpu",
    )
    return run_demo(config).plain()["students"]["entropy"]["measures"]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with ranks.joined(torch.device("cpu")):
        found = {
            case: {
                run: student(folder / run.replace("resumed", "stopped"), case, 2, stopped)
                for run, stopped in RUNS.items()
            }
            for case in CASES
        }
        found["bf16"] = bf16()
        found["demo"] = demo(folder / "two")
        torch.save(found, folder / f"rank{os.environ['RANK']}.pt")
