"""What the reference training is made of: text, models whose heads are read, and measures."""

from __future__ import annotations

import runpy
import sys
from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn

from bgkernels.training import evaluate, loop, models, recall
from bgkernels.training.config import DataConfig, DemoConfig, ModelShape, TrainConfig
from bgkernels.training.corpus import load_corpus
from bgkernels.training.errors import CorpusError, ModelError, TrainingError
from bgkernels.training.log import Log
from bgkernels.training.materials import prepare
from bgkernels.training.tokens import Batches, train_tokenizer


@pytest.fixture(scope="module")
def config(corpus):
    data = DataConfig(corpus, vocab=300, sequence_length=16, batch_size=4, held_out=0.1)
    return replace(DemoConfig.quick(), data=data)


@pytest.fixture(scope="module")
def materials(config):
    return prepare(config, load_corpus(config.data))


@pytest.fixture(scope="module")
def teacher(config, materials):
    """A teacher with opinions, though untrained."""
    model = models.small_llama(config.teacher_shape, materials.student.vocab, 16, seed=9)
    model.freeze()
    model.network.lm_head.weight.data.mul_(3)
    return model


# ---- text


def test_corpus_without_text(tmp_path):
    (tmp_path / "picture.txt").write_bytes(b"\x89PNG\xff\x00")
    (tmp_path / "empty.md").write_text(" \n")
    (tmp_path / "program.exe").write_text("not a known suffix")
    with pytest.raises(CorpusError, match=r"--corpus must be a folder of text files.*holds none"):
        load_corpus(DataConfig(tmp_path))
    with pytest.raises(CorpusError, match=r"--corpus .* is not a folder"):
        load_corpus(DataConfig(tmp_path / "missing"))


def test_corpus_too_short(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("few words\n")
    with pytest.raises(CorpusError, match=r"too short.*--sequence-length"):
        prepare(DemoConfig(data=DataConfig(tmp_path)), load_corpus(DataConfig(tmp_path)))


def test_split_is_by_file_and_stable(corpus, tmp_path):
    config = DataConfig(corpus, held_out=0.2)
    before = load_corpus(config)
    assert len(before.train) + len(before.held_out) == 40 and 1 <= len(before.held_out) <= 16
    for path in corpus.glob("note1*.txt"):
        (tmp_path / path.name).write_text(path.read_text())
    fewer = load_corpus(replace(config, corpus=tmp_path))
    assert set(fewer.train) <= set(before.train)
    assert before.digest == load_corpus(config).digest != fewer.digest


def test_single_file_is_cut(tmp_path):
    (tmp_path / "book.txt").write_text("".join(f"line {i}\n" for i in range(1000)))
    corpus = load_corpus(DataConfig(tmp_path))
    assert corpus.train[0] + corpus.held_out[0] == (tmp_path / "book.txt").read_text()
    assert corpus.held_out[0].startswith("line 90")


def test_standard_library_is_the_default():
    corpus = load_corpus(DataConfig(max_bytes=100_000))
    assert corpus.train and corpus.held_out and "import" in corpus.train[0]


def test_batches_visit_every_window_once_an_epoch():
    batches = Batches(torch.arange(101), sequence_length=5, batch_size=4, seed=3)
    epochs = [torch.cat([batches[s].tokens for s in range(e, e + 5)]) for e in (0, 5)]
    for epoch in epochs:
        assert sorted(epoch[:, 0].tolist()) == list(range(0, 100, 5))
        assert torch.equal(epoch, epoch[:, :1] + torch.arange(6))
    assert not torch.equal(*epochs)
    assert torch.equal(batches[2].tokens, Batches(torch.arange(101), 5, 4, seed=3)[2].tokens)


def test_tokenizer_is_reproducible_and_lossless(corpus):
    texts = [path.read_text() for path in sorted(corpus.iterdir())]
    one, two = (train_tokenizer(texts, 300) for _ in range(2))
    assert one.get_vocab() == two.get_vocab()
    assert one.decode(one.encode("naïve ☃\t\n")) == "naïve ☃\t\n"


# ---- models


def tiny(kind, **config):
    """A random model of another family."""
    made = getattr(transformers, f"{kind}Config")(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, **config,
    )  # fmt: skip
    return getattr(transformers, f"{kind}ForCausalLM")(made)


@pytest.mark.parametrize(
    "kind, config, scale, cap",
    [
        ("Llama", {}, 1.0, None),
        ("Gemma2", {"final_logit_softcapping": 5.0}, 1.0, 5.0),
        ("Granite", {"logits_scaling": 4.0}, 0.25, None),
        ("Cohere", {"logit_scale": 0.5}, 0.5, None),
    ],
)
def test_head_is_read_with_its_scale_and_cap(kind, config, scale, cap):
    model = models.read_head(tiny(kind, **config), "--teacher")
    assert (model.logit_scale, model.logit_softcap) == (scale, cap)


class Doubled(transformers.LlamaForCausalLM):
    """Does something to its logits that no field of its configuration tells."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 2 + 1
        return out


class Quantised(nn.Linear):
    pass


def without_head(network):
    network.get_output_embeddings = lambda: None


def with_odd_head(network):
    network.lm_head.__class__ = Quantised


def wrapped_by_peft(network):
    network.peft_config = {}


def doubled(network):
    network.__class__ = Doubled


@pytest.mark.parametrize(
    "spoil, message",
    [
        (without_head, "--student: LlamaForCausalLM has no output head"),
        (with_odd_head, "--student: .* a head of type Quantised.*plain torch.nn.Linear"),
        (wrapped_by_peft, "--student is wrapped by PEFT.*merge_and_unload"),
        (doubled, "--student: Doubled does more to its logits"),
    ],
)
def test_unreadable_head_is_refused(spoil, message):
    network = tiny("Llama")
    spoil(network)
    with pytest.raises(ModelError, match=message):
        models.read_head(network, "--student")


@pytest.fixture(scope="module")
def saved(teacher, materials, tmp_path_factory):
    """A Hugging Face folder with the teacher, and one whose tokenizer differs."""
    folder = tmp_path_factory.mktemp("saved")
    models.export(teacher, materials.tokenizer, folder / "teacher")
    other = train_tokenizer(["quite another text"], 300)
    models.export(teacher, other, folder / "other")
    return folder


def test_named_models_are_used_as_they_are(config, teacher, saved):
    named = replace(config, teacher=str(saved / "teacher"), student=str(saved / "teacher"))
    materials = prepare(named, load_corpus(config.data))
    assert materials.teacher.digest == materials.student.digest == teacher.digest
    assert not any(p.requires_grad for p in materials.teacher.network.parameters())


def test_the_tokenizers_of_two_teachers_must_agree(config, saved):
    pair = replace(config, teacher=str(saved / "teacher"), second_teacher=str(saved / "other"))
    with pytest.raises(
        ModelError, match=r"--teacher and --second-teacher must share one tokenizer.*token"
    ):
        prepare(pair, load_corpus(config.data))


def test_unloadable_model_and_too_long_sequences(config, saved, tmp_path):
    corpus = load_corpus(config.data)
    with pytest.raises(ModelError, match=r"--teacher must be the path .* could not be loaded"):
        prepare(replace(config, teacher=str(tmp_path)), corpus)
    long = replace(config.data, sequence_length=17)
    with pytest.raises(ModelError, match="at most 16 tokens; lower --sequence-length"):
        prepare(replace(config, teacher=str(saved / "teacher"), data=long), corpus)


# ---- measures


def test_scores_equal_dense_torch(materials, teacher):
    student, exam = materials.student, materials.exam
    tokens = evaluate.score(student, teacher, exam.files)
    inputs, target = exam.windows[:, :-1], exam.windows[:, 1:, None]
    with torch.no_grad():
        s, t = (m.network(inputs).logits.double().log_softmax(-1) for m in (student, teacher))
    dense = {
        "nll": -s.gather(-1, target)[..., 0],
        "teacher_nll": -t.gather(-1, target)[..., 0],
        "kl": (t.exp() * (t - s)).sum(-1),
        "ambiguity": -(t.exp() * t).sum(-1) / torch.tensor(s.shape[-1]).log(),
    }
    assert tokens.valid[:, exam.start - 1 :].all() and not tokens.valid[:, : exam.start - 1].any()
    for name, expected in dense.items():
        found = getattr(tokens, name).double()
        torch.testing.assert_close(
            found[tokens.valid], expected[tokens.valid], rtol=1e-4, atol=1e-5
        )


def test_estimates_count_sequences():
    values = torch.tensor([[1.0, 3.0], [5.0, 7.0]])
    ambiguity = torch.tensor([[0.1, 0.9], [0.1, 0.1]])
    valid = torch.ones(2, 2, dtype=torch.bool)
    tokens = evaluate.Tokens(values, values, values, ambiguity, valid, valid)
    parts = tokens.estimates(values, threshold=0.5)
    assert {k: (e.mean, e.share) for k, e in parts.items()} == {
        "all": (4.0, 1.0), "bridge": (pytest.approx(13 / 3), 0.75), "garden": (3.0, 0.25),
    }  # fmt: skip
    means = values.mean(-1)
    assert parts["all"].error == pytest.approx(float(means.std() / 2**0.5))
    same = parts["all"] - parts["all"]
    assert same.mean == same.error == 0, "the common part of a difference cancels"


def test_learning_rate_warms_up_and_decays():
    config = TrainConfig(steps=100, learning_rate=1.0, warmup=0.1, final_rate=0.1)
    rates = [loop.learning_rate(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and 0.1 < rates[-1] < 0.102


def test_a_teacher_reads_a_text_once_until_its_memory_is_full(monkeypatch):
    hidden = models.CausalLM.hidden
    plain = models.small_llama(ModelShape(32, 1, 1), vocab=64, length=16, seed=0)
    teacher = recall.RecallingLM.of(plain)
    read = []
    monkeypatch.setattr(
        models.CausalLM, "hidden", lambda self, x: read.append(x) or hidden(self, x)
    )
    one, two = torch.arange(10).view(2, 5), torch.arange(10).view(5, 2)
    for text in (one, two, one.clone(), two):
        want = hidden(plain, text)
        assert torch.equal(teacher.as_teacher(text).hidden, want)
    with torch.autocast("cpu", torch.bfloat16):
        rough = teacher.hidden(one)
    assert not torch.equal(rough, teacher.hidden(one))
    assert len(read) == 3  # the shape and the autocast tell texts apart
    full = replace(teacher, limit=teacher.hidden(one).nbytes)
    for text in (one, two, two, one):
        full.hidden(text)
    assert len(read) == 3 + 3


def test_a_log_outlives_a_crash_in_the_middle_of_a_line(tmp_path):
    log = Log(tmp_path / "log.jsonl")
    log.write({"step": 1})
    with log.path.open("a") as file:
        file.write('{"step": 2, "lo')
    assert log.read() == [{"step": 1}]


def test_a_log_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match=r"could not write .*log\.jsonl"):
        Log(tmp_path / "file" / "log.jsonl").write({"step": 1})


def test_the_commands_run_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bgkernels", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("bgkernels.training", run_name="__main__")
    assert stop.value.code == 0
    assert "distill" in capsys.readouterr().out
