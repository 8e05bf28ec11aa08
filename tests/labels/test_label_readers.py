"""Labels from recorded responses of vLLM and SGLang, in their formats and with their faults."""

from __future__ import annotations

import copy
import json
import math

import pytest

from bgkernels.labels import (
    LabelDataset,
    LabelError,
    collate,
    read_sglang,
    read_vllm,
    save_documents,
)

TOP = {7: math.log(0.5), 2: math.log(0.3), 9: math.log(0.05)}
NEXT = {4: math.log(0.9), 7: math.log(0.06)}
LAST = {1: math.log(0.7), 4: math.log(0.2), 30: math.log(0.01)}
"""After tokens 5, 2 and 4; token 9 and 30 came after the top two, because they were in the text."""


def vllm_rows(*rows):
    return [
        row
        and {str(t): {"logprob": x, "rank": 1, "decoded_token": f"w{t}"} for t, x in row.items()}
        for row in rows
    ]


COMPLETION = {
    "id": "cmpl-1",
    "object": "text_completion",
    "model": "teacher",
    "choices": [
        {
            "index": 0,
            "text": " next",
            "token_ids": [4, 30],
            "prompt_token_ids": [5, 9],
            "prompt_logprobs": vllm_rows(None, TOP),
            "logprobs": {
                "text_offset": [0, 5],
                "tokens": ["token_id:4", "token_id:30"],
                "token_logprobs": [NEXT[4], LAST[30]],
                "top_logprobs": [
                    {f"token_id:{t}": x for t, x in NEXT.items()},
                    {"token_id:1": LAST[1], "token_id:4": LAST[4], "token_id:3": -9999.0},
                ],
            },
        }
    ],
}

CHAT = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "prompt_token_ids": [5, 9],
    "prompt_logprobs": vllm_rows(None, TOP),
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": " next"},
            "logprobs": {
                "content": [
                    {
                        "token": f"token_id:{token}",
                        "logprob": row[token],
                        "bytes": None,
                        "top_logprobs": [
                            {"token": f"token_id:{t}", "logprob": x, "bytes": None}
                            for t, x in list(row.items())[:2]
                        ],
                    }
                    for token, row in ((4, NEXT), (30, LAST))
                ]
            },
        }
    ],
}


def triples(row):
    return [[x, t, None] for t, x in row.items()]


SGLANG = {
    "text": " next",
    "output_ids": [4, 30],
    "meta_info": {
        "id": "1",
        "prompt_tokens": 2,
        "input_token_logprobs": [[None, 5, None], [TOP[9], 9, None]],
        "input_top_logprobs": [None, triples(TOP)[:2]],
        "output_token_logprobs": [[NEXT[4], 4, None], [LAST[30], 30, None]],
        "output_top_logprobs": [triples(NEXT), triples(LAST)[:2]],
    },
}

READERS = {"completion": read_vllm, "chat": read_vllm, "sglang": read_sglang}
SAMPLES = {"completion": COMPLETION, "chat": CHAT, "sglang": SGLANG}


def write(path, *responses):
    path.write_text("\n".join(json.dumps(response) for response in responses) + "\n")
    return path


@pytest.mark.parametrize("kind", SAMPLES)
def test_recorded_responses(kind, tmp_path):
    sample = SAMPLES[kind]
    path = write(tmp_path / "responses.jsonl", sample, sample)
    path.write_text(path.read_text().replace("\n", "\n\n", 1))
    documents = list(READERS[kind](path))
    assert len(documents) == 2
    labels = documents[1].labels
    assert documents[1].tokens.tolist() == [5, 9, 4, 30]
    assert labels.indices.tolist() == [[7, 2, 9], [4, 7, -1], [1, 4, 30], [-1, -1, -1]]
    expected = [0.5, 0.3, 0.05, 0.9, 0.06, 0.7, 0.2, 0.01]
    assert labels.logprobs[labels.indices >= 0].exp().tolist() == pytest.approx(expected)
    assert labels.entropy is None and labels.sample is None


def test_from_a_server_to_batches(tmp_path):
    path = write(tmp_path / "responses.jsonl", [SGLANG, SGLANG], SGLANG)
    documents = list(read_sglang(path))
    folder = tmp_path / "labels"
    for _ in range(2):  # the second time there is nothing to do
        save_documents(documents, folder, model="teacher", vocab=31, documents_per_shard=2)
    dataset = LabelDataset(folder)
    assert len(dataset) == 3 and dataset.info.k == 3 and len(dataset.shards) == 2
    batch = collate([dataset[0], dataset[2]])
    assert batch.target.tolist() == [[9, 4, 30, -100]] * 2
    assert batch.indices[0].tolist() == documents[0].labels.indices.tolist()
    assert batch.power_sum is None
    with pytest.raises(LabelError, match=r"something else: data is .*documents is 3 there and 2"):
        save_documents(documents[:2], folder, model="teacher", vocab=31, documents_per_shard=2)
    with pytest.raises(LabelError, match="token is 30, which cannot be"):
        save_documents(documents, tmp_path / "other", model="teacher", vocab=30)


def test_choices_and_prompts_alone(tmp_path):
    prompt = copy.deepcopy(COMPLETION)
    prompt["choices"][0]["logprobs"] = None
    both = copy.deepcopy(COMPLETION)
    both["choices"].append(copy.deepcopy(prompt["choices"][0]))
    first, second, third = read_vllm(write(tmp_path / "a.jsonl", prompt, both))
    assert first.tokens.tolist() == third.tokens.tolist() == [5, 9] and len(second.tokens) == 4
    no_prompt_labels = copy.deepcopy(CHAT)
    no_prompt_labels["prompt_logprobs"] = None
    (document,) = read_vllm(write(tmp_path / "b.jsonl", no_prompt_labels))
    assert document.labels.indices[0].eq(-1).all() and document.labels.indices[1, 0] == 4


def edited(kind, *keys, value):
    response = copy.deepcopy(SAMPLES[kind])
    part = response
    for key in keys[:-1]:
        part = part[key]
    if value is ...:
        del part[keys[-1]]
    else:
        part[keys[-1]] = value
    return response


C, M = ("choices", 0), ("meta_info",)


@pytest.mark.parametrize(
    ("kind", "keys", "value", "message"),
    [
        ("completion", (*C, "prompt_token_ids"), ..., "ask for return_token_ids=true"),
        ("completion", (*C, "prompt_token_ids"), [5], "1 prompt tokens have 2 prompt_logprobs"),
        ("completion", (*C, "logprobs", "tokens"), ["token_id:4"], "not a whole one.*zip"),
        ("completion", (*C, "prompt_logprobs", 1, "7", "logprob"), 0.5, "token 7 has the log-prob"),
        ("completion", (*C, "prompt_logprobs", 1, "7", "logprob"), None, "log-probability None"),
        ("completion", (*C, "prompt_logprobs", 1, "2", "logprob"), -0.1, "sum to 1.455"),
        ("completion", (*C, "prompt_logprobs", 1, "7"), {}, "KeyError: 'logprob'"),
        ("completion", ("choices",), ..., "not a response of vLLM.*KeyError: 'choices'"),
        (
            "chat",
            (*C, "logprobs", "content", 0, "token"),
            " next",
            "' next' is given by its text.*return_tokens_as_token_ids=true",
        ),
        ("chat", (*C, "logprobs", "content", 0, "logprob"), math.nan, None),
        ("sglang", (*M, "input_token_logprobs"), ..., "ask for return_logprob=true"),
        ("sglang", (*M, "input_top_logprobs"), ..., "2 input tokens have 0 .*top_logprobs_num=k"),
        ("sglang", (*M, "input_token_logprobs", 0, 0), -1.0, "ask for logprob_start_len=0"),
        ("sglang", (*M, "output_top_logprobs", 0, 0), 5, "not a response of SGLang"),
        ("sglang", ("choices",), [], "OpenAI-compatible endpoint.*use /generate"),
    ],
)
def test_faults_are_named_by_line(kind, keys, value, message, tmp_path):
    path = write(tmp_path / "responses.jsonl", SAMPLES[kind], edited(kind, *keys, value=value))
    if message is None:  # overridden by the same token among the best
        assert len(list(READERS[kind](path))) == 2
        return
    with pytest.raises(LabelError, match=message) as caught:
        list(READERS[kind](path))
    assert f"{path}, line 2" in str(caught.value)


@pytest.mark.parametrize("line", ["{", "3", '"text"', "[]x", "null"])
def test_lines_that_are_no_responses(line, tmp_path):
    path = tmp_path / "responses.jsonl"
    path.write_text(f"\n\n{line}\n")
    for read in (read_vllm, read_sglang):
        with pytest.raises(LabelError, match="line 3 is not a response of"):
            list(read(path))


def echoed(**changes):
    """The completion above as it comes with ``echo=true``."""
    response = copy.deepcopy(COMPLETION)
    choice, logprobs = response["choices"][0], response["choices"][0]["logprobs"]
    prompt = [None, {f"token_id:{t}": x for t, x in TOP.items()}]
    del choice["prompt_logprobs"]
    logprobs["tokens"] = ["token_id:5", "token_id:9", *logprobs["tokens"]]
    logprobs["token_logprobs"] = [None, TOP[9], *logprobs["token_logprobs"]]
    logprobs["top_logprobs"] = [*prompt, *logprobs["top_logprobs"]]
    choice.update(changes)
    return response


@pytest.mark.parametrize("token_ids", [[4, 30], [5, 9, 4, 30], None])
def test_an_echoed_prompt_is_read_once(tmp_path, token_ids):
    plain, echo = tmp_path / "plain.jsonl", tmp_path / "echo.jsonl"
    plain.write_text(json.dumps(COMPLETION))
    echo.write_text(json.dumps(echoed(token_ids=token_ids)))
    (expected,), (found,) = read_vllm(plain), read_vllm(echo)
    assert found.tokens.tolist() == expected.tokens.tolist() == [5, 9, 4, 30]
    assert found.labels.indices.tolist() == expected.labels.indices.tolist()
    assert found.labels.logprobs.tolist() == expected.labels.logprobs.tolist()


@pytest.mark.parametrize("kind", ["completion", "chat", "echo"])
@pytest.mark.parametrize("token_ids", [[4, 30, 2], [4, 31]])
def test_tokens_without_their_labels_are_noticed(tmp_path, kind, token_ids):
    response = {
        "completion": copy.deepcopy(COMPLETION), "chat": copy.deepcopy(CHAT), "echo": echoed()
    }[kind]  # fmt: skip
    response["choices"][0]["token_ids"] = token_ids
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(response))
    said = rf"line 1: `token_ids` has {len(token_ids)} generated tokens and `logprobs` 2"
    with pytest.raises(LabelError, match=said):
        list(read_vllm(path))
