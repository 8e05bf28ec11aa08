"""Files that are either whole or absent."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

from bgkernels.training.errors import TrainingError


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file so that a crash or a full disk leaves the old one, or the new one, never half.

    Args:
        path: where the file will be; its folder is made where it is missing.
        write: called with an open binary file in the same folder, which then replaces ``path``.

    Raises:
        TrainingError: the disk is full or the folder is not writable; nothing has changed.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "note.txt")
        >>> write_atomically(path, lambda file: file.write(b"whole"))
        >>> path.read_bytes()
        b'whole'
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise TrainingError(f"could not write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically; NaN, which JSON lacks, is an error."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, atomically."""
    write_atomically(path, lambda file: file.write(text.encode()))


def digest(parts: Iterable[bytes]) -> str:
    """Sixteen hexadecimal digits that identify a sequence of byte strings."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(len(part).to_bytes(8, "little"))  # so that ("ab", "c") is not ("a", "bc")
        sha.update(part)
    return sha.hexdigest()[:16]


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable; only POSIX can open a folder."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
