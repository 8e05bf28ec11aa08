"""Data files: what is read, what is learnt of it, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pyarrow
import pytest
import torch
from pyarrow import parquet

from bgkernels.training.config import DataConfig, DemoConfig
from bgkernels.training.corpus import load_corpus
from bgkernels.training.errors import CorpusError
from bgkernels.training.materials import prepare
from bgkernels.training.records import Conversation, read_records
from bgkernels.training.tokens import IGNORED, held_out_windows, token_stream, train_tokenizer

CHATS = [
    [
        {"role": "user", "content": f"what is {i} plus one"},
        {"role": "assistant", "content": f"it is {i + 1}"},
        {"role": "user", "content": "thanks"},
        {"role": "assistant", "content": "you are welcome"},
    ]
    for i in range(40)
]
CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ONLY_LAST = "{{ messages[-1]['content'] }}"


@pytest.fixture
def tokenizer():
    return train_tokenizer([" ".join(m["content"] for chat in CHATS for m in chat)], 300)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def learnt_text(tokenizer, documents):
    tokens, learnt = token_stream(tokenizer, documents)
    return tokenizer.decode(tokens), tokenizer.decode(tokens[learnt])


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_conversations_are_read_from_both_kinds_of_file(tmp_path, suffix):
    rows, path = [{"messages": chat} for chat in CHATS], tmp_path / f"chats.{suffix}"
    if suffix == "jsonl":
        write_lines(path, rows)
    else:
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found = read_records(path)
    assert found[3] == Conversation(tuple((m["role"], m["content"]) for m in CHATS[3]))


def test_only_answers_are_learnt(tmp_path, tokenizer):
    path = write_lines(tmp_path / "a.jsonl", [{"messages": CHATS[0]}])
    text, learnt = learnt_text(tokenizer, read_records(path))
    assert text.startswith("user: what is 0 plus one\nassistant: it is 1\nuser: thanks\n")
    assert learnt == "it is 1\nyou are welcome\n<|endoftext|>"


def test_chat_template_says_what_an_answer_is(tmp_path, tokenizer):
    tokenizer.chat_template = CHATML
    path = write_lines(tmp_path / "a.jsonl", [{"messages": CHATS[0]}])
    text, learnt = learnt_text(tokenizer, read_records(path))
    assert text.startswith("<|user|>what is 0 plus one<|end|><|assistant|>it is 1<|end|>")
    assert learnt == "it is 1<|end|>you are welcome<|end|><|endoftext|>"


def test_template_that_forgets_is_refused(tokenizer):
    tokenizer.chat_template = ONLY_LAST
    chat = Conversation(tuple((m["role"], m["content"]) for m in CHATS[0]))
    with pytest.raises(CorpusError, match="leaves out its answer in turn 1"):
        chat.encode(tokenizer)


def test_prompts_and_texts(tmp_path, tokenizer):
    prompts = [{"prompt": "two plus two", "completion": "four"}]
    _, learnt = learnt_text(tokenizer, read_records(write_lines(tmp_path / "a.jsonl", prompts)))
    assert learnt == "four\n<|endoftext|>"
    texts = [{"text": "one"}, {"text": "two"}]
    text, learnt = learnt_text(tokenizer, read_records(write_lines(tmp_path / "b.jsonl", texts)))
    assert text == learnt == "one<|endoftext|>two<|endoftext|>"


def test_batches_are_packed_and_masked(tmp_path):
    path = write_lines(tmp_path / "chats.jsonl", [{"messages": chat} for chat in CHATS])
    data = DataConfig(path, vocab=300, sequence_length=16, batch_size=2, held_out=0.1)
    config = replace(DemoConfig.quick(), data=data)
    corpus = load_corpus(data)
    assert len(corpus.train) + len(corpus.held_out) == 40 and corpus.held_out
    materials = prepare(config, corpus)
    batch = materials.batches[0]
    assert batch.tokens.shape == (2, 17) and batch.labels.shape == (2, 16)
    kept = batch.labels != IGNORED
    assert 0 < batch.items == int(kept.sum()) < kept.numel()
    assert torch.equal(batch.labels[kept], batch.tokens[:, 1:][kept])


def test_only_answers_are_scored(tmp_path):
    """Against dense log-probabilities of the answers, after the given part of each sequence."""
    path = write_lines(tmp_path / "chats.jsonl", [{"messages": chat} for chat in CHATS])
    data = DataConfig(path, vocab=300, sequence_length=24, batch_size=2, held_out=0.2)
    config = replace(DemoConfig.quick(), data=data)
    materials = prepare(config, load_corpus(data))
    exam, student = materials.exam, materials.student
    answers: list[bool] = []
    for chat in load_corpus(data).held_out:
        for role, content in chat.turns:
            for text, scored in ((f"{role}: ", False), (f"{content}\n", role == "assistant")):
                answers += [scored] * len(materials.tokenizer(text)["input_ids"])
        answers.append(True)  # the end of the text, after an answer
    with torch.no_grad():
        found = student.network(exam.windows[:, :-1]).logits.double().log_softmax(-1)
    costs = -found.gather(-1, exam.windows[:, 1:, None])[..., 0][:, exam.start - 1 :]
    places = range(0, len(answers) - 24, 24)
    picked = torch.tensor([answers[i : i + 25] for i in places])[:, exam.start :]
    picked = picked[picked.any(-1)]
    assert picked.shape == costs.shape and 0 < picked.sum() < picked.numel()
    expected = float(costs[picked].mean())
    assert exam.curve(student, None)["cross_entropy"] == pytest.approx(expected, rel=1e-5)
    assert float(costs.mean()) != pytest.approx(expected, rel=1e-3), "prompts would show"
    parts = exam.read(student, student, exam.windows).measures(0.25)
    assert parts["cross_entropy"]["all"].mean == pytest.approx(expected, rel=1e-5)


def test_windows_have_something_to_score():
    stream, learnt = torch.arange(81), torch.zeros(81, dtype=torch.bool)
    learnt[[22, 38]] = True  # in the given part of the third window, and beyond it in the fourth
    windows, kept = held_out_windows(stream, learnt, count=5, length=10, given=4)
    assert torch.equal(windows, stream[None, 30:41]) and torch.equal(kept, learnt[None, 30:41])
    with pytest.raises(CorpusError, match=r"no answer beyond the first 9 tokens"):
        held_out_windows(stream, learnt, count=5, length=10, given=9)


def test_equal_records_are_on_one_side(tmp_path):
    rows = [{"text": "the same"}] * 20 + [{"text": f"number {i}"} for i in range(20)]
    corpus = load_corpus(DataConfig(write_lines(tmp_path / "a.jsonl", rows), held_out=0.3))
    assert not set(corpus.train) & set(corpus.held_out)
    assert len(corpus.train) + len(corpus.held_out) == 21


@pytest.mark.parametrize(
    "content, message",
    [
        ("{not json\n", "cannot be read as records"),
        ("", "cannot be read as records|holds no record"),
        ('{"story": "x"}\n', "record 0 must have a column `text`.*it has story"),
        ('{"text": 3}\n', "record 0 must have"),
        ('{"text": " "}\n', "holds no record with text"),
        ('{"text": "lonely"}\n', "holds a single record"),
    ],
)
def test_bad_files_are_refused(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(CorpusError, match=rf"--corpus .*bad\.jsonl.*({message})"):
        load_corpus(DataConfig(path))


def test_corrupt_parquet_is_refused(tmp_path):
    path = tmp_path / "bad.parquet"
    path.write_bytes(b"PAR1 and nothing more")
    with pytest.raises(CorpusError, match="cannot be read as records"):
        load_corpus(DataConfig(path))
