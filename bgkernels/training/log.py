"""What happened in a run: a line of JSON a step, and the same for TensorBoard."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bgkernels.training.errors import TrainingError, extra
from bgkernels.training.files import write_text


@dataclass(frozen=True)
class Log:
    """The file ``log.jsonl`` of a run.

    Args:
        path: of the file.

    Example:
        >>> import tempfile
        >>> log = Log(Path(tempfile.mkdtemp(), "log.jsonl"))
        >>> for step in (1, 2, 3):
        ...     log.write({"step": step, "loss": 1 / step})
        >>> log.rewind(1)
        >>> log.read()
        [{'step': 1, 'loss': 1.0}]
    """

    path: Path

    def write(self, record: dict[str, Any]) -> None:
        """Add a line.

        Raises:
            TrainingError: the disk is full or the folder is not writable.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise TrainingError(
                f"could not write {self.path}: {error.strerror or error}"
            ) from error

    def read(self) -> list[dict[str, Any]]:
        """All whole lines; a crash may have left half of one."""
        records = []
        for line in (
            self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else ()
        ):
            try:
                records.append(json.loads(line))
            except ValueError:
                continue
        return records

    def rewind(self, step: int) -> None:
        """Forget what came after a step: the run is resumed there."""
        if self.path.exists():
            kept = [r for r in self.read() if r["step"] <= step]
            text = "".join(json.dumps(r) + "\n" for r in kept)
            write_text(self.path, text)


class Board:
    """The same records as TensorBoard shows them, in an event file of each start of the run.

    Args:
        folder: to name to ``tensorboard --logdir``.
        step: that the run goes on from; TensorBoard forgets what an earlier file has after it.

    Raises:
        MissingExtra: the package ``tensorboard`` is not installed.
    """

    def __init__(self, folder: Path, step: int) -> None:
        with extra("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
        self._writer = SummaryWriter(folder, purge_step=step + 1)

    def write(self, record: dict[str, Any]) -> None:
        """Each value of a record as a scalar of its name, at the record's ``step``."""
        for name, value in record.items():
            if name != "step":
                self._writer.add_scalar(name, value, record["step"])
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


def peak_memory(device: torch.device) -> int:
    """Bytes that the process has had at most on a device; 0 where that cannot be known.

    Args:
        device: a GPU, of which torch's allocations count, or the CPU: resident memory.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
