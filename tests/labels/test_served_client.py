"""Requests to servers that are busy, broken, away, or not what they should be."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from contextlib import ExitStack

import pytest
import torch

pytest.importorskip("urllib3", reason="needs the extra `served`: urllib3")

from bgkernels.labels.errors import ServerError
from bgkernels.labels.served.api import HiddenStates, LogProbabilities, find_model
from bgkernels.labels.served.client import Client
from tests.models import VOCAB, tiny
from tests.stand_in import StandIn

MODEL = tiny(seed=1).eval().requires_grad_(False)
TEXTS = [[(5 * i + 3 * j) % VOCAB for j in range(1 + i % 9)] for i in range(40)]
FAST = {"backoff": 0.01, "timeout": 1.0}


def expected(tokens):
    return MODEL.model(torch.tensor([tokens])).last_hidden_state[0]


def read(client, dtype=torch.float32):
    return list(client.in_order(HiddenStates(client, "teacher", dtype), TEXTS))


def check(found):
    for tokens, states in zip(TEXTS, found, strict=True):
        torch.testing.assert_close(states, expected(tokens), rtol=1e-5, atol=1e-6)


def test_states_in_order_and_bounded():
    with StandIn(MODEL, delay=0.01) as server:
        check(read(Client(server.url, in_flight=4)))
        assert 2 <= server.most <= 4
        assert sum(server.texts.values()) == len(TEXTS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dtypes_travel_in_binary(dtype):
    with StandIn(MODEL) as server:
        for tokens, states in zip(TEXTS, read(Client(server.url), dtype), strict=True):
            assert states.dtype == dtype
            torch.testing.assert_close(states, expected(tokens).to(dtype), rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("fault", ["cut", "busy", "broken", "stall"])
def test_what_passes_is_tried_again(fault):
    """Every third request fails; nothing is lost, doubled or out of order."""
    faults = {1, 4} if fault == "stall" else set(range(0, 60, 3))
    with StandIn(MODEL, fault=lambda n: fault if n in faults else "") as server:
        check(read(Client(server.url, **FAST)))
        assert len(server.asked) > len(TEXTS)


def test_a_server_that_restarts():
    with StandIn(MODEL, delay=0.01) as first:
        client = Client(first.url, in_flight=4, **FAST)
        answers = client.in_order(HiddenStates(client, "teacher", torch.float32), TEXTS)
        found = [next(answers) for _ in range(5)]
    again = StandIn(MODEL, port=first.port)
    threading.Timer(0.2, again.__enter__).start()
    check([*found, *answers])
    again.__exit__()


def test_several_share_the_load_and_one_dies():
    with ExitStack() as stack:
        servers = [stack.enter_context(StandIn(MODEL, delay=0.005)) for _ in range(3)]
        client = Client(",".join(server.url for server in servers), **FAST)
        check(read(client))
        counts = [sum(server.texts.values()) for server in servers]
        assert sum(counts) == len(TEXTS) and min(counts) >= 5
        servers[0].__exit__()
        check(read(client))


def test_whoever_stays_away_is_named():
    with StandIn(MODEL, fault=lambda n: "broken") as server:
        client = Client(server.url, retries=2, **FAST)
        with pytest.raises(ServerError, match=rf"{server.url} keeps answering with status 500: br"):
            read(client)
    with pytest.raises(ServerError, match=rf"{server.url} does not answer \(nothing listens there"):
        find_model(Client(server.url, retries=1, **FAST))


def test_closing_ends_pauses():
    client = Client("http://127.0.0.1:9", backoff=30.0)
    future = client.submit(client.request, "GET", "/v1/models")
    time.sleep(0.2)
    client.close()
    with pytest.raises(ServerError, match="closed"):
        future.result(timeout=5)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("gpu7:8000", "must be such as http://localhost:8000; got 'gpu7:8000'"),
        ("", "must be such as"),
        ("ftp://gpu7", "must be such as"),
        ("http://user:secret@gpu7", r"on gpu7 holds a password; .*VLLM_API_KEY"),
    ],
)
def test_urls(url, message):
    with pytest.raises(ServerError, match=message) as caught:
        Client(url)
    assert "secret" not in str(caught.value)


def test_keys_are_sent_and_never_shown(monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    with StandIn(MODEL, key="sesame") as server:
        monkeypatch.setenv("VLLM_API_KEY", "sesame")
        client = Client(server.url)
        assert find_model(client).limit == 64
        assert "sesame" not in repr(client) + repr(HiddenStates(client, "teacher"))
        with pytest.raises(ServerError, match=r"refuses the key .*401.*set VLLM_API_KEY") as caught:
            find_model(Client(server.url, api_key="wrong-key"))
        monkeypatch.delenv("VLLM_API_KEY")
        with pytest.raises(ServerError, match="refuses a request without a key"):
            find_model(Client(server.url))
    assert "wrong-key" not in str(caught.value)
    assert not re.search("sesame|wrong-key", caplog.text)


def test_models():
    named = pytest.raises(ServerError, match=r"serves the models teacher, so .*got 'other'")
    with StandIn(MODEL) as server, named:
        find_model(Client(server.url), "other")
    short = pytest.raises(ServerError, match="answered 3 tokens with 2 states of 16 numbers")
    with StandIn(MODEL, fault=lambda n: "short") as server, short:
        HiddenStates(Client(server.url), "teacher", torch.float32)([4, 5, 6])
    missing = pytest.raises(ServerError, match=r"status 404.*vllm serve MODEL --runner pooling")
    with StandIn(MODEL, generates=True) as server, missing:
        HiddenStates(Client(server.url), "teacher")([4])


@pytest.mark.parametrize("sglang", [False, True], ids=["vllm", "sglang"])
def test_log_probabilities(sglang):
    with StandIn(MODEL, generates=True) as server:
        source = LogProbabilities(Client(server.url), "teacher", 6, sglang)
        for tokens in filter(lambda x: len(x) > 1, TEXTS):
            document = source(tokens)
            assert document.tokens.tolist() == tokens
            logprobs = MODEL.lm_head(expected(tokens)).log_softmax(-1)
            labels = document.labels
            best = logprobs.topk(6).values[:-1]
            present = labels.indices >= 0
            assert present.sum(1).tolist()[-1] == 0
            assert set(present.sum(1).tolist()[:-1]) <= {6, 7}
            torch.testing.assert_close(labels.logprobs[:-1, :6], best, rtol=1e-4, atol=1e-4)
            own = logprobs.gather(1, labels.indices.clamp_min(0))
            torch.testing.assert_close(labels.logprobs[present], own[present], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sglang", [False, True], ids=["vllm", "sglang"])
def test_fewer_log_probabilities_than_asked_for(sglang):
    with StandIn(MODEL, generates=True, fault=lambda n: "short") as server:
        source = LogProbabilities(Client(server.url), "teacher", 6, sglang)
        with pytest.raises(ServerError, match=r"fewer than the 6 entries .* --max-logprobs 6"):
            source([4, 5, 6, 7])
        if not sglang:
            with pytest.raises(ServerError, match=r"status 400: Requested .* 20\); lower --k"):
                LogProbabilities(Client(server.url), "teacher", 21)([4, 5])


def test_answers_of_something_else():
    with StandIn(MODEL) as server:
        server._get = lambda handler: _page(handler)
        with pytest.raises(ServerError, match=r"lists no models \(status 200\)"):
            find_model(Client(server.url))


def _page(handler):
    data = json.dumps("hello").encode()
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)
