"""The reference training with two tokenizers: what is learnt, measured and refused."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from bgkernels.training import models
from bgkernels.training.config import DataConfig, DemoConfig, EvalConfig, ModelShape, TrainConfig
from bgkernels.training.corpus import load_corpus
from bgkernels.training.demo import run_demo
from bgkernels.training.errors import ModelError, OptionError
from bgkernels.training.evaluate import own_cost, score
from bgkernels.training.generation import continue_text
from bgkernels.training.materials import prepare
from bgkernels.training.recall import RecallingLM
from bgkernels.training.records import texts_of
from bgkernels.training.tokens import train_tokenizer
from bgkernels.training.translated import TranslatedLM

SAID = """the a cat dog bird fish house garden bridge river teacher student word token likes sees
finds knows teaches follows crosses reads writes big small green purple quick slow old new here
there today again never often and but because while"""
WORDS = SAID.split()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Words that follow each other by chance, some of them often: soft labels say much."""
    folder, draw = tmp_path_factory.mktemp("gardens"), random.Random(0)
    likely = {word: draw.sample(WORDS, 5) for word in WORDS}
    for i in range(40):
        said = ["the"]
        for _ in range(400):
            said.append(draw.choice(likely[said[-1]]))
        (folder / f"note{i}.txt").write_text(" ".join(said))
    return folder


@pytest.fixture(scope="module")
def config(corpus):
    """A teacher of 450 tokens, trained on the text, and a student of 380."""
    folder = corpus.parent / "two-tokenizers"
    data = DataConfig(corpus, vocab=450, sequence_length=32, batch_size=4, held_out=0.1)
    base = replace(
        DemoConfig.quick(),
        data=data,
        teacher_shape=ModelShape(64, 2, 2),
        teacher_training=TrainConfig(200, 1e-2, validate_every=100),
        student_training=TrainConfig(40, 1e-2, validate_every=20),
        evaluation=EvalConfig(windows=40, curve_windows=8),
        output=folder / "teacher",
        methods=("hard",),
    )
    run_demo(base)
    student = train_tokenizer(texts_of(load_corpus(data).train), 380)
    small = models.small_llama(ModelShape(32, 1, 1), len(student), 32, 1)
    models.export(small, student, folder / "student")
    return replace(
        base,
        teacher=str(folder / "teacher" / "models" / "teacher"),
        student=str(folder / "student"),
        output=folder / "run",
        methods=("hard", "static"),
    )


@pytest.fixture(scope="module")
def materials(config):
    return prepare(config, load_corpus(config.data))


def test_a_student_learns_from_a_teacher_of_another_vocabulary(config, materials):
    """In bits per byte, which for one student is cross-entropy, it is ahead of the text alone."""
    result = run_demo(config)
    cost = {m: s.measures["cross_entropy"]["all"] for m, s in result.students.items()}
    gain = cost["hard"] - cost["static"]
    assert gain.mean > 3 * gain.error
    kl = {m: s.measures["kl"]["all"].mean for m, s in result.students.items()}
    assert kl["static"] < kl["hard"]
    assert 0 < result.students["static"].measures["kl"]["all"].share < 1
    assert result.teacher.cross_entropy < cost["hard"].mean
    exported = models.load_pretrained(str(config.output / "models" / "teacher"), "--teacher", 32)
    assert len(exported[1]) == len(materials.teacher_tokenizer) != len(materials.tokenizer)


def test_what_the_tokenizers_share_is_said(materials):
    found = materials.coverage
    assert 0 < found.aligned < 1 and 0 < found.student <= 1 and found.differing == 0
    assert isinstance(materials.teacher, TranslatedLM)


def test_the_cost_of_a_text_is_that_of_its_tokens(materials):
    """Written once for its own tokens, and once from the tokens of the student."""
    teacher, tokenizer = materials.teacher, materials.tokenizer
    text = "the teacher knows a word and the student sees the green bird"
    ids = torch.tensor([tokenizer.encode(text)])
    labels = ids[:, 1:].clone()
    found = teacher.cost(ids, labels)
    own = torch.tensor([materials.teacher_tokenizer.encode(text)])
    head = teacher.source.leading(teacher.source.vocab)
    lp = head(teacher.source.hidden(own)).log_softmax(-1)
    nll = -lp[0, :-1].gather(1, own[0, 1:, None])[:, 0]
    places = teacher.reading(ids).alignment.positions[0]
    at = (places[:-1] >= 0).nonzero()[:, 0]  # of what is scored
    wanted = nll[places[at[0]] : places[at[-1]]].sum() / (at[-1] - at[0])
    assert found == pytest.approx(float(wanted), rel=1e-4)


def test_the_teacher_writes_in_the_tokens_of_the_student(materials):
    prompts = materials.exam.windows[:6, :8]
    text = continue_text(materials.teacher, prompts, 16, materials.teacher.vocab, seed=3)
    assert text.shape == (6, 24)
    assert torch.equal(text[:, :8], prompts)
    assert int(text.max()) < len(materials.tokenizer)
    assert torch.equal(
        text, continue_text(materials.teacher, prompts, 16, materials.teacher.vocab, seed=3)
    )
    said = materials.tokenizer.decode(text[0, 8:])
    assert sum(word in WORDS for word in said.split()) > len(said.split()) / 2


def test_a_recalling_teacher_is_the_same(materials):
    tokens = materials.exam.windows[:4, :-1]
    plain = materials.teacher.as_teacher(tokens)
    kept = RecallingLM.of(materials.teacher)
    first, again = kept.as_teacher(tokens), kept.as_teacher(tokens)
    assert torch.equal(first.positions, plain.positions)
    assert again.teacher.hidden is first.teacher.hidden
    torch.testing.assert_close(first.teacher.hidden, plain.teacher.hidden)


def test_tokens_without_a_soft_label_are_in_no_mean_of_the_teacher(materials):
    exam, student = materials.exam, materials.student
    tokens = score(student, materials.teacher, exam.files)
    assert (tokens.valid & ~tokens.soft).any()
    all_of_them = tokens.estimates(tokens.nll, 0.25, hard=True)["all"]
    soft = tokens.estimates(tokens.kl, 0.25)
    assert all_of_them.share == 1 > soft["all"].share
    assert soft["bridge"].share + soft["garden"].share == pytest.approx(soft["all"].share)
    assert own_cost(student, exam.files) == pytest.approx(all_of_them.mean)


def test_what_cannot_be_is_refused(config, materials):
    with pytest.raises(OptionError, match="takes its hard labels from the teacher"):
        run_demo(replace(config, methods=("argmax",)))
    with pytest.raises(ModelError, match="--teacher and --second-teacher must share"):
        prepare(replace(config, second_teacher=config.student), load_corpus(config.data))
