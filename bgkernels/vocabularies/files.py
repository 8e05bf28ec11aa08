"""A match as one file: what both vocabularies stand for, the pairs, and their hash."""

from __future__ import annotations

import json
import os
import zipfile
from os import PathLike
from pathlib import Path

import numpy as np

from bgkernels.vocabularies.errors import VocabularyError
from bgkernels.vocabularies.vocabulary import Array, Vocabulary

FORMAT, VERSION = "bgkernels.vocabularies", 1
SIDES = ("student", "teacher")


def save(path: str | PathLike[str], pairs: Array, student: Vocabulary, teacher: Vocabulary) -> None:
    """Write a match, whole or not at all.

    Raises:
        VocabularyError: the file cannot be written.
    """
    sides = dict(zip(SIDES, (student, teacher), strict=True))
    header = {
        "format": FORMAT,
        "version": VERSION,
        "roles": {side: dict(x.roles) for side, x in sides.items()},
        "fingerprints": {side: x.fingerprint for side, x in sides.items()},
    }
    names = ("content", "lengths", "fallback")
    arrays = {f"{side}.{name}": getattr(x, name) for side, x in sides.items() for name in names}
    arrays |= {"pairs": pairs, "header": np.array(json.dumps(header, sort_keys=True))}
    whole, begun = Path(path), Path(f"{os.fspath(path)}.part")
    try:
        with begun.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        os.replace(begun, whole)
    except OSError as error:
        raise VocabularyError(f"could not write the match {whole}: {error}") from error


def load(path: str | PathLike[str]) -> tuple[Array, Vocabulary, Vocabulary]:
    """Read the pairs and both vocabularies.

    Raises:
        VocabularyError: it is no such file, or was changed.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            header = json.loads(str(arrays["header"]))
            if (header["format"], header["version"]) != (FORMAT, VERSION):
                raise ValueError(f"version {header['version']} of {header['format']}")
            student, teacher = (
                Vocabulary(
                    arrays[f"{side}.content"],
                    arrays[f"{side}.lengths"],
                    arrays[f"{side}.fallback"],
                    header["roles"][side],
                )
                for side in SIDES
            )
            pairs = arrays["pairs"]
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise VocabularyError(
            f"{os.fspath(path)} is no match of two vocabularies that this version can read "
            f"({error}); make it again with bg.vocabularies.match(...).save(path)"
        ) from error
    for side, vocabulary in zip(SIDES, (student, teacher), strict=True):
        if vocabulary.fingerprint != header["fingerprints"][side]:
            raise VocabularyError(
                f"{os.fspath(path)} was changed: the {side}'s vocabulary has another hash; "
                "make it again with bg.vocabularies.match(...).save(path)"
            )
    return pairs, student, teacher
