"""Cached labels as a dataset, and batches of them as a teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

import bgkernels as bg
from bgkernels.labels import store
from bgkernels.labels.errors import LabelError
from bgkernels.labels.shard import Document, decode
from bgkernels.labels.store import Info
from bgkernels.labels.stored_match import FILE, StoredMatch
from bgkernels.labels.tokenizer import fingerprint
from bgkernels.training.errors import extra

IGNORE = -100


class LabelDataset(Dataset[Document]):
    """The documents of a folder of labels, mapped from disk, in the order of the capture.

    Every process verifies a shard once, before it first reads from it.

    Args:
        folder: with a ``manifest.json``.
        tokenizer: of the student, which must be the teacher's, or the one for which the labels were
            matched; None: not checked.
        vocab: columns of the student's head, at least the teacher's or, with two tokenizers, those
            of the match; None: not checked.
        verify: compare checksums; False where :meth:`verify` was called before.

    Raises:
        CorruptLabels: something is missing or changed; the message names it.
        LabelError: the labels are of another tokenizer, or of more columns.

    Example:
        >>> dataset = LabelDataset("runs/labels")  # doctest: +SKIP
        >>> loader = torch.utils.data.DataLoader(
        ...     dataset, batch_size=4, shuffle=True, collate_fn=dataset.collate
        ... )  # doctest: +SKIP
        >>> for batch in loader:  # doctest: +SKIP
        ...     hidden = student.model(batch.tokens).last_hidden_state
        ...     loss_fn(hidden, student.lm_head.weight, batch.teacher(), batch.target).backward()
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        tokenizer: Any = None,
        vocab: int | None = None,
        verify: bool = True,
    ) -> None:
        self.folder = Path(folder)
        self.info, self.shards = store.read_manifest(self.folder)
        self.match: StoredMatch | None = None
        if self.info.match:
            self.match = StoredMatch(self.folder / FILE, self.info.match)
        self._verify = verify
        self._maps: dict[int, dict[str, Tensor]] = {}
        if tokenizer is not None and fingerprint(tokenizer) != self.info.tokenizer:
            known, teacher = (x or "not known" for x in (self.info.tokenizer, self.info.model))
            student = "that shares the teacher's tokenizer"
            if self.match is not None:
                student = "that they were made for"
            raise LabelError(
                f"`tokenizer` has the fingerprint {fingerprint(tokenizer)}, and that of the labels "
                f"in {self.folder} (teacher: {teacher}) is {known}; tokens are compared by number, "
                f"so use a student {student}, or make labels for this one: "
                "generate-labels --student-tokenizer"
            )
        if self.match is not None:
            self.match.whole.check_heads(student=vocab)
        elif vocab is not None and vocab < self.info.vocab:
            raise LabelError(
                f"`vocab` is {vocab}, and the labels in {self.folder} are of {self.info.vocab} "
                f"columns; make them again with vocab_size={vocab}"
            )

    def __len__(self) -> int:
        return self.info.documents

    def __getitem__(self, index: int) -> Document:
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are {len(self)} documents; got index {index}")
        shard, document = divmod(index % len(self), self.info.documents_per_shard)
        return decode(self._arrays(shard), document)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # maps belong to a process

    def collate(self, documents: Sequence[Document]) -> LabelBatch:
        """A batch of documents, for ``DataLoader(collate_fn=dataset.collate)``."""
        return collate(documents, self.info, self.match)

    def verify(self) -> None:
        """Compare the checksums of all shards."""
        for shard in self.shards:
            store.verify(self.folder, shard)

    def _arrays(self, number: int) -> dict[str, Tensor]:
        """The arrays of a shard; they are mapped, not read."""
        if number not in self._maps:
            with extra():
                from safetensors import safe_open
            shard = self.shards[number]
            if self._verify:
                store.verify(self.folder, shard)
            with safe_open(self.folder / shard.file, "pt") as file:
                self._maps[number] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return self._maps[number]


@dataclass(frozen=True)
class LabelBatch:
    """Documents padded to one length, and their labels.

    Attributes:
        tokens: ``(batch, length)`` int64; 0 after a document's end.
        mask: ``(batch, length)`` bool: inside a document. A causal model needs no other mask.
        target: ``(batch, length)`` the next token; ``-100`` where there is none. With one tokenizer
            also where there is no soft label.
        indices, logprobs: ``(batch, length, k)``, as in :class:`~bgkernels.SoftLabels`.
        sample: ``(batch, length)`` a token drawn from the teacher, ``-100`` after the end; or None.
        entropy, power_sum: ``(batch, length)`` of the whole distribution; or None.
        info: what the labels are of; None: log-probabilities at temperature 1, of any vocabulary.
        match: of the tokenizers of student and teacher; None: they are one.
    """

    tokens: Tensor
    mask: Tensor
    target: Tensor
    indices: Tensor
    logprobs: Tensor
    sample: Tensor | None = None
    entropy: Tensor | None = None
    power_sum: Tensor | None = None
    info: Info | None = None
    match: StoredMatch | None = None

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> LabelBatch:
        """The same batch on another device."""
        return self._with(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> LabelBatch:
        """The same batch in page-locked memory; called by a ``DataLoader``."""
        return self._with(Tensor.pin_memory)

    def _with(self, function: Callable[[Tensor], Tensor]) -> LabelBatch:
        tensors = {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}
        changes: dict[str, Any] = {name: function(x) for name, x in tensors.items()}
        return replace(self, **changes)

    def teacher(self, tail: str = "bucket") -> Any:
        """The labels as the ``teacher`` of a loss: a ``bg.TopKTeacher``.

        Where student and teacher have two tokenizers it is in a ``bg.MatchedTeacher``, and a token
        without a soft label has the hard term alone.

        Args:
            tail: what becomes of the probability that was not kept; see ``bg.TopKTeacher``.

        Raises:
            LabelError: the labels were captured at another temperature than 1.
        """
        given: dict[str, Any] = {"entropy": self.entropy, "power_sum": self.power_sum}
        if self.info is not None:
            if self.info.temperature != 1:
                raise LabelError(
                    f"these labels were captured at temperature {self.info.temperature}, and a "
                    "TopKTeacher is given at temperature 1; capture at 1, and give the "
                    "temperature to the loss"
                )
            given["vocab"] = self.info.vocab
            if self.info.gamma is not None:
                given["gamma"] = self.info.gamma
        teacher = bg.TopKTeacher(self.indices, self.logprobs, tail=tail, **given)
        return teacher if self.match is None else bg.MatchedTeacher(teacher, self.match)


def collate(
    documents: Sequence[Document], info: Info | None = None, match: StoredMatch | None = None
) -> LabelBatch:
    """A batch of documents, each padded to the longest.

    Args:
        documents: such as items of a :class:`LabelDataset`.
        info: what their labels are of.
        match: of the tokenizers of student and teacher; None: they are one.

    Example:
        >>> labels = bg.SoftLabels(torch.tensor([[2], [1]]), torch.tensor([[-0.5], [-0.1]]))
        >>> batch = collate([Document(torch.tensor([0, 2]), labels)] * 3)
        >>> batch.target.shape, batch.target[0].tolist()
        (torch.Size([3, 2]), [2, -100])
    """
    k = max(document.labels.indices.shape[1] for document in documents)

    def pad(parts: Sequence[Tensor | None], value: float) -> Tensor | None:
        present = [part for part in parts if part is not None]
        if len(present) < len(parts):
            return None
        return pad_sequence(present, batch_first=True, padding_value=value)

    def entries(parts: Sequence[Tensor], value: float) -> Tensor:
        wide = [torch.nn.functional.pad(x, (0, k - x.shape[1]), value=value) for x in parts]
        return pad_sequence(wide, batch_first=True, padding_value=value)

    labels = [document.labels for document in documents]
    tokens = [document.tokens for document in documents]
    indices = entries([x.indices for x in labels], -1)
    target = [torch.cat([x[1:], x.new_full((min(1, len(x)),), IGNORE)]) for x in tokens]
    following = pad_sequence(target, batch_first=True, padding_value=IGNORE)
    if match is None:
        following = following.masked_fill((indices < 0).all(-1), IGNORE)
    return LabelBatch(
        tokens=pad_sequence(tokens, batch_first=True),
        mask=pad_sequence([torch.ones_like(x, dtype=torch.bool) for x in tokens], batch_first=True),
        target=following,
        indices=indices,
        logprobs=entries([x.logprobs for x in labels], float("-inf")),
        sample=pad([x.sample for x in labels], IGNORE),
        entropy=pad([x.entropy for x in labels], 0.0),
        power_sum=pad([x.power_sum for x in labels], 0.0),
        info=info,
        match=match,
    )
