"""A student trained by as many processes as there are; run by ``test_training_ranks.py``.

Interrupted by a signal to the last process, then resumed; the first one saves what came of it.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch

from bgkernels.training import distill, models, ranks
from bgkernels.training.config import DataConfig, DemoConfig, ModelShape, TrainConfig
from bgkernels.training.corpus import load_corpus
from bgkernels.training.errors import Interrupted
from bgkernels.training.materials import prepare
from bgkernels.training.progress import Silent
from tests.test_training import Signals

METHODS = ("entropy", "gkd")


def student(folder: Path, method: str, accumulate: int, stopped: bool):
    """Weights and losses of a student trained on ``folder/corpus``, and the error that came."""
    config = replace(
        DemoConfig.quick(),
        data=DataConfig(folder / "corpus", 300, sequence_length=16, batch_size=2, held_out=0.1),
        student_training=TrainConfig(5, 1e-2, accumulate=accumulate, validate_every=5),
        output=folder / f"{ranks.size()} {method}",
    )
    materials = prepare(config, load_corpus(config.data))
    stream = materials.batches.stream  # runs of 30 learnt tokens: batches have some, all or none
    batches = replace(materials.batches, learnt=torch.arange(len(stream)) % 90 < 30)
    materials = replace(materials, batches=batches)
    teacher = models.small_llama(ModelShape(16, 1, 1), len(materials.tokenizer), 16, 2)
    teacher.freeze()
    display = Silent()
    if stopped and ranks.rank() == ranks.size() - 1:
        display = Signals(2, signal.SIGTERM)
    try:
        trained, history = distill.train_student(config, materials, method, teacher, display)
    except Interrupted as stop:
        return None, [], str(stop)
    return trained.network.state_dict(), history.losses, None


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with ranks.joined():
        found = {
            method: [student(folder, method, 2, stopped) for stopped in (True, False)]
            for method in METHODS
        }
        torch.save(found, folder / f"rank{os.environ['RANK']}.pt")
