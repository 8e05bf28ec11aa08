"""From texts to token streams, and from streams to batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bgkernels.training.errors import CorpusError, extra
from bgkernels.training.records import REMEDY, Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
IGNORED = -100
"""Label of a token that is read and not learnt."""


def train_tokenizer(texts: Sequence[str], vocab: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE of ``vocab`` tokens learnt from the texts; any text can be encoded.

    The same texts give the same tokenizer.
    """
    with extra():
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    make: Any = PreTrainedTokenizerFast
    wrapped: PreTrainedTokenizerBase = make(tokenizer_object=bpe, eos_token=END_OF_TEXT)
    return wrapped


def token_stream(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    unusable: list[str] | None = None,
) -> tuple[Tensor, Tensor]:
    """All documents packed one after the other, each closed by the end-of-text token.

    Args:
        tokenizer: encodes them, conversations by its chat template.
        documents: texts and conversations.
        unusable: gathers why conversations cannot be used, which are left out; None: they are
            errors.

    Raises:
        CorpusError: a conversation cannot be used; names its record.

    Returns:
        ``(tokens,)`` int64, and ``(tokens,)`` bool: which are learnt. Of a conversation, prompts
        are not.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    texts = [x for x in documents if isinstance(x, str)]
    encoded = iter(
        tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else ()
    )
    tokens: list[int] = []
    learnt: list[bool] = []
    for document in documents:
        if isinstance(document, str):
            ids = next(encoded)
            chosen = [True] * len(ids)
        else:
            try:
                ids, chosen = document.encode(tokenizer)
            except CorpusError as error:
                if unusable is None:
                    raise CorpusError(f"--corpus: {error}{REMEDY}") from error
                unusable.append(str(error))
                continue
        tokens += [*ids, *end]
        learnt += [*chosen, *(chosen[-1:] or [True])[: len(end)]]
    return torch.tensor(tokens, dtype=torch.int64), torch.tensor(learnt, dtype=torch.bool)


@dataclass(frozen=True)
class Batch:
    """Sequences and what is to be learnt of them.

    Args:
        tokens: ``(batch, length + 1)``.
        labels: ``(batch, length)`` the token after each, ``IGNORED`` where it is not learnt.
    """

    tokens: Tensor
    labels: Tensor

    @property
    def items(self) -> int:
        """Tokens that are learnt."""
        return int((self.labels != IGNORED).sum())

    @classmethod
    def of(cls, tokens: Tensor, learnt: Tensor | None = None) -> Batch:
        """All of the tokens, or those of the mask ``(batch, length + 1)``, are learnt."""
        labels = tokens[:, 1:]
        return cls(tokens, labels if learnt is None else labels.where(learnt[:, 1:], IGNORED))

    def __getitem__(self, chosen: slice) -> Batch:
        """Some of the sequences."""
        return Batch(self.tokens[chosen], self.labels[chosen])

    def to(self, device: torch.device) -> Batch:
        """The same on a device; a GPU fetches it while the program goes on."""
        if device.type != "cuda":
            return Batch(self.tokens.to(device), self.labels.to(device))
        move = partial(Tensor.to, device=device, non_blocking=True)
        return Batch(move(self.tokens.pin_memory()), move(self.labels.pin_memory()))

    def until(self, stop: int | None) -> Batch:
        """The same sequences; nothing after the first label ``stop`` counts."""
        if stop is None:
            return self
        ends = self.labels == stop
        return Batch(self.tokens, self.labels.where(ends.cumsum(-1) - ends.long() == 0, IGNORED))

    def after(self, given: int) -> Batch:
        """The same sequences, with their first ``given`` tokens as a prompt."""
        labels = self.labels.clone()
        labels[:, : given - 1] = IGNORED
        return Batch(self.tokens, labels)


@dataclass
class Epochs:
    """Which items are in a batch of a number: each epoch visits every one once, in its own order.

    Args:
        items: how many there are.
        size: of a batch; what an epoch has over is left out.
        seed: of the order.

    Example:
        >>> epochs = Epochs(items=5, size=2, seed=0)
        >>> len({int(i) for number in range(2) for i in epochs[number]})
        4
    """

    items: int
    size: int
    seed: int
    _order: tuple[int, Tensor] = field(default=(-1, torch.empty(0)), init=False, repr=False)

    def __getitem__(self, number: int) -> Tensor:
        """``(size,)`` items of the batch of a number, counted over all epochs."""
        epoch, index = divmod(number, self.items // self.size)
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order = (epoch, torch.randperm(self.items, generator=generator))
        return self._order[1][index * self.size :][: self.size]


@dataclass
class Batches:
    """Training batches, each a function of the seed and the step, so that a run can be resumed.

    The stream is cut into windows. Each epoch visits every window once, in an order of its own.

    Args:
        stream: ``(tokens,)``.
        sequence_length: tokens of a sequence; a window has one more, the last label.
        batch_size: windows of a batch.
        seed: of the order.
        learnt: ``(tokens,)`` which of them are learnt; None: all.

    Raises:
        CorpusError: the stream is shorter than one batch.

    Example:
        >>> batches = Batches(torch.arange(100), sequence_length=4, batch_size=2, seed=0)
        >>> batches[0].tokens.shape
        torch.Size([2, 5])
    """

    stream: Tensor
    sequence_length: int
    batch_size: int
    seed: int
    learnt: Tensor | None = None
    _epochs: Epochs = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._epochs = Epochs(self.windows, self.batch_size, self.seed)
        if self.windows < self.batch_size:
            needed = self.batch_size * self.sequence_length + 1
            raise CorpusError(
                f"the training text is too short: a batch needs {needed} tokens and there are "
                f"{len(self.stream)}; name a larger --corpus, or lower --batch-size or "
                "--sequence-length"
            )

    @property
    def windows(self) -> int:
        """Windows of the stream, which overlap only in the label of the last token."""
        return (len(self.stream) - 1) // self.sequence_length

    def __getitem__(self, number: int) -> Batch:
        """The batch of a number, counted over all epochs."""
        positions = _positions(self._epochs[number], self.sequence_length)
        return Batch.of(
            self.stream[positions], None if self.learnt is None else self.learnt[positions]
        )


def held_out_windows(
    stream: Tensor, learnt: Tensor, count: int, length: int, given: int
) -> tuple[Tensor, Tensor]:
    """Windows spread evenly over a held-out stream, each with something to score.

    Args:
        stream: ``(tokens,)``.
        learnt: ``(tokens,)`` which of them count, as in training.
        count: at most so many.
        length: of a window, to which the last label adds one token.
        given: tokens of a window that are its prompt, and not scored.

    Returns:
        ``(≤ count, length + 1)`` tokens and which of them count.

    Raises:
        CorpusError: the stream is shorter than a window, or no window has anything to score.
    """
    windows = (len(stream) - 1) // length
    if windows < 1:
        raise CorpusError(
            f"the held-out text is too short: a sequence needs {length + 1} tokens and there are "
            f"{len(stream)}; name a larger --corpus or lower --sequence-length"
        )
    scored = learnt[_positions(torch.arange(windows), length)][:, given:].any(-1)
    useful = scored.nonzero()[:, 0]
    if not len(useful):
        raise CorpusError(
            f"the held-out conversations have no answer beyond the first {given} tokens of any "
            "sequence; name a larger --corpus, or another --sequence-length"
        )
    chosen = torch.linspace(0, len(useful) - 1, min(count, len(useful))).long()
    positions = _positions(useful[chosen], length)
    return stream[positions], learnt[positions]


def _positions(chosen: Tensor, length: int) -> Tensor:
    """``(windows, length + 1)`` positions in the stream of the windows with these numbers."""
    return chosen[:, None] * length + torch.arange(length + 1)
