"""The arrays of one shard: documents, and the soft labels of each of their tokens.

A shard is a safetensors file: plain arrays at fixed offsets, which are mapped, so that a shuffled
dataset reads one document here and one there. (Parquet would decode a group of rows for each.)

=============  ==================  ========================================================
``starts``     (documents + 1,)    int32, the first token of each document
``tokens``     (tokens,)           int32
``rows``       (tokens + 1,)       int32, the first kept entry of each token
``columns``    (entries,)          uint16, the low bits of the entry's column
``high``       (entries,)          uint8, the bits above; where the vocabulary has more
``nll``        (entries,)          fp16, ``-log p`` of the entry
``kept``       (tokens,)           fp32, log of the sum of the token's kept probabilities
``sample``     (tokens,)           int32, a token drawn from the teacher; optional
``entropy``    (tokens,)           fp32, of the whole distribution; optional
``power_sum``  (tokens,)           fp32, ``log Σ p^gamma`` of the whole distribution; optional
=============  ==================  ========================================================

An entry takes 4 or 5 bytes, a token up to 24 more. fp16 rounds ``log p`` by at most 2⁻¹¹ of itself;
:func:`decode` then shifts each row so that its probabilities have the sum that was kept, which
leaves the tail its mass, never negative.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bgkernels import SoftLabels
from bgkernels.labels.errors import LabelError

OPTIONAL = {"sample": torch.int32, "entropy": torch.float32, "power_sum": torch.float32}
"""Arrays of one number a token, which not every source of labels knows."""

_INT32 = 2**31 - 1


@dataclass(frozen=True)
class Document:
    """A text and its soft labels.

    Attributes:
        tokens: ``(length,)`` int64.
        labels: shaped ``(length,)``; those at position i are of the token that follows token i.
    """

    tokens: Tensor
    labels: SoftLabels


@dataclass
class ShardBuilder:
    """Gathers documents in the form in which they are stored.

    Args:
        vocab: columns of the teacher.
        ids: tokens that documents can have; None: as many.

    Example:
        >>> labels = SoftLabels(torch.tensor([[2, 0], [1, -1]]), torch.tensor([[-0.5, -1], [0, 0]]))
        >>> builder = ShardBuilder(vocab=3)
        >>> builder.add([torch.tensor([0, 2])], labels)
        >>> builder.tensors()["columns"].tolist(), builder.tensors()["rows"].tolist()
        ([2, 0, 1], [0, 2, 3])
    """

    vocab: int
    ids: int | None = None
    _lengths: list[int] = field(default_factory=list)
    _parts: list[dict[str, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not 0 < self.vocab <= 2**24:
            raise LabelError(f"a vocabulary must have 1 to 2**24 columns, not {self.vocab}")

    def add(self, documents: Sequence[Tensor], labels: SoftLabels) -> None:
        """Append documents.

        Args:
            documents: ``(length,)`` tokens of each.
            labels: of all their tokens, one document after the other.

        Raises:
            LabelError: a token, a column or a number is out of range, or not a number.
        """
        tokens = torch.cat([*documents, torch.empty(0, dtype=torch.int64)])
        self._lengths += map(len, documents)
        self._parts.append(encode(tokens, labels, self.vocab, self.ids or self.vocab))

    def tensors(self) -> dict[str, Tensor]:
        """The arrays of the shard.

        Raises:
            LabelError: more entries than a shard can hold.
        """
        names = self._parts[0].keys() if self._parts else ()
        joined = {name: torch.cat([part[name] for part in self._parts]) for name in names}
        starts, rows = _offsets(torch.tensor(self._lengths)), _offsets(joined.pop("counts"))
        return {"starts": starts, "rows": rows, **joined}


def encode(tokens: Tensor, labels: SoftLabels, vocab: int, ids: int) -> dict[str, Tensor]:
    """The arrays of some tokens, with ``counts (tokens,)``, of entries, instead of ``rows``."""
    parts = {name: x.cpu() for name, x in labels.tensors().items()}
    indices, logprobs = parts.pop("indices"), parts.pop("logprobs")
    present = indices >= 0
    columns, entries = indices[present], logprobs[present]
    kept = logprobs.double().masked_fill(~present, float("-inf")).logsumexp(1)
    _check("token", tokens, tokens >= 0, tokens < ids)
    _check("column", columns, columns < vocab)
    _check("log-probability", entries, entries.isfinite(), entries < 0.01)
    _check("log of a row's probabilities", kept, kept < 0.01)
    for name in parts.keys() & {"entropy", "power_sum"}:
        _check(name, parts[name], parts[name].isfinite())
    arrays = {
        "tokens": tokens.int(),
        "counts": present.sum(1),
        "columns": (columns & 0xFFFF).to(torch.uint16),
        "nll": (-entries).clamp(0, torch.finfo(torch.float16).max).half(),
        "kept": kept.clamp_max(0).float(),
    }
    if vocab > 2**16:
        arrays["high"] = (columns >> 16).to(torch.uint8)
    return arrays | {name: x.to(OPTIONAL[name]) for name, x in parts.items()}


def decode(arrays: Mapping[str, Tensor], document: int) -> Document:
    """A document of a shard; only its part of the arrays is read."""
    start, stop = arrays["starts"][document : document + 2].tolist()
    rows = arrays["rows"][start : stop + 1].long()
    tokens, entries = slice(start, stop), slice(int(rows[0]), int(rows[-1]))
    columns = arrays["columns"][entries].long()
    if "high" in arrays:
        columns |= arrays["high"][entries].long() << 16
    counts = rows.diff()
    present = torch.arange(int(counts.max()) if len(counts) else 0) < counts[:, None]
    indices = torch.full(present.shape, -1).masked_scatter(present, columns)
    logprobs = torch.full(present.shape, float("-inf"))
    logprobs = logprobs.masked_scatter(present, -arrays["nll"][entries].float())
    shift = arrays["kept"][tokens] - logprobs.logsumexp(1)
    logprobs += shift.nan_to_num(0.0)[:, None]  # an empty row has nothing to shift
    parts = {name: arrays[name][tokens].clone() for name in OPTIONAL if name in arrays}
    if "sample" in parts:
        parts["sample"] = parts["sample"].long()
    return Document(arrays["tokens"][tokens].long(), SoftLabels(indices, logprobs, **parts))


def _check(what: str, values: Tensor, *conditions: Tensor) -> None:
    """All values meet the conditions, which are False where a value is NaN."""
    for condition in conditions:
        if not condition.all():
            value = values[~condition][0].item()
            raise LabelError(
                f"a {what} is {value}, which cannot be: the teacher's output is not finite, or "
                "belongs to another vocabulary; nothing was written of this shard"
            )


def _offsets(counts: Tensor) -> Tensor:
    """``(n + 1,)`` int32 running sums of ``(n,)`` counts, from 0."""
    total = int(counts.sum())
    if total > _INT32:
        raise LabelError(
            f"a shard holds at most {_INT32} entries, not {total}; make shards smaller"
        )
    return torch.cat([counts.new_zeros(1), counts]).cumsum(0).int()
