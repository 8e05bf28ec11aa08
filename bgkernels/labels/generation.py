"""Run a teacher over texts once, and keep what training needs of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import bgkernels as bg
from bgkernels.labels import store
from bgkernels.labels.errors import LabelError
from bgkernels.labels.shard import ShardBuilder
from bgkernels.labels.store import Info, Shard
from bgkernels.labels.tokenizer import fingerprint
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
    model: CausalLM, documents: Sequence[Any], config: CaptureConfig, tokenizer: Any = None
) -> Info:
    """What the labels will be of.

    Raises:
        LabelError: the configuration or a document does not fit the model.
    """
    vocab = config.vocab_size or model.vocab
    if not 0 < vocab <= model.vocab:
        raise LabelError(f"vocab_size must lie in [1, {model.vocab}], the teacher's; got {vocab}")
    if config.k > vocab:
        raise LabelError(f"k must lie in [1, {vocab}], the teacher's columns; got {config.k}")
    if not len(documents):
        raise LabelError("there are no documents to label; name data that holds some")
    return Info(
        model=str(getattr(model.network, "name_or_path", "")),
        weights=model.digest,
        tokenizer="" if tokenizer is None else fingerprint(tokenizer),
        data=_fingerprint(documents, vocab),
        vocab=vocab,
        k=config.k,
        temperature=config.temperature,
        gamma=config.gamma,
        seed=config.seed,
        documents=len(documents),
        documents_per_shard=config.documents_per_shard,
    )


def generate(
    model: CausalLM,
    documents: Sequence[Any],
    folder: str | Path,
    config: CaptureConfig = CaptureConfig(),
    *,
    tokenizer: Any = None,
    report: Callable[[Shard], None] | None = None,
) -> bool:
    """Write the labels of all documents, in shards; those that are done are kept.

    Under ``torchrun`` (``RANK`` and ``WORLD_SIZE`` in the environment) every rank makes its share
    of the shards in the same folder. Killed anywhere and run again, the files are the same. Where
    machines have no common folder, gather their files in one, and run once more there.

    Args:
        model: the teacher, from :func:`bgkernels.training.models.load_pretrained`.
        documents: sequences of token numbers: :class:`Documents`, lists, or a ``datasets.Dataset``
            with a column ``input_ids``.
        folder: made where it is missing.
        config: how to capture.
        tokenizer: of the documents; its fingerprint is kept, to be compared with the student's.
        report: called after each shard.

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
    rank, world = (int(os.environ.get(name, d)) for name, d in (("RANK", 0), ("WORLD_SIZE", 1)))
    info = describe(model, documents, config, tokenizer)
    known = [store.finished(folder, number, info) for number in range(info.shards)]
    for number in range(rank, info.shards, world):
        shard = known[number]
        if shard is None:
            builder = ShardBuilder(info.vocab)
            for texts, labels in _label(model, documents, number, info, config):
                builder.add(texts, labels)
            shard = store.write_shard(folder, number, builder.tensors(), info)
        if report is not None:
            report(shard)
    return store.finish(folder, info, rank)


@torch.no_grad()
def _label(
    model: CausalLM, documents: Sequence[Any], number: int, info: Info, config: CaptureConfig
) -> Iterator[tuple[list[Tensor], bg.SoftLabels]]:
    """Batches of a shard: the documents, and the labels of all their tokens."""
    seed = int(digest([f"{info.seed}/{number}".encode()]), 16) >> 2
    part, row = info.part(number), 0
    apart = _padding_changes(model, [_tokens(documents[i], i, info.vocab) for i in part])
    for start in range(part.start, part.stop, config.batch_size):
        batch = range(start, min(start + config.batch_size, part.stop))
        texts = [_tokens(documents[i], i, info.vocab) for i in batch]
        labels = bg.capture(
            _teacher(model, texts, apart),
            info.k,
            temperature=info.temperature,
            gamma=config.gamma,
            seed=seed,
            first_row=row,
            vocab_size=info.vocab,
            memory_budget=config.memory_budget,
        )
        yield texts, labels
        row += sum(map(len, texts))


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
            f"document {number} has the token {wrong}, and the teacher has {vocab} columns; "
            "use the tokenizer of the teacher"
        )
    return tokens


def _padding_changes(model: CausalLM, texts: list[Tensor]) -> bool:
    """Whether the labels of a short text depend on how long the text beside it is.

    So it is where positions are encoded by the longest sequence of a batch (longrope, dynamic NTK).
    It is tried with the shortest and the longest text.
    """
    texts = sorted((text for text in texts if len(text)), key=len)
    if not texts or len(texts[0]) == len(texts[-1]):
        return False
    shortest, longest = texts[0], texts[-1]
    alone, padded = (
        model.hidden(tokens.to(model.device)[None])[0, : len(shortest)].float()
        for tokens in (shortest, torch.cat([shortest, longest[len(shortest) :]]))
    )
    tolerance = 1e-3 if model.head.weight.dtype == torch.float32 else 3e-2
    return bool((alone - padded).abs().max() > tolerance * alone.abs().max())


def _teacher(model: CausalLM, texts: list[Tensor], apart: bool) -> bg.LinearTeacher:
    """The model's hidden states of all tokens, one after the other, and its head.

    Args:
        model: the teacher.
        texts: of one batch.
        apart: texts of different lengths do not share a forward.
    """
    if apart and len({len(text) for text in texts}) > 1:
        parts: dict[int, Tensor] = {}
        for length in {len(text) for text in texts}:
            equal = [i for i, text in enumerate(texts) if len(text) == length]
            found = _teacher(model, [texts[i] for i in equal], apart=False)
            parts |= dict(zip(equal, found.hidden.tensor_split(len(equal)), strict=True))
        hidden = torch.cat([parts[i] for i in range(len(texts))])
        return replace(found, hidden=hidden)
    tokens = pad_sequence(texts, batch_first=True)  # causal: what follows the end is not seen
    if tokens.shape[1] == 0:
        tokens = tokens.new_zeros(len(texts), 1)
    lengths = torch.tensor([len(text) for text in texts])
    inside = torch.arange(tokens.shape[1]) < lengths[:, None]
    device = model.head.weight.device
    whole = model.as_teacher(tokens.to(device))
    return bg.LinearTeacher(
        whole.hidden[inside.to(device)],
        whole.weight,
        whole.bias,
        whole.logit_scale,
        whole.logit_softcap,
    )
