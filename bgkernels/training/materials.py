"""What every run of a demo shares: tokenizer, tokens, and the models it starts from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bgkernels.training import sharding
from bgkernels.training.config import DemoConfig
from bgkernels.training.corpus import Corpus
from bgkernels.training.errors import OptionError
from bgkernels.training.evaluate import Examination
from bgkernels.training.files import digest
from bgkernels.training.models import (
    CausalLM,
    check_same_tokenizer,
    load_pretrained,
    small_llama,
)
from bgkernels.training.records import texts_of
from bgkernels.training.tasks import parse
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
        teacher: a pretrained teacher on its device, or None where one must be trained.
        student: the student before distillation, in the memory of the CPU.
        second: another pretrained teacher, or None.
        unusable: why some records were left out.
    """

    tokenizer: PreTrainedTokenizerBase
    batches: Batches
    exam: Examination
    tokens: tuple[int, int]
    identity: dict[str, Any]
    teacher: CausalLM | None
    student: CausalLM
    second: CausalLM | None = None
    unusable: tuple[str, ...] = ()


def prepare(config: DemoConfig, corpus: Corpus) -> Materials:
    """Load or make tokenizer and models, and encode the corpus.

    Raises:
        CorpusError: there is less text than a batch needs.
        ModelError: a named model cannot be used, or the models do not share a tokenizer.
    """
    data = config.data
    named, tokenizer = named_models(config, texts_of(corpus.train[:1])[0])
    if tokenizer is None:
        words = texts_of(corpus.train)
        tokenizer = parse(data.task).tokenizer if data.task else train_tokenizer(words, data.vocab)
    student = named.get("--student")
    if student is None:
        vocab, length = len(tokenizer), data.sequence_length
        student = small_llama(config.student_shape, vocab, length, config.seed + 1)
    unusable = [*corpus.unusable]
    gathers = unusable if data.skip_unusable else None
    train, learnt = token_stream(tokenizer, corpus.train, gathers)
    held_out, scored = token_stream(tokenizer, corpus.held_out, gathers)
    evaluation, length = config.evaluation, data.sequence_length
    windows = held_out_windows(
        held_out, scored, evaluation.windows, length, evaluation.given(length)
    )
    return Materials(
        tokenizer,
        Batches(train, data.sequence_length, data.batch_size, config.seed, learnt),
        Examination(*windows, evaluation, config.seed, data.stop),
        (len(train), len(held_out)),
        {
            "corpus": corpus.digest,
            "tokens": digest([train.numpy().tobytes(), learnt.numpy().tobytes()]),
            "sequence length": data.sequence_length,
            "batch size": data.batch_size,
            "seed": config.seed,
        },
        named.get("--teacher"),
        student,
        named.get("--second-teacher"),
        tuple(unusable),
    )


def named_models(
    config: DemoConfig, sample: str
) -> tuple[dict[str, CausalLM], PreTrainedTokenizerBase | None]:
    """The models that the user named, by option, and the one tokenizer that they bring."""
    if config.teacher_url and config.teacher is None:
        raise OptionError("--teacher-url needs --teacher: the checkpoint that is served there")
    found: dict[str, CausalLM] = {}
    tokenizer = None
    options = {
        "--teacher": config.teacher,
        "--second-teacher": config.second_teacher,
        "--student": config.student,
    }
    for option, name in options.items():
        if name is None:
            continue
        model, its_own = _load(config, name, option)
        if tokenizer is not None:
            pair = f"{next(iter(found))} and {option}"
            check_same_tokenizer(tokenizer, its_own, sample[:10_000], pair)
        if option != "--student":
            model.freeze()
            if model.here:
                sharding.place(model, config, config.student_training.bf16)
        found[option], tokenizer = model, its_own
    return found, tokenizer


def _load(config: DemoConfig, name: str, option: str) -> tuple[CausalLM, PreTrainedTokenizerBase]:
    """A model in this process, or the teacher behind a server."""
    length = config.data.sequence_length
    if option == "--teacher" and config.teacher_url:
        from bgkernels.training.served import load_served  # built on the labels, and they on this

        return load_served(config.teacher_url, name, option, length)
    return load_pretrained(name, option, length)
