"""A folder of shards that are whole or absent, with a manifest that is written last.

A shard is written beside its name, synchronised and renamed; then its receipt, a JSON file of the
same name, says that it is done. When every receipt is there, ``manifest.json`` is written. So a run
may be killed anywhere: run again, it makes what has no receipt, and the files are the same.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from bgkernels.labels.errors import CorruptLabels, LabelError
from bgkernels.training.errors import TrainingError, extra
from bgkernels.training.files import write_atomically, write_json

FORMAT, VERSION = "bgkernels-labels", 1
MANIFEST = "manifest.json"
REDO = "delete it, and run what made these labels again: only missing shards are made"


@dataclass(frozen=True, kw_only=True)
class Info:
    """What labels are of; two sets of labels are interchangeable where all of this is the same.

    Args:
        model: name of the teacher.
        weights: digest of its weights; empty where unknown.
        tokenizer: fingerprint of the texts' tokenizer (:func:`~bgkernels.labels.fingerprint`);
            empty where unknown.
        match: fingerprint of the match of that tokenizer, the student's, with the teacher's; empty
            where they share one.
        data: fingerprint of the texts.
        vocab: columns of the teacher.
        k: kept entries of a token; rows may have fewer, or one more where a server added its own.
        temperature: of log-probabilities, entropy and power sum.
        gamma: exponent of the power sum; None where there is none.
        seed: of the samples; None where there are none.
        documents: number of texts.
        documents_per_shard: all shards but the last have as many.
    """

    model: str
    weights: str = ""
    tokenizer: str = ""
    match: str = ""
    data: str = ""
    vocab: int
    k: int
    temperature: float = 1.0
    gamma: float | None = None
    seed: int | None = None
    documents: int
    documents_per_shard: int

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.documents // self.documents_per_shard)

    def part(self, number: int) -> range:
        """The documents of a shard."""
        start = number * self.documents_per_shard
        return range(start, min(start + self.documents_per_shard, self.documents))


@dataclass(frozen=True)
class Shard:
    """A line of the manifest.

    Attributes:
        file: name in the folder.
        sha256: of the whole file, in hexadecimal.
        bytes, documents, tokens, entries: what it holds.
    """

    file: str
    sha256: str
    bytes: int
    documents: int
    tokens: int
    entries: int


def write_shard(folder: Path, number: int, arrays: Mapping[str, Tensor], info: Info) -> Shard:
    """Write a shard, then its receipt.

    Raises:
        LabelError: the disk is full or the folder not writable; earlier shards are as they were.
    """
    with extra():
        from safetensors.torch import save
    header = json.dumps({"format": FORMAT, "version": VERSION, **asdict(info)}, sort_keys=True)
    content = save(dict(arrays), {FORMAT: header})  # one key: their order is not kept
    shard = Shard(
        file=f"shard-{number:05d}.safetensors",
        sha256=hashlib.sha256(content).hexdigest(),
        bytes=len(content),
        documents=len(arrays["starts"]) - 1,
        tokens=len(arrays["rows"]) - 1,
        entries=int(arrays["rows"][-1]),
    )
    try:
        write_atomically(folder / shard.file, lambda file: file.write(content))
        write_json(_receipt(folder, number), {**asdict(shard), "info": asdict(info)})
    except TrainingError as error:
        raise LabelError(
            f"{error}. The shards before it are intact; free some space, then run the same command "
            "again to go on"
        ) from error
    return shard


def finished(folder: Path, number: int, info: Info) -> Shard | None:
    """The shard, if it is done: its receipt is readable and the file as long as it says.

    Raises:
        LabelError: the folder holds labels of something else; the message says what differs.
    """
    try:
        content = json.loads(_receipt(folder, number).read_bytes())
        found, shard = dict(content.pop("info")), Shard(**content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    differences = [
        f"{f.name} is {found.get(f.name, f.default)!r} there and {getattr(info, f.name)!r} here"
        for f in fields(Info)
        if found.get(f.name, f.default) != getattr(info, f.name)
    ]
    if differences:
        raise LabelError(
            f"{folder} holds labels of something else: {'; '.join(differences)}. Run with the "
            "options of those, or name another folder"
        )
    path = folder / shard.file
    return shard if path.is_file() and path.stat().st_size == shard.bytes else None


def finish(folder: Path, info: Info, rank: int = 0) -> bool:
    """Write the manifest if every shard is done; whoever finishes last does it.

    Returns:
        Whether the labels are complete.
    """
    shards = [finished(folder, number, info) for number in range(info.shards)]
    if None in shards:
        return False
    body = {
        "format": FORMAT,
        "version": VERSION,
        "info": asdict(info),
        "shards": [asdict(shard) for shard in shards if shard is not None],
    }
    own = folder / f"manifest-{rank}.json"  # two may finish at once
    try:
        write_json(own, {"sha256": _checksum(body), **body})
        os.replace(own, folder / MANIFEST)
    except (TrainingError, OSError) as error:
        raise LabelError(f"could not write {folder / MANIFEST}: {error}; run again") from error
    return True


def read_manifest(folder: Path) -> tuple[Info, list[Shard]]:
    """What the labels are of, and the shards.

    Raises:
        CorruptLabels: there is no manifest, it was changed, or a shard is missing or cut short.
        LabelError: another version wrote it.
    """
    path = folder / MANIFEST
    if not path.is_file():
        done = len(list(folder.glob("shard-*.json")))
        state = f"is not complete ({done} shards are done)" if done else "holds no labels"
        raise CorruptLabels(
            f"{folder} {state}: there is no {MANIFEST}; run `bgkernels generate-labels` with the "
            "same options until it is done"
        )
    try:
        content = json.loads(path.read_bytes())
        checksum = content.pop("sha256")
        version = content["version"] if content["format"] == FORMAT else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptLabels(f"{path} cannot be read ({error}); {REDO}") from error
    if version != VERSION:
        raise LabelError(
            f"{path} must have version {VERSION} of the format {FORMAT}, not {version}; read it "
            "with the version of bgkernels that wrote it, or make the labels again"
        )
    if checksum != _checksum(content):
        raise CorruptLabels(f"{path} was changed: its checksum does not match; {REDO}")
    shards = [Shard(**shard) for shard in content["shards"]]
    for shard in shards:
        _check_size(folder / shard.file, shard)
    return Info(**content["info"]), shards


def verify(folder: Path, shard: Shard) -> None:
    """Read a shard and compare its checksum.

    Raises:
        CorruptLabels: it is not what was written; the message names the file.
    """
    path = folder / shard.file
    _check_size(path, shard)
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            sha.update(block)
    found = sha.hexdigest()
    if found != shard.sha256:
        raise CorruptLabels(
            f"{path} is corrupt: its sha256 is {found[:12]}…, not {shard.sha256[:12]}…; {REDO}"
        )


def _check_size(path: Path, shard: Shard) -> None:
    if not path.is_file():
        raise CorruptLabels(f"{path} is missing; run the command that made these labels again")
    size = path.stat().st_size
    if size != shard.bytes:
        raise CorruptLabels(f"{path} has {size} bytes instead of {shard.bytes}; {REDO}")


def _receipt(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.json"


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
