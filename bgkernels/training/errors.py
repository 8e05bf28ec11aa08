"""What can go wrong in a training run, each with its remedy in the message."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class TrainingError(RuntimeError):
    """A run cannot start or go on; the message names the cause and the remedy."""


class CorpusError(TrainingError):
    """The corpus holds no text, or too little of it."""


class ModelError(TrainingError):
    """A model or tokenizer cannot be used; the message names the option that chose it."""


class OptionError(TrainingError):
    """An option of the loss is unknown or out of range; the message is the library's."""


class CheckpointError(TrainingError):
    """A checkpoint is corrupt, belongs to another configuration, or could not be written."""


class NonFiniteLoss(TrainingError):
    """The loss or its gradient became NaN or infinite; the weights before that step are kept."""


class OutOfMemory(TrainingError):
    """A step needs more memory than there is; the message says what to lower."""


class MissingExtra(TrainingError, ImportError):
    """A package of an extra, such as ``training``, is not installed."""


class Interrupted(TrainingError):
    """A signal stopped the run after it had saved its state.

    Args:
        message: what was saved, and how to go on.
        signum: the signal, for the exit status ``128 + signum``.
    """

    def __init__(self, message: str, signum: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.signum = signum


@contextmanager
def enough_memory(name: str, step: int) -> Iterator[None]:
    """Turn a failed allocation inside the block into a message that says what to lower.

    Args:
        name: of the run.
        step: that the block belongs to.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if isinstance(error, TrainingError) or not (known or "memory" in str(error).lower()):
            raise
        raise OutOfMemory(
            f"{name}: out of memory at step {step}. Lower --memory-budget (temporaries of the "
            "loss), then --batch-size with as much more --accumulate, then --sequence-length; "
            "--gradient-checkpointing saves activations, --parallel fsdp splits the models"
        ) from error


@contextmanager
def extra(name: str = "training") -> Iterator[None]:
    """Turn a failed import inside the block into a message that says what to install.

    Args:
        name: of the extra that has the package.

    Example:
        >>> with extra():
        ...     import matplotlib
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"this needs the package {error.name!r}, which is not installed; "
            f"run: pip install 'bgkernels[{name}]'"
        ) from error
