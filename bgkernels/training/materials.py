"""What every run of a demo shares: tokenizer, tokens, and the models it starts from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bgkernels.training import sharding
from bgkernels.training.config import DemoConfig
from bgkernels.training.corpus import Corpus
from bgkernels.training.errors import ModelError, OptionError
from bgkernels.training.evaluate import Examination
from bgkernels.training.files import digest
from bgkernels.training.models import (
    CausalLM,
    check_same_tokenizer,
    difference,
    load_pretrained,
    small_llama,
)
from bgkernels.training.records import texts_of
from bgkernels.training.tasks import parse
from bgkernels.training.tokens import Batches, held_out_windows, token_stream, train_tokenizer
from bgkernels.training.translated import TranslatedLM
from bgkernels.vocabularies import Coverage, coverage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from bgkernels.training.text_server import TextServer

SAMPLE = 10_000
"""Characters of the text on which tokenizers must be one."""
READ = 1_000_000
"""Characters on which two of them are compared."""


@dataclass(frozen=True)
class Materials:
    """Tokens and starting points.

    Args:
        tokenizer: of the student and of the text.
        batches: training tokens.
        exam: held-out tokens.
        tokens: how many are in the training part and in the held-out part.
        identity: of the data, for checkpoints.
        teacher: a pretrained teacher on its device, or None where one must be trained.
        student: the student before distillation, in the memory of the CPU.
        second: another pretrained teacher, or None.
        teacher_tokenizer: of the teacher; often the same.
        coverage: what of the text two tokenizers share; None: there is one.
        unusable: why some records were left out.
        server: writes the text of the teacher or the student, or None.
    """

    tokenizer: PreTrainedTokenizerBase
    batches: Batches
    exam: Examination
    tokens: tuple[int, int]
    identity: dict[str, Any]
    teacher: CausalLM | None
    student: CausalLM
    second: CausalLM | None
    teacher_tokenizer: PreTrainedTokenizerBase
    coverage: Coverage | None = None
    unusable: tuple[str, ...] = ()
    server: TextServer | None = None


def prepare(config: DemoConfig, corpus: Corpus) -> Materials:
    """Load or make tokenizer and models, and encode the corpus.

    Raises:
        CorpusError: there is less text than a batch needs.
        ModelError: a named model cannot be used; or the tokenizers of student and teacher share
            nothing, or those of two teachers are not the same.
    """
    data, texts = config.data, texts_of(corpus.train)
    text = texts[0][:SAMPLE]
    named, tokenizers = named_models(config, text)
    tokenizer = tokenizers.get("--student") or next(iter(tokenizers.values()), None)
    if tokenizer is None:
        tokenizer = parse(data.task).tokenizer if data.task else train_tokenizer(texts, data.vocab)
    teacher, shared = named.get("--teacher"), None
    teacher_tokenizer = tokenizers.get("--teacher", tokenizer)
    if teacher is not None and difference(teacher_tokenizer, tokenizer, text):
        read = "\n".join(texts)[:READ]
        teacher = TranslatedLM.of(teacher, teacher_tokenizer, tokenizer, read)
        shared = _coverage(teacher, tokenizer, read)
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
        teacher,
        student,
        named.get("--second-teacher"),
        teacher_tokenizer,
        shared,
        tuple(unusable),
        _text_server(config, named, tokenizers),
    )


def named_models(
    config: DemoConfig, sample: str
) -> tuple[dict[str, CausalLM], dict[str, PreTrainedTokenizerBase]]:
    """The models that the user named, and their tokenizers, by option."""
    if config.teacher_url and config.teacher is None:
        raise OptionError("--teacher-url needs --teacher: the checkpoint that is served there")
    found: dict[str, CausalLM] = {}
    tokenizers: dict[str, PreTrainedTokenizerBase] = {}
    options = {
        "--teacher": config.teacher,
        "--second-teacher": config.second_teacher,
        "--student": config.student,
    }
    for option, name in options.items():
        if name is None:
            continue
        model, tokenizer = _load(config, name, option)
        if found and (config.second_teacher is not None or config.teacher_url):
            first = next(iter(found))
            check_same_tokenizer(tokenizers[first], tokenizer, sample, f"{first} and {option}")
        if option != "--student":
            model.freeze()
            if model.here:
                sharding.place(model, config, config.student_training.bf16)
        found[option], tokenizers[option] = model, tokenizer
    return found, tokenizers


def _coverage(teacher: TranslatedLM, tokenizer: PreTrainedTokenizerBase, text: str) -> Coverage:
    """What two tokenizers share of a text.

    Raises:
        ModelError: no position of it.
    """
    match, its_own = teacher.reading.match, teacher.reading.teacher_tokenizer
    found = coverage(match, tokenizer, its_own, [text])
    if not found.aligned:
        raise ModelError(
            "--teacher and --student: their tokenizers have no position of the text in common; "
            "does one of them change the text (lower case, NFKC)? Normalise the text first"
        )
    return found


def _text_server(
    config: DemoConfig,
    named: dict[str, CausalLM],
    tokenizers: dict[str, PreTrainedTokenizerBase],
) -> TextServer | None:
    """The server that writes a model's text, where there is one."""
    if config.generate_with is None:
        return None
    from bgkernels.training.text_server import open_server  # built on the labels, and they on this

    return open_server(config, named, tokenizers)


def _load(config: DemoConfig, name: str, option: str) -> tuple[CausalLM, PreTrainedTokenizerBase]:
    """A model in this process, or the teacher behind a server."""
    length = config.data.sequence_length
    if option == "--teacher" and config.teacher_url:
        from bgkernels.training.served import load_served  # built on the labels, and they on this

        return load_served(config.teacher_url, name, option, length)
    return load_pretrained(name, option, length)
