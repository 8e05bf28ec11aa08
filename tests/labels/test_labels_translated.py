"""Cached labels of a teacher that has another tokenizer than the student."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

import bgkernels as bg
from bgkernels.integrations.causal_lm import attach
from bgkernels.integrations.labels import CachedTeacher
from bgkernels.integrations.translated import TranslatedTeacher
from bgkernels.labels import (
    CaptureConfig,
    CorruptLabels,
    LabelDataset,
    LabelError,
    TranslatedSource,
    generate,
)
from bgkernels.labels.sources import LoadedTeacher
from bgkernels.training import ModelShape, models
from bgkernels.training.cli import app
from bgkernels.vocabularies import Translator, VocabularyError, match
from tests.models import tiny
from tests.vocabularies import toys

STUDENT = toys.fast(toys.byte_level(330), eos_token="<|endoftext|>")
TEACHER = toys.fast(toys.spaced(500), bos_token="<s>", eos_token="</s>", unk_token="<unk>")
DOCUMENTS = [torch.tensor(ids) for ids in [*STUDENT(toys.TEXTS)["input_ids"], [], [70]]]
LENGTH = max(map(len, DOCUMENTS))


@pytest.fixture(scope="module")
def teacher() -> models.CausalLM:
    model = models.small_llama(ModelShape(16, 1, 2), len(TEACHER), length=256, seed=1)
    model.network.lm_head.weight.data.mul_(5)  # opinions
    model.freeze()
    return model


@pytest.fixture(scope="module")
def found() -> Any:
    return match(STUDENT, TEACHER)


@pytest.fixture(scope="module")
def folder(teacher, found, tmp_path_factory) -> Path:
    """Labels with every column of the teacher."""
    folder = tmp_path_factory.mktemp("labels")
    source = TranslatedSource(teacher, Translator(found, TEACHER))
    config = CaptureConfig(k=len(TEACHER), batch_size=2, documents_per_shard=3)
    assert generate(source, DOCUMENTS, folder, config, tokenizer=STUDENT)
    assert 0 < source.soft < source.tokens == sum(map(len, DOCUMENTS))
    return folder


def whole_batch(folder: Path, tokenizer: Any = STUDENT) -> Any:
    dataset = LabelDataset(folder, tokenizer=tokenizer, vocab=len(STUDENT) + 6)
    return dataset.collate(list(dataset))


def step(source: Any, batch: Any, routing: str) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(*batch.tokens.shape, 12, generator=random).requires_grad_()
    weight = torch.randn(len(STUDENT) + 6, 12, generator=random).requires_grad_()
    loss = bg.LinearHybridDistillationLoss(routing=routing)
    value = loss(hidden, weight, source, batch.target)
    return value.detach(), *torch.autograd.grad(value, (hidden, weight))


@pytest.mark.parametrize("routing", ["static", "entropy", "confidence"])
def test_labels_from_disk_are_those_of_the_teacher(teacher, found, folder, routing) -> None:
    batch = whole_batch(folder)
    texts = torch.where(batch.mask, batch.tokens, -1)
    made = Translator(found, TEACHER)(texts)
    places = made.alignment.positions
    live = bg.MatchedTeacher(teacher.as_teacher(made.ids.clamp(min=0)), found, positions=places)
    assert torch.equal((batch.indices >= 0).any(-1), places >= 0)
    assert (batch.target >= 0).sum() == sum(len(x) - 1 for x in DOCUMENTS if len(x))
    cached = step(batch.teacher(), batch, routing)
    for ours, reference in zip(cached, step(live, batch, routing), strict=True):
        assert (ours - reference).abs().max() < 2e-3 * reference.abs().max()


def test_a_few_columns_are_the_top_k_of_the_teacher(teacher, found, tmp_path) -> None:
    source = TranslatedSource(teacher, Translator(found, TEACHER))
    generate(source, DOCUMENTS, tmp_path, CaptureConfig(k=9), tokenizer=STUDENT)
    batch = whole_batch(tmp_path)
    made = Translator(found, TEACHER)(torch.where(batch.mask, batch.tokens, -1))
    labels = bg.capture(teacher.as_teacher(made.ids.clamp(min=0)), 9)
    live = bg.MatchedTeacher(
        bg.TopKTeacher(
            labels.indices, labels.logprobs, entropy=labels.entropy, power_sum=labels.power_sum,
            gamma=0.1, vocab=len(TEACHER),
        ), found, positions=made.alignment.positions,
    )  # fmt: skip
    pairs = step(batch.teacher(), batch, "entropy"), step(live, batch, "entropy")
    for ours, reference in zip(*pairs, strict=True):
        assert (ours - reference).abs().max() < 2e-3 * reference.abs().max()


class Sent(LoadedTeacher):
    """It gives log-probabilities alone, as servers that generate do."""

    whole = False

    def answers(self, shards: Any, size: int) -> Any:
        for teacher in super().answers(shards, size):
            labels = bg.capture(teacher, 9)
            yield bg.SoftLabels(labels.indices, labels.logprobs)


def test_a_server_s_log_probabilities_are_placed_as_a_model_s(teacher, found, tmp_path) -> None:
    batches = []
    for kind in (LoadedTeacher, Sent):
        source = TranslatedSource(kind(teacher), Translator(found, TEACHER))
        config = CaptureConfig(k=9, batch_size=2, documents_per_shard=5)
        generate(source, DOCUMENTS, tmp_path / kind.__name__, config)
        batches.append(whole_batch(tmp_path / kind.__name__, None))
    loaded, sent = batches
    assert torch.equal(loaded.indices, sent.indices) and sent.entropy is sent.power_sum is None
    torch.testing.assert_close(loaded.logprobs, sent.logprobs)


def test_texts_without_a_token_have_no_labels(teacher, found, tmp_path) -> None:
    source = TranslatedSource(teacher, Translator(found, TEACHER))
    generate(source, [[], [70], []], tmp_path, CaptureConfig(k=4, batch_size=1))
    assert [len(x.labels.indices) for x in LabelDataset(tmp_path)] == [0, 1, 0]


def test_in_a_trainer_s_model(teacher, found, folder) -> None:
    """Where all columns are kept, cached labels are the teacher beside the student."""
    size = {"max_position_embeddings": 256, "eos_token_id": None, "bos_token_id": None}
    student = tiny(vocab_size=len(STUDENT) + 6, pad_token_id=None, **size)
    stored = CachedTeacher(LabelDataset(folder))
    data = stored.collate([document for document in stored.dataset if len(document.tokens)])
    plain = {name: x for name, x in data.items() if name not in stored.columns}
    attach(student, TranslatedTeacher(teacher.network, found, TEACHER), routing="confidence")
    expected = student(**plain).loss
    attach(student, stored, routing="confidence")
    torch.testing.assert_close(student(**data).loss, expected, rtol=1e-4, atol=1e-5)


def test_workers_send_batches_that_find_the_match(folder) -> None:
    dataset = LabelDataset(folder)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=2, num_workers=1, collate_fn=dataset.collate
    )
    teachers = [batch.teacher() for batch in loader]
    tensors = {id(made.pairs.pairs) for made in teachers}
    assert len(teachers) == 3 and tensors == {id(dataset.match.pairs)}


def test_what_does_not_fit_is_refused(folder, teacher, found, tmp_path) -> None:
    with pytest.raises(LabelError, match="a student that they were made for"):
        LabelDataset(folder, tokenizer=TEACHER)
    with pytest.raises(VocabularyError, match="the head of the student has 9 columns"):
        LabelDataset(folder, vocab=9)
    short = models.small_llama(ModelShape(16, 1, 2), 300, length=256, seed=1)
    with pytest.raises(VocabularyError, match="the head of the teacher has 300 columns"):
        generate(TranslatedSource(short, Translator(found, TEACHER)), DOCUMENTS, tmp_path / "a")
    with pytest.raises(LabelError, match=f"token {len(STUDENT)}, and the vocabulary has"):
        source = TranslatedSource(teacher, Translator(found, TEACHER))
        generate(source, [[len(STUDENT)]], tmp_path / "b")
    with pytest.raises(LabelError, match=r"holds labels of something else: .*match is"):
        generate(teacher, [[1, 2]], folder, CaptureConfig(documents_per_shard=3))


def test_a_changed_match_is_seen(teacher, found, tmp_path) -> None:
    source = TranslatedSource(teacher, Translator(found, TEACHER))
    generate(source, DOCUMENTS[:1], tmp_path, CaptureConfig(k=4))
    file = tmp_path / "match.npz"
    match(STUDENT, STUDENT).save(file)
    with pytest.raises(CorruptLabels, match="not the match that the labels have"):
        LabelDataset(tmp_path, vocab=400)
    file.unlink()
    with pytest.raises(CorruptLabels, match="is missing or corrupt"):
        LabelDataset(tmp_path / ".", vocab=400)


def test_a_text_too_long_for_the_teacher_is_named(found, tmp_path) -> None:
    shape = {"n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    network = GPT2LMHeadModel(GPT2Config(vocab_size=len(TEACHER), **shape))
    source = TranslatedSource(models.read_head(network, ""), Translator(found, TEACHER))
    with pytest.raises(LabelError, match=r"at most 16 tokens, and a text has \d+ of its own"):
        generate(source, DOCUMENTS, tmp_path)


def test_command(teacher, tmp_path) -> None:
    models.export(teacher, TEACHER, tmp_path / "teacher")
    STUDENT.save_pretrained(tmp_path / "student")
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in toys.TEXTS))
    names = ("teacher", "data", "student-tokenizer", "output")
    values = (tmp_path / "teacher", data, tmp_path / "student", tmp_path / "labels")
    options = [x for n, v in zip(names, values, strict=True) for x in (f"--{n}", str(v))]
    options += ["--max-length", "128", "--k", "8"]
    result = CliRunner().invoke(app, ["generate-labels", *options])
    assert result.exit_code == 0, result.output
    assert "of the student's tokens have a soft label" in result.output
    dataset = LabelDataset(tmp_path / "labels", tokenizer=STUDENT)
    assert [x.tokens.tolist() for x in dataset] == STUDENT(toys.TEXTS)["input_ids"]
    options += ["--student-tokenizer", str(tmp_path)]  # where there is none
    missing = CliRunner().invoke(app, ["generate-labels", *options])
    assert missing.exit_code == 1 and "--student-tokenizer must be" in missing.output
