"""Reference training: a loop to read, run and copy, and the demo that ``make demo`` runs.

The package uses the public API of :mod:`bgkernels` only. Nothing is downloaded: the text is the
interpreter's own standard library, the models start from random weights.

In the order in which a reader may want them: :mod:`~bgkernels.training.distill` (the loss of a
training step), :mod:`~bgkernels.training.loop`, :mod:`~bgkernels.training.evaluate` (the measures),
:mod:`~bgkernels.training.demo` (all together).
"""

from bgkernels.training.ahead import prefetch_teacher
from bgkernels.training.checkpoint import CheckpointStore
from bgkernels.training.config import (
    DataConfig,
    DemoConfig,
    EvalConfig,
    LossConfig,
    ModelShape,
    TrainConfig,
)
from bgkernels.training.demo import run_demo
from bgkernels.training.errors import TrainingError
from bgkernels.training.loop import History, Progress, Task, train
from bgkernels.training.methods import METHODS, Method
from bgkernels.training.results import DemoResult

__all__ = [
    "METHODS",
    "CheckpointStore",
    "DataConfig",
    "DemoConfig",
    "DemoResult",
    "EvalConfig",
    "History",
    "LossConfig",
    "Method",
    "ModelShape",
    "Progress",
    "Task",
    "TrainConfig",
    "TrainingError",
    "prefetch_teacher",
    "run_demo",
    "train",
]
