"""Text on this machine or of a task, split by file into training and held-out text."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bgkernels.training.config import DataConfig
from bgkernels.training.errors import CorpusError
from bgkernels.training.files import digest
from bgkernels.training.records import RECORD_SUFFIXES, Document, read_records, texts_of
from bgkernels.training.tasks import exercises, parse

SKIPPED_FOLDERS = {
    *("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip"),
    *("turtledemo", "encodings", "pydoc_data", "__pycache__"),
}
"""Left out of the standard library: others' code, tests, an editor, and generated tables."""

TEXT_SUFFIXES = {
    *(".txt", ".md", ".rst", ".tex", ".py", ".pyi", ".sh", ".c", ".h", ".cc", ".cpp", ".cu"),
    *(".java", ".js", ".ts", ".go", ".rs"),
}
"""What counts as text in a folder named by the user."""


@dataclass(frozen=True)
class Corpus:
    """Texts, one a file in the order of their paths, or one a record.

    Args:
        train, held_out: the two parts.
        origin: the folder or file they came from, or the task.
        unusable: why some records were left out.
    """

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]
    origin: Path | str
    unusable: tuple[str, ...] = ()

    @property
    def characters(self) -> int:
        """Length of both parts together."""
        return sum(map(len, texts_of((*self.train, *self.held_out))))

    @property
    def digest(self) -> str:
        """Identifies texts and split; part of the identity of every run on them."""
        parts = texts_of((*self.train, "", *self.held_out))
        return digest(text.encode("utf-8", "surrogatepass") for text in parts)


def load_corpus(config: DataConfig) -> Corpus:
    """Read the corpus and split it by file.

    A file is held out where a hash of its path relative to the folder says so, and so stays on its
    side when others come or go. A corpus of one file is cut: its end is held out. Records of a
    data file (:mod:`bgkernels.training.records`) are split alike, by a hash of their text; problems
    of a task (:mod:`bgkernels.training.tasks`) by one of the problem.

    Raises:
        CorpusError: the folder does not exist or holds no text, or a data file cannot be read.
        OptionError: there is no such task, or both a task and a corpus.

    Example:
        >>> corpus = load_corpus(DataConfig(max_bytes=100_000))
        >>> len(corpus.train) > len(corpus.held_out) > 0
        True
    """
    if config.task is not None:
        return _posed(config.task, config.texts)
    folder = config.corpus or Path(sysconfig.get_path("stdlib"))
    if folder.is_file() and folder.suffix in RECORD_SUFFIXES:
        unusable: list[str] | None = [] if config.skip_unusable else None
        records = _numbered(read_records(folder, unusable))
        return replace(_split(records, config.held_out, folder), unusable=tuple(unusable or ()))
    suffixes = TEXT_SUFFIXES if config.corpus else {".py"}
    if not folder.is_dir():
        raise CorpusError(
            f"--corpus must be a folder of text files, or a data file "
            f"({' '.join(RECORD_SUFFIXES)}); {folder} is not a folder"
        )
    texts = dict(_read(folder, suffixes, config.max_bytes))
    if not texts:
        raise CorpusError(
            f"--corpus must be a folder of text files ({' '.join(sorted(suffixes))}); "
            f"{folder} holds none that is UTF-8 and not empty"
        )
    if len(texts) == 1:
        return _cut(next(iter(texts.values())), config.held_out, folder)
    return _split(texts, config.held_out, folder)


HELD_OUT = 256
"""Problems of a task that are held out, of the validation split."""


def _posed(name: str, texts: int) -> Corpus:
    """Problems of a task, each with a solution."""
    task = parse(name)
    train = task.problems("train", texts, seed=0)
    held_out = task.problems("validation", HELD_OUT, seed=0)
    learnt, scored = (exercises(task, problems, seed=0) for problems in (train, held_out))
    return Corpus(learnt, scored, f"the task {name}")


def _split(texts: Mapping[str, Document], held_out: float, origin: Path) -> Corpus:
    """Hold out the share of the documents whose names rank lowest."""
    ranked = sorted(texts, key=_rank)
    if len(ranked) < 2:
        raise CorpusError(f"--corpus {origin} holds a single record; one more is to be held out")
    threshold = max(_rank(ranked[0]), held_out)  # at least one is held out,
    threshold = min(threshold, _rank(ranked[-2]))  # and at least one is not
    return Corpus(
        train=tuple(text for path, text in texts.items() if _rank(path) > threshold),
        held_out=tuple(text for path, text in texts.items() if _rank(path) <= threshold),
        origin=origin,
    )


def _numbered(documents: Sequence[Document]) -> dict[str, Document]:
    """Documents by their texts; equal ones count once, or they would be on both sides."""
    return dict(zip(texts_of(documents), documents, strict=True))


def _read(folder: Path, suffixes: set[str], limit: int | None) -> Iterator[tuple[str, str]]:
    """Relative path and text of each file, sorted, until ``limit`` bytes have been read."""
    total = 0
    for path in _walk(folder, suffixes):
        if limit is not None and total >= limit:
            return
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue  # not text, or not ours to read
        if text.strip() and "\0" not in text:
            total += len(text)
            yield path.relative_to(folder).as_posix(), text


def _walk(folder: Path, suffixes: set[str]) -> Iterator[Path]:
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(x for x in folders if x not in SKIPPED_FOLDERS and x[0] != ".")
        for name in sorted(names):
            path = Path(where, name)
            if path.suffix.lower() in suffixes and path.is_file():
                yield path


def _rank(path: str) -> float:
    """A number in [0, 1) that depends on the path alone, the same on every machine."""
    return (
        int.from_bytes(hashlib.sha256(path.encode("utf-8", "replace")).digest()[:8], "big") / 2**64
    )


def _cut(text: str, held_out: float, folder: Path) -> Corpus:
    """One text, cut at the end of a line."""
    cut = text.find("\n", int(len(text) * (1 - max(held_out, 0.1)))) + 1
    if not 0 < cut < len(text):
        raise CorpusError(
            f"--corpus {folder} holds a single short text; training needs another one to hold out"
        )
    return Corpus((text[:cut],), (text[cut:],), folder)
