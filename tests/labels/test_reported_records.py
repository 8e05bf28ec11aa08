"""Conversations as people have them, each a kind of record that ended a run."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from bgkernels.training.config import DataConfig, DemoConfig
from bgkernels.training.corpus import load_corpus
from bgkernels.training.errors import CorpusError
from bgkernels.training.materials import prepare
from bgkernels.training.records import Conversation, read_records
from bgkernels.training.tokens import token_stream, train_tokenizer

HEADER = "<|{{ m['role'] }}|>\n"
TURN = "{% for m in messages %}" + HEADER + "{{ m['content'] }}<|end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
CHATML = TURN + PROMPT
NEEDS_USER = (
    "{% if messages | selectattr('role', 'equalto', 'user') | list | length == 0 %}"
    "{{ raise_exception('No user query found in messages.') }}{% endif %}" + CHATML
)
LAST_THINKS = (
    "{% for m in messages %}" + HEADER + "{% set c = m['content'] %}"
    "{% if m['role'] == 'assistant' and not loop.last and '</think>' in c %}"
    "{% set c = c.split('</think>')[-1].lstrip() %}{% endif %}{{ c }}<|end|>\n{% endfor %}" + PROMPT
)
OPEN_THINK = TURN + "{% if add_generation_prompt %}<|assistant|>\n<think>\n{% endif %}"
CALLS = (
    "{% for m in messages %}" + HEADER + "{{ m['content'] or '' }}"
    "{% for c in m.get('tool_calls') or [] %}<call>{{ c['function']['name'] }}</call>{% endfor %}"
    "<|end|>\n{% endfor %}" + PROMPT
)
MARKED = (
    "{% for m in messages %}" + HEADER + "{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|end|>{% endgeneration %}{% else %}{{ m['content'] }}<|end|>{% endif %}\n"
    "{% endfor %}" + PROMPT
)
SAYINGS = "what is one plus two it is three thanks you are welcome because think call weather"


@pytest.fixture(scope="module")
def words() -> Any:
    text = f"{SAYINGS} <|user|>\n\n<|assistant|>\n\n<think>\n</think>\n\n<|end|>\n " * 3
    return train_tokenizer([text], 400)


def chat(*said: Any, roles: str = "user assistant") -> list[dict[str, Any]]:
    names = roles.split()
    return [{"role": names[i % len(names)], "content": x} for i, x in enumerate(said)]


def read(tmp_path: Any, *rows: dict[str, Any]) -> list[Any]:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_records(path)


def learnt(words: Any, template: str | None, document: Any) -> tuple[str, str]:
    """The text of a record, and what of it is learnt."""
    words.chat_template = template
    tokens, mask = document.encode(words)
    assert len(tokens) == len(mask)
    return words.decode(tokens), words.decode([t for t, x in zip(tokens, mask, strict=True) if x])


def test_a_newline_that_merges_with_the_header(tmp_path: Any, words: Any) -> None:
    merged = words("<|assistant|>\n\nit is")["input_ids"]
    assert words.decode(merged).count("\n\n") == 1
    (document,) = read(tmp_path, {"messages": chat("what is one", "\nit is three")})
    text, answer = learnt(words, CHATML, document)
    assert text == "<|user|>\nwhat is one<|end|>\n<|assistant|>\n\nit is three<|end|>\n"
    assert answer.lstrip("\n") == "it is three<|end|>\n"


def test_a_tokenizer_without_offsets_cuts_at_the_answers(tmp_path: Any, words: Any) -> None:
    """It sees answers and the rest as texts of their own, and learns the same."""

    class Slow(type(words)):  # type: ignore[misc]
        is_fast = False

    slow = Slow(tokenizer_object=words.backend_tokenizer)
    (document,) = read(tmp_path, {"messages": chat("what is one", "it is three")})
    assert learnt(slow, CHATML, document) == learnt(words, CHATML, document)


def test_a_template_that_wants_a_user(tmp_path: Any, words: Any) -> None:
    messages = [{"role": "system", "content": "thanks"}, *chat("what is one", "it is three")]
    (document,) = read(tmp_path, {"messages": messages})
    text, answer = learnt(words, NEEDS_USER, document)
    assert text.startswith("<|system|>\nthanks<|end|>\n<|user|>")
    assert answer == "it is three<|end|>\n"


def test_only_the_last_turn_keeps_its_thoughts(tmp_path: Any, words: Any) -> None:
    thought = "<think>\nbecause\n</think>\n\n"
    messages = chat("what is one", f"{thought}it is three", "thanks", f"{thought}you are welcome")
    (document,) = read(tmp_path, {"messages": messages})
    text, answer = learnt(words, LAST_THINKS, document)
    assert text.count("because") == 1
    assert answer == f"it is three<|end|>\n{thought}you are welcome<|end|>\n"


def test_a_generation_prompt_that_opens_a_thought(tmp_path: Any, words: Any) -> None:
    messages = chat("what is one", "it is", "thanks", "<think>\nbecause\n</think>\n\nyou are")
    (document,) = read(tmp_path, {"messages": messages})
    _, answer = learnt(words, OPEN_THINK, document)
    assert answer == "it is<|end|>\nbecause\n</think>\n\nyou are<|end|>\n"


def test_tool_calls_and_parts(tmp_path: Any, words: Any) -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {}}}
    parts = [{"type": "text", "text": "what is "}, {"type": "text", "text": "one"}]
    messages = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "three"},
        {"role": "assistant", "content": "it is three"},
    ]  # fmt: skip
    (document,) = read(tmp_path, {"messages": messages})
    text, answer = learnt(words, CALLS, document)
    assert text.startswith(
        "<|user|>\nwhat is one<|end|>\n<|assistant|>\n<call>weather</call><|end|>"
    )
    assert answer == "<call>weather</call><|end|>\nit is three<|end|>\n"
    text, answer = learnt(words, None, document)
    assert "weather" in answer and answer.endswith("it is three\n") and "what" not in answer


@pytest.mark.parametrize("template", [CHATML, MARKED, None], ids=["offsets", "marks", "none"])
def test_conversational_prompts_and_completions(tmp_path: Any, words: Any, template: Any) -> None:
    row = {
        "prompt": chat("what is one", "it is one", "thanks"),
        "completion": [{"role": "assistant", "content": "you are welcome"}],
    }
    (document,) = read(tmp_path, row)
    text, answer = learnt(words, template, document)
    assert "it is one" in text and "it is" not in answer
    assert answer.startswith("you are welcome")


def test_marks_say_what_an_answer_is(tmp_path: Any, words: Any) -> None:
    (document,) = read(tmp_path, {"messages": chat("what is", "it is one", "thanks", "you are")})
    assert learnt(words, MARKED, document)[1] == "it is one<|end|>you are<|end|>"


UNUSABLE: dict[str, tuple[dict[str, Any], str]] = {
    "picture": (
        {"messages": [{"role": "user", "content": [{"type": "image", "url": "a.png"}]}]},
        "record 2 cannot be used: the content of turn 0 has a part of type 'image'",
    ),
    "no user": (
        {"messages": [{"role": "assistant", "content": "it is three"}]},
        r"record 2 cannot be used: the chat template cannot render it \(No user query found",
    ),
    "number": ({"messages": [{"role": "user", "content": 3}]}, "record 2 must have a column"),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNUSABLE)
def test_an_unusable_record_is_named_or_left_out(tmp_path: Any, words: Any, kind: str) -> None:
    bad, said = UNUSABLE[kind]
    good = [{"messages": chat(f"what is {i}", f"it is {i}")} for i in range(30)]
    path = tmp_path / "a.jsonl"
    if kind == "number":  # a column of one type
        good = [{"messages": chat(f"what is {i}", f"it is {i}"), "text": None} for i in range(30)]
        bad, said = {"messages": None, "text": None}, "record 2 must have a column"
    if kind == "picture":  # likewise: all contents are lists of parts
        for row in good:
            for m in row["messages"]:
                m["content"] = [{"type": "text", "text": m["content"], "url": None}]
    rows = [*good[:2], bad, *good[2:]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words.chat_template = NEEDS_USER
    with pytest.raises(CorpusError, match=rf"--corpus.*{said}.*--skip-unusable"):
        token_stream(words, read_records(path))
    unusable: list[str] = []
    documents = read_records(path, unusable)
    tokens, mask = token_stream(words, documents, unusable)
    assert len(unusable) == 1 and "record 2" in unusable[0]
    assert words.decode(tokens[mask]).count("it is") == 30


def test_a_template_that_leaves_an_answer_out_is_named(words: Any) -> None:
    words.chat_template = "{{ messages[-1]['content'] }}"
    document = Conversation((("user", "a"), ("assistant", "b"), ("user", "c")), number=7)
    with pytest.raises(CorpusError, match=r"record 7 .* leaves out its answer in turn 1"):
        document.encode(words)


def test_a_run_trains_on_the_others_and_counts(tmp_path: Any) -> None:
    rows = [{"messages": chat(f"what is {i}", f"it is {i} and more of it")} for i in range(40)]
    path = tmp_path / "a.jsonl"
    bad = {"messages": [{"role": "user", "content": "x"}, {"role": "tool", "content": None}]}
    path.write_text("".join(json.dumps(r) + "\n" for r in [*rows, {"messages": None}, bad]))
    data = DataConfig(path, vocab=300, sequence_length=16, batch_size=2, held_out=0.1)
    with pytest.raises(CorpusError, match="record 40"):
        load_corpus(data)
    config = replace(DemoConfig.quick(), data=replace(data, skip_unusable=True))
    materials = prepare(config, load_corpus(config.data))
    assert len(materials.unusable) == 1 and "record 40" in materials.unusable[0]
    assert materials.batches.stream.dtype == torch.int64
