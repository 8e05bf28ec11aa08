"""Checkpoints that survive a crash, a full disk and a flipped bit.

A checkpoint is an ordinary ``torch.save`` file, ``step-00000200.pt``. It is written beside its
name and moved over it when it is complete, so an interrupted write leaves the one before. It
carries the identity of its run (configuration, data and initial weights), and its zip checksums are
verified before anything is read from it.
"""

from __future__ import annotations

import logging
import pickle
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions

from bgkernels.training.errors import CheckpointError, TrainingError
from bgkernels.training.files import write_atomically

log = logging.getLogger(__name__)

State = dict[str, Any]
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
"""States as one process has them, in the memory of the first: for files, whoever goes on."""
_UNREADABLE = (
    OSError,
    RuntimeError,
    pickle.UnpicklingError,
    EOFError,
    KeyError,
    ValueError,
    zlib.error,
)


class _Corrupt(Exception):
    """Why a file is not a checkpoint."""


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of one run, in one folder.

    Args:
        folder: where they are; made when the first is written.
        identity: what the run is, as plain values. A checkpoint of another identity is refused.
        keep: how many of the newest stay.

    Example:
        >>> import tempfile
        >>> store = CheckpointStore(Path(tempfile.mkdtemp()), {"steps": 10})
        >>> store.save(5, {"weights": torch.zeros(3)}).name
        'step-00000005.pt'
        >>> store.load()["weights"]
        tensor([0., 0., 0.])
    """

    folder: Path
    identity: Mapping[str, Any]
    keep: int = 2

    def paths(self) -> list[Path]:
        """The files, newest first."""
        return sorted(self.folder.glob("step-*.pt"), reverse=True)

    def path(self, step: int) -> Path:
        """The file of a step."""
        return self.folder / f"step-{step:08d}.pt"

    def save(self, step: int, state: State) -> Path:
        """Write a checkpoint, then remove those that are too old.

        Raises:
            CheckpointError: it could not be written; the ones before it are as they were.
        """
        path = self.path(step)
        content = {"identity": dict(self.identity), "step": step, "state": state}
        try:
            write_atomically(path, lambda file: torch.save(content, file))
        except TrainingError as error:
            raise CheckpointError(
                f"{error}. {self._what_is_left()}; free some space, then run the same command again"
            ) from error
        for old in self.paths()[self.keep :]:
            old.unlink(missing_ok=True)
        return path

    def load(self) -> State | None:
        """The newest good state, or None where nothing has been saved.

        A corrupt file is reported by name and the one before it is taken.

        Raises:
            CheckpointError: every file is corrupt, or the newest good one is of another run.
        """
        paths = self.paths()
        for path in paths:
            try:
                content = _read(path)
            except _Corrupt as error:
                log.warning("%s is corrupt (%s); trying the checkpoint before it", path, error)
                continue
            self._check_identity(path, content["identity"])
            state: State = content["state"]
            return state
        if paths:
            raise CheckpointError(
                f"{paths[0]} is corrupt and no earlier checkpoint is good; "
                f"delete {self.folder} to start this run over"
            )
        return None

    def newest(self) -> Path | None:
        """The newest file, or None."""
        return next(iter(self.paths()), None)

    def clear(self) -> None:
        """Forget every checkpoint of this run."""
        for path in self.paths():
            path.unlink(missing_ok=True)

    def _what_is_left(self) -> str:
        newest = self.newest()
        return f"{newest} is intact" if newest else "No earlier checkpoint exists"

    def _check_identity(self, path: Path, found: Mapping[str, Any]) -> None:
        keys = sorted(found.keys() | self.identity.keys())
        differences = [
            f"{key} is {found.get(key)!r} there and {self.identity.get(key)!r} here"
            for key in keys
            if found.get(key) != self.identity.get(key)
        ]
        if differences:
            raise CheckpointError(
                f"{path} belongs to another configuration: {'; '.join(differences)}. Run with the "
                "options of that run, name another --output, or pass --fresh to start over"
            )


def _read(path: Path) -> dict[str, Any]:
    """The content of a file whose checksums hold."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            raise _Corrupt(f"the checksum of {broken} does not match")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except zipfile.BadZipFile as error:
        raise _Corrupt("it is truncated or not a checkpoint") from error
    except _UNREADABLE as error:
        raise _Corrupt(f"it cannot be read: {error}") from error
    if not isinstance(content, dict) or content.keys() != {"identity", "step", "state"}:
        raise _Corrupt("it is not a checkpoint of bgkernels")
    return content
