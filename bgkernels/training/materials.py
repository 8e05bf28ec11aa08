"""What every run of a demo shares: tokenizer, tokens, and the models it starts from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bgkernels.training.config import DemoConfig
from bgkernels.training.corpus import Corpus
from bgkernels.training.evaluate import Examination
from bgkernels.training.files import digest
from bgkernels.training.models import (
    CausalLM,
    check_same_tokenizer,
    load_pretrained,
    small_llama,
)
from bgkernels.training.records import texts_of
from bgkernels.training.tokens import Batches, held_out_windows, token_stream, train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Materials:
    """Tokens and starting points.

    Args:
        tokenizer: one for all models.
        batches: training tokens.
        exam: held-out tokens.
        tokens: how many are in the training part and in the held-out part.
        identity: of the data, for checkpoints.
        teacher: a pretrained teacher, or None where one must be trained.
        student: the student before distillation.
    """

    tokenizer: PreTrainedTokenizerBase
    batches: Batches
    exam: Examination
    tokens: tuple[int, int]
    identity: dict[str, Any]
    teacher: CausalLM | None
    student: CausalLM


def prepare(config: DemoConfig, corpus: Corpus) -> Materials:
    """Load or make tokenizer and models, and encode the corpus.

    Raises:
        CorpusError: there is less text than a batch needs.
        ModelError: a named model cannot be used, or the two do not share a tokenizer.
    """
    data = config.data
    teacher, student, tokenizer = _named_models(config, texts_of(corpus.train[:1])[0])
    if tokenizer is None:
        tokenizer = train_tokenizer(texts_of(corpus.train), data.vocab)
    if student is None:
        vocab, length = len(tokenizer), data.sequence_length
        student = small_llama(config.student_shape, vocab, length, config.seed + 1)
    train, learnt = token_stream(tokenizer, corpus.train)
    held_out, _ = token_stream(tokenizer, corpus.held_out)
    windows = held_out_windows(held_out, config.evaluation.windows, data.sequence_length)
    return Materials(
        tokenizer,
        Batches(train, data.sequence_length, data.batch_size, config.seed, learnt),
        Examination(windows, config.evaluation, config.seed),
        (len(train), len(held_out)),
        {
            "corpus": corpus.digest,
            "tokens": digest([train.numpy().tobytes(), learnt.numpy().tobytes()]),
            "sequence length": data.sequence_length,
            "batch size": data.batch_size,
            "seed": config.seed,
        },
        teacher,
        student,
    )


def _named_models(
    config: DemoConfig, sample: str
) -> tuple[CausalLM | None, CausalLM | None, PreTrainedTokenizerBase | None]:
    """Teacher and student where the user named them, and the tokenizer that they bring."""
    length = config.data.sequence_length
    teacher = student = tokenizer = None
    if config.teacher is not None:
        teacher, tokenizer = load_pretrained(config.teacher, "--teacher", length)
        teacher.freeze()
    if config.student is not None:
        student, students = load_pretrained(config.student, "--student", length)
        if tokenizer is not None:
            check_same_tokenizer(tokenizer, students, sample[:10_000])
        tokenizer = students
    return teacher, student, tokenizer
