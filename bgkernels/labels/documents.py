"""Texts as sequences of token numbers, from the files that tokenised data sets come in."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from bgkernels.labels.errors import LabelError
from bgkernels.training.errors import extra
from bgkernels.training.files import digest

SUFFIXES = (".parquet", ".arrow", ".jsonl")
COLUMNS = ("input_ids", "tokens")


class Documents(Sequence[Tensor]):
    """Token sequences of at most ``max_length``; longer ones are cut, and no token is lost.

    Args:
        column: an Arrow array of lists of integers.
        max_length: tokens of a document; None: as long as it is.
        fingerprint: identifies the texts.

    Example:
        >>> import pyarrow
        >>> documents = Documents(pyarrow.chunked_array([[[1, 2, 3], [4]]]), max_length=2)
        >>> [x.tolist() for x in documents]
        [[1, 2], [3], [4]]
    """

    def __init__(self, column: Any, max_length: int | None = None, fingerprint: str = "") -> None:
        with extra("labels"):
            import pyarrow.compute
        self._column, self.fingerprint = column, fingerprint
        lengths = pyarrow.compute.list_value_length(column).fill_null(0).to_numpy()
        size = max_length or max(int(lengths.max(initial=1)), 1)
        pieces = np.maximum(-(-lengths // size), 1)
        self._row = np.repeat(np.arange(len(lengths)), pieces)
        first = np.repeat(np.cumsum(pieces) - pieces, pieces)
        self._start = (np.arange(len(self._row)) - first) * size
        self._size = size

    def __len__(self) -> int:
        return len(self._row)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        """``(length,)`` int64 tokens."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        values, start = self._column[int(self._row[index])].values, int(self._start[index])
        if values is None:
            return torch.empty(0, dtype=torch.int64)
        return torch.tensor(values.slice(start, self._size).to_numpy(zero_copy_only=False)).long()


def read_documents(
    path: Path, tokenizer: Any = None, *, max_length: int | None = None
) -> Documents:
    """Documents from a file, or from the files of a folder in the order of their names.

    Args:
        path: Parquet, Arrow (what ``datasets`` saves) or JSON lines, with a column ``input_ids`` or
            ``tokens`` of numbers, or ``text`` of strings.
        tokenizer: numbers the tokens of ``text``, with the special tokens that it adds.
        max_length: tokens of a document; longer ones are cut into several.

    Raises:
        LabelError: there is no such file or column.
    """
    with extra("labels"):
        import pyarrow as pa
    paths = [path] if path.is_file() else sorted(p for p in path.glob("*") if p.is_file())
    paths = [p for p in paths if p.suffix in SUFFIXES]
    kinds = {p.suffix for p in paths}
    if len(kinds) != 1:
        raise LabelError(
            f"the data must be a file, or a folder of files, of one kind ({', '.join(SUFFIXES)}); "
            f"{path} has {' and '.join(sorted(kinds)) or 'none'}"
        )
    try:
        table = pa.concat_tables([_table(p) for p in paths])
    except (OSError, pa.ArrowException) as error:
        raise LabelError(f"the data in {path} cannot be read: {error}") from error
    content = digest([*(_sha256(p) for p in paths), str(max_length).encode()])
    return Documents(_column(table, tokenizer, path), max_length, content)


def _table(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.json
    import pyarrow.parquet

    if path.suffix == ".parquet":
        names = pyarrow.parquet.read_schema(path).names
        known = [name for name in (*COLUMNS, "text") if name in names]
        return pyarrow.parquet.read_table(path, columns=known[:1] or None)
    if path.suffix == ".jsonl":
        return pyarrow.json.read_json(path)
    return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()


def _column(table: Any, tokenizer: Any, path: Path) -> Any:
    import pyarrow as pa

    for name in COLUMNS:
        if name in table.column_names:
            column = table.column(name)
            is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
            if not is_list or not pa.types.is_integer(column.type.value_type):
                raise LabelError(
                    f"column {name!r} of {path} must hold lists of integers, not {column.type}"
                )
            return column
    if "text" not in table.column_names or tokenizer is None:
        raise LabelError(
            f"{path} must have a column {' or '.join(map(repr, COLUMNS))} of token numbers, or "
            f"'text' and a tokenizer; it has {', '.join(map(repr, table.column_names))}"
        )
    texts = [text or "" for text in table.column("text").to_pylist()]
    return pa.chunked_array([pa.array(tokenizer(texts, verbose=False)["input_ids"])])


def _sha256(path: Path) -> bytes:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            sha.update(block)
    return sha.digest()
