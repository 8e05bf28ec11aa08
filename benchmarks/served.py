"""How fast hidden states are fetched: our client beside the one that vLLM measures itself with.

    BGKERNELS_VLLM_PYTHON=... python -m benchmarks.served http://localhost:8000

The server must send hidden states. Both ask it for the same texts with as many requests at once, in
turns, so that what else the machine does weighs on both. Printed are the medians of tokens a
second, of the ratio of two turns, and of the processor time of either client for a request.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import time
from dataclasses import dataclass

import torch

from bgkernels.labels.served.api import HiddenStates, find_model
from bgkernels.labels.served.client import IN_FLIGHT, Client

PEER = """
import asyncio, json, sys, time
import aiohttp
from vllm.benchmarks.lib.endpoint_request_func import RequestFuncInput, async_request_vllm_pooling
url, model, at_once, body, texts = json.load(sys.stdin)

async def run():
    gate = asyncio.Semaphore(at_once)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=at_once)) as session:
        async def ask(text):
            request = RequestFuncInput(text, url + "/pooling", len(text), 0, model, extra_body=body)
            async with gate:
                answer = await async_request_vllm_pooling(request, session)
            assert answer.success, answer.error
        started, worked = time.perf_counter(), time.process_time()
        await asyncio.gather(*map(ask, texts))
        return time.perf_counter() - started, time.process_time() - worked

print("seconds", json.dumps(asyncio.run(run())))
"""
"""The requests of ``vllm bench serve --backend vllm-pooling``, in a Python that has vLLM."""


Seconds = tuple[float, float]
"""Of the clock, and of the client's processor."""


@dataclass(frozen=True)
class Work:
    """What both fetch.

    Args:
        url: of the server.
        texts: of token numbers.
    """

    url: str
    texts: list[list[int]]

    @property
    def tokens(self) -> int:
        """Of all texts."""
        return sum(map(len, self.texts))

    def ours(self) -> Seconds:
        """What our client takes."""
        client = Client(self.url)
        states = HiddenStates(client, find_model(client).name)
        started, worked = time.perf_counter(), time.process_time()
        for found, text in zip(client.in_order(states, self.texts), self.texts, strict=True):
            assert len(found) == len(text)
        seconds = time.perf_counter() - started, time.process_time() - worked
        client.close()
        return seconds

    def theirs(self, python: str) -> Seconds:
        """What vLLM's takes."""
        body = {"task": "token_embed", "encoding_format": "bytes", "embed_dtype": "bfloat16"}
        body |= {"endianness": "little", "use_activation": False, "add_special_tokens": False}
        model = find_model(Client(self.url)).name
        given = json.dumps([self.url, model, IN_FLIGHT, body, self.texts])
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(
            [python, "-c", PEER], input=given, capture_output=True, text=True, env=environment
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        wall, processor = json.loads(done.stdout.split("seconds ")[-1])
        return wall, processor


def main() -> None:
    """Measure, and print a line a turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=500, help="texts have the tokens below it")
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    shape = (options.texts, options.length)
    texts = torch.randint(3, options.vocab, shape, generator=generator).tolist()
    work, python = Work(options.url, texts), os.environ["BGKERNELS_VLLM_PYTHON"]
    clock, processor = [], []
    for turn in range(options.turns):
        if turn % 2:
            theirs, ours = work.theirs(python), work.ours()
        else:
            ours, theirs = work.ours(), work.theirs(python)
        clock.append((work.tokens / ours[0], work.tokens / theirs[0]))
        processor.append((1e3 * ours[1] / len(texts), 1e3 * theirs[1] / len(texts)))
        one, other = clock[-1]
        print(f"ours {one:8,.0f} tokens/s   vLLM's client {other:8,.0f}   {one / other:.2f}")
    ratio = statistics.median(one / other for one, other in clock)
    one, other = (statistics.median(column) for column in zip(*clock, strict=True))
    print(f"median: ours {one:,.0f} tokens/s, vLLM's client {other:,.0f}, ratio {ratio:.2f}")
    one, other = (statistics.median(column) for column in zip(*processor, strict=True))
    print(f"a request takes ours {one:.2f} ms of a processor, vLLM's client {other:.2f} ms")


if __name__ == "__main__":
    main()
