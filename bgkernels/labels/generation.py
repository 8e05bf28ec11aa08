"""Run a teacher over texts once, and keep what training needs of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bgkernels as bg
from bgkernels.labels import store
from bgkernels.labels.errors import LabelError
from bgkernels.labels.shard import ShardBuilder
from bgkernels.labels.sources import Answer, LabelSource, LoadedTeacher, Placed
from bgkernels.labels.store import Info, Shard
from bgkernels.labels.stored_match import StoredMatch
from bgkernels.labels.tokenizer import fingerprint
from bgkernels.labels.translated import spread
from bgkernels.training.files import digest
from bgkernels.training.models import CausalLM


@dataclass(frozen=True)
class CaptureConfig:
    """How labels are captured.

    Args:
        k: columns to keep of each token.
        temperature: of log-probabilities, entropy and power sum.
        gamma: exponent of the power sum.
        seed: of the samples.
        vocab_size: use these leading columns of the teacher; None: all.
        batch_size: documents of a forward pass.
        documents_per_shard: documents of a file, which is gathered in memory.
        memory_budget: bytes of temporaries of the capture; None: the library's default.

    Raises:
        LabelError: a number is less than 1.
    """

    k: int = 64
    temperature: float = 1.0
    gamma: float = 0.1
    seed: int = 0
    vocab_size: int | None = None
    batch_size: int = 8
    documents_per_shard: int = 256
    memory_budget: int | None = None

    def __post_init__(self) -> None:
        for name in ("k", "batch_size", "documents_per_shard"):
            if getattr(self, name) < 1:
                raise LabelError(f"{name} must be at least 1; got {getattr(self, name)}")


def describe(
    source: LabelSource, documents: Sequence[Any], config: CaptureConfig, tokenizer: Any = None
) -> Info:
    """What the labels will be of.

    Raises:
        LabelError: the configuration or a document does not fit the teacher.
    """
    vocab = config.vocab_size or source.vocab
    if not 0 < vocab <= source.vocab:
        raise LabelError(f"vocab_size must lie in [1, {source.vocab}], the teacher's; got {vocab}")
    if not source.whole and (config.temperature != 1 or vocab != source.vocab):
        raise LabelError(
            "temperature must be 1 and vocab_size that of the teacher where a server gives "
            f"log-probabilities alone; got {config.temperature} and {vocab}. Serve hidden states"
        )
    if config.k > vocab:
        raise LabelError(f"k must lie in [1, {vocab}], the teacher's columns; got {config.k}")
    if not len(documents):
        raise LabelError("there are no documents to label; name data that holds some")
    if source.match is not None:
        source.match.check_heads(teacher=vocab)
    samples = source.whole and source.match is None  # a student may not have the teacher's token
    return Info(
        model=source.name,
        weights=source.weights,
        tokenizer="" if tokenizer is None else fingerprint(tokenizer),
        match="" if source.match is None else source.match.fingerprint,
        data=_fingerprint(documents, _ids(source, vocab)),
        vocab=vocab,
        k=config.k,
        temperature=config.temperature,
        gamma=config.gamma if source.whole else None,
        seed=config.seed if samples else None,
        documents=len(documents),
        documents_per_shard=config.documents_per_shard,
    )


def generate(
    model: CausalLM | LabelSource,
    documents: Sequence[Any],
    folder: str | Path,
    config: CaptureConfig = CaptureConfig(),
    *,
    tokenizer: Any = None,
    share: tuple[int, int] | None = None,
    report: Callable[[Shard], None] | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> bool:
    """Write the labels of all documents, in shards; those that are done are kept.

    Under ``torchrun`` (``RANK`` and ``WORLD_SIZE`` in the environment) every rank makes its share
    of the shards in the same folder, as do processes that are given a ``share``. Killed anywhere
    and run again, the files are the same. Where machines have no common folder, gather their files
    in one, and run once more there.

    Args:
        model: the teacher, from :func:`bgkernels.training.models.load_pretrained`, or a source of
            its labels, such as a server, or a
            :class:`~bgkernels.labels.translated.TranslatedSource` where the documents are of a
            student that has another tokenizer.
        documents: sequences of token numbers: :class:`Documents`, lists, or a ``datasets.Dataset``
            with a column ``input_ids``.
        folder: made where it is missing.
        config: how to capture.
        tokenizer: of the documents; its fingerprint is kept, to be compared with the student's.
        share: ``(i, n)``: make the shards ``i``, ``i + n``, and so on; None: as ``torchrun`` says.
        report: called after each shard.
        on_batch: called with the documents and tokens of each batch that was labelled.

    Returns:
        Whether the labels are complete: False where other ranks are not done.

    Raises:
        LabelError: the folder holds other labels, a document does not fit the teacher, the disk is
            full; the message says what to do. Shards that are done are never lost.

    Example:
        >>> from bgkernels.labels import LabelDataset
        >>> from bgkernels.training import ModelShape
        >>> from bgkernels.training.models import small_llama
        >>> import tempfile
        >>> teacher = small_llama(ModelShape(16, 1, 1), vocab=50, length=8, seed=0)
        >>> folder = tempfile.mkdtemp()
        >>> generate(teacher, [[1, 2, 3], [4, 5]], folder, CaptureConfig(k=4))
        True
        >>> LabelDataset(folder)[1].labels.indices.shape
        torch.Size([2, 4])
    """
    folder = Path(folder)
    rank, world = share or (
        int(os.environ.get(name, d)) for name, d in (("RANK", 0), ("WORLD_SIZE", 1))
    )
    source = LoadedTeacher(model) if isinstance(model, CausalLM) else model
    info = describe(source, documents, config, tokenizer)
    ids = _ids(source, info.vocab)
    known = [store.finished(folder, number, info) for number in range(info.shards)]
    mine = range(rank, info.shards, world)

    def texts(number: int) -> list[Tensor]:
        return [_tokens(documents[i], i, ids) for i in info.part(number)]

    missing = (texts(number) for number in mine if known[number] is None)
    answers = source.answers(missing, config.batch_size)
    for number in mine:
        shard = known[number]
        if shard is None:
            builder = ShardBuilder(info.vocab, ids)
            for batch, labels in _label(answers, texts(number), number, info, config):
                builder.add(batch, labels)
                if on_batch is not None:
                    on_batch(len(batch), sum(map(len, batch)))
            shard = store.write_shard(folder, number, builder.tensors(), info)
        if report is not None:
            report(shard)
    if source.match is not None:
        StoredMatch.write(source.match, folder, rank)
    return store.finish(folder, info, rank)


@torch.no_grad()
def _label(
    answers: Iterator[Answer | Placed],
    texts: list[Tensor],
    number: int,
    info: Info,
    config: CaptureConfig,
) -> Iterator[tuple[list[Tensor], bg.SoftLabels]]:
    """Batches of a shard: the documents, and the labels of all their tokens."""
    seed, row = int(digest([f"{info.seed}/{number}".encode()]), 16) >> 2, 0
    for start in range(0, len(texts), config.batch_size):
        batch, answer = texts[start : start + config.batch_size], next(answers)
        at = None
        if isinstance(answer, Placed):
            answer, at = answer
        if isinstance(answer, bg.LinearTeacher):
            answer = bg.capture(
                answer,
                info.k,
                temperature=info.temperature,
                gamma=config.gamma,
                seed=seed,
                first_row=row,
                vocab_size=info.vocab,
                memory_budget=config.memory_budget,
            )
        yield batch, answer if at is None else spread(answer, at)
        row += sum(map(len, batch))


def _ids(source: LabelSource, vocab: int) -> int:
    """How many tokens documents can have."""
    return vocab if source.match is None else source.match.student.size


def _fingerprint(documents: Sequence[Any], vocab: int) -> str:
    """Identifies the texts: their own fingerprint, or a digest of all tokens."""
    for name in ("fingerprint", "_fingerprint"):  # the second is that of a datasets.Dataset
        if known := getattr(documents, name, None):
            return str(known)
    tokens = (_tokens(documents[i], i, vocab) for i in range(len(documents)))
    return digest(x.numpy().tobytes() for x in tokens)


def _tokens(document: Any, number: int, vocab: int) -> Tensor:
    """``(length,)`` int64 of a document, given as such or in a row of a data set."""
    if isinstance(document, Mapping):
        document = document["input_ids"]
    tokens = torch.as_tensor(document).long()
    if tokens.ndim != 1:
        raise LabelError(f"document {number} must be a list of tokens; got {tuple(tokens.shape)}")
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab:
        wrong = int(tokens.max()) if tokens.max() >= vocab else int(tokens.min())
        raise LabelError(
            f"document {number} has the token {wrong}, and the vocabulary has {vocab} tokens; use "
            "the tokenizer of the teacher, or name that of the student: --student-tokenizer"
        )
    return tokens
