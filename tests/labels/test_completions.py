"""Text that a server says: the model's own, bounded, and refused where it is something else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("urllib3", reason="needs the extra `served`: urllib3")

from bgkernels.labels.errors import ServerError
from bgkernels.labels.served.client import Client
from bgkernels.labels.served.completions import Completions, reload_weights
from tests.models import VOCAB, tiny
from tests.stand_in import StandIn

MODEL = tiny(seed=1).eval().requires_grad_(False)
FAST = {"backoff": 0.01, "timeout": 5.0, "retries": 3}


def greedy(text, length):
    for _ in range(length):
        text = [*text, int(MODEL(torch.tensor([text])).logits[0, -1].argmax())]
    return text[-length:]


def test_what_it_says():
    prompts = [[(3 * i + j) % VOCAB for j in range(1 + i % 5)] for i in range(12)]
    faults = {1: "cut", 3: "busy", 6: "broken"}
    with StandIn(MODEL, generates=True, fault=lambda n: faults.get(n, "")) as server:
        client = Client(server.url, **FAST)
        say = Completions(client, "teacher")
        said = list(client.in_order(lambda x: say(x, 6, seed=2**63 - 1, temperature=0.0), prompts))
    assert said == [greedy(prompt, 6) for prompt in prompts]


def test_seeds_and_stops():
    with StandIn(MODEL, generates=True) as server:
        say = Completions(Client(server.url), "teacher")
        one, again, other = (say([4, 5], 20, seed) for seed in (1, 1, 2))
        assert one == again != other
        assert say([4, 5], 20, 1, stop=one[7]) == one[: one.index(one[7]) + 1]


def test_fewer_tokens_than_were_asked_for():
    few = pytest.raises(ServerError, match="said 5 tokens where 6 were asked for")
    with StandIn(MODEL, generates=True, fault=lambda n: "short") as server, few:
        Completions(Client(server.url), "teacher")([4, 5], 6, 0)
    none = pytest.raises(ServerError, match=r"2 tokens by 6 \(status 404.*vllm serve MODEL")
    with StandIn(MODEL) as server, none:
        Completions(Client(server.url), "teacher")([4, 5], 6, 0)


def test_other_weights(tmp_path):
    other = tiny(seed=3)
    other.save_pretrained(tmp_path)
    served = tiny(seed=1)
    with StandIn(served, generates=True, develops=True) as server:
        reload_weights(Client(server.url), tmp_path)
    expected = other.state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in served.state_dict().items())


@pytest.mark.parametrize("develops", [False, True])
def test_weights_that_cannot_be_read(develops):
    """What may stop a server is not tried again."""
    match = "must see that folder" if develops else "VLLM_SERVER_DEV_MODE=1"
    with StandIn(MODEL, generates=True, develops=develops) as server:
        with pytest.raises(ServerError, match=rf"{server.url} did not read .*nowhere.*{match}"):
            reload_weights(Client(server.url, **FAST), Path("nowhere"))
        assert len(server.asked) <= 1
    with pytest.raises(ServerError, match="nothing listens there"):
        reload_weights(Client("http://127.0.0.1:9"), Path("nowhere"))
