"""What servers are asked, and how their answers are read: vLLM's endpoints, and SGLang's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bgkernels.labels.errors import LabelError, NoStates, ServerError
from bgkernels.labels.served.client import Client, message
from bgkernels.labels.servers import Row, as_document, sglang_rows, vllm_rows
from bgkernels.labels.shard import Document

POOLING = (
    "serve it by: vllm serve MODEL --runner pooling --convert embed "
    """--pooler-config '{"task": "token_embed", "use_activation": false}'"""
)
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
"""Names of the element types in which hidden states can travel."""


@dataclass(frozen=True)
class ServedModel:
    """A model as its servers name it.

    Args:
        name: what requests call it.
        root: the path or name that it was loaded from; empty where that is not told.
        limit: the longest sequence; None: not told.
        sglang: the server is SGLang.
    """

    name: str
    root: str = ""
    limit: int | None = None
    sglang: bool = False


def find_model(client: Client, name: str | None = None) -> ServedModel:
    """The model of a name, which all servers of a client must have, or the one that they have.

    Args:
        client: of the servers.
        name: what requests call it; None: the only one.

    Raises:
        ServerError: there is no such model, or more than one.
    """
    found: list[ServedModel] = []
    for server in client.servers:
        answer = client.request("GET", "/v1/models", url=server.url)
        try:
            models = [x for x in answer.json()["data"] if not x.get("parent")]
            named = [x for x in models if name in (None, x["id"])]
            names = ", ".join(x["id"] for x in models) or "none"
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ServerError(
                f"{server.url} lists no models ({message(answer)}), so it is no server of vLLM or "
                "SGLang; check the URL"
            ) from None
        if len(named) != 1:
            raise ServerError(
                f"{server.url} serves the models {names}, so `model` must be one of them; "
                f"got {name!r}"
            )
        one = named[0]
        sglang = one.get("owned_by") == "sglang"
        limit = one.get("max_model_len")
        found.append(ServedModel(one["id"], one.get("root") or "", limit, sglang))
    other = next((i for i, x in enumerate(found) if x.name != found[0].name), None)
    if other is not None:
        raise ServerError(
            f"{client.servers[0].url} serves {found[0].name} and {client.servers[other].url} "
            f"{found[other].name}; servers that share the load must have one model"
        )
    return found[0]


@dataclass(frozen=True)
class HiddenStates:
    """Last hidden states of texts, from vLLM's ``/pooling``, in binary.

    Args:
        client: of the servers.
        model: what requests call it.
        dtype: in which states travel: fp32, bf16 or fp16.

    Raises:
        ServerError: another ``dtype``.
    """

    client: Client
    model: str
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ServerError(f"`dtype` must be one of {', '.join(map(str, DTYPES))}")

    def __call__(self, tokens: Sequence[int]) -> Tensor:
        """``(length, hidden)`` states of ``(length,)`` tokens, in the memory of the CPU.

        Raises:
            ServerError: the server cannot give them, or gave others.
        """
        body = {
            "model": self.model, "input": list(tokens), "task": "token_embed",
            "encoding_format": "bytes", "embed_dtype": DTYPES[self.dtype], "endianness": "little",
            "use_activation": False, "add_special_tokens": False,
        }  # fmt: skip
        answer = self.client.request("POST", "/pooling", body)
        if answer.status != 200:
            remedy = POOLING if answer.status == 404 or "task" in message(answer) else (
                "cut the texts, or use the tokenizer of the teacher"
            )  # fmt: skip
            kind = NoStates if answer.status == 404 else ServerError
            raise kind(
                f"{self.client.name} does not send hidden states of {len(tokens)} tokens "
                f"({message(answer)}); {remedy}"
            )
        try:
            (entry,) = json.loads(answer.headers["metadata"])["data"]
            rows, width = entry["shape"]
            complete = len(answer.data) == rows * width * self.dtype.itemsize
            complete &= entry["embed_dtype"] == DTYPES[self.dtype]
        except (ValueError, KeyError, TypeError) as error:
            raise ServerError(
                f"{self.client.name} answered with something else than a state for each token "
                f"({type(error).__name__}: {error}); {POOLING}"
            ) from None
        if not complete or rows != len(tokens):
            raise ServerError(
                f"{self.client.name} answered {len(tokens)} tokens with {rows} states of {width} "
                f"numbers in {len(answer.data)} bytes; {POOLING}"
            )
        return torch.frombuffer(bytearray(answer.data), dtype=self.dtype).view(rows, width)


Ask = Callable[[Sequence[int], int], tuple[str, dict[str, Any]]]
"""From tokens and k to a path and a request."""
Parse = Callable[[Any], Iterable[tuple[list[int], list[Row]]]]


@dataclass(frozen=True)
class LogProbabilities:
    """The most probable next tokens of texts, from a server that generates.

    Args:
        client: of the servers.
        model: what requests call it.
        k: how many of each position.
        sglang: ask SGLang's ``/generate``, not the ``/v1/completions`` of vLLM.
    """

    client: Client
    model: str
    k: int
    sglang: bool = False

    def __call__(self, tokens: Sequence[int]) -> Document:
        """A text and its labels; the last position has none, and others may have ``k + 1``.

        Raises:
            ServerError: the server cannot give them, or gave others.
        """
        asks, parse = (_ask_sglang, sglang_rows) if self.sglang else (_ask_vllm, vllm_rows)
        path, body = asks(tokens, self.k)
        answer = self.client.request("POST", path, {"model": self.model, **body})
        if answer.status != 200:
            raise ServerError(
                f"{self.client.name} does not send the {self.k} most probable tokens "
                f"({message(answer)}); lower --k, or start it with --max-logprobs {self.k}"
            )
        try:
            ((read, rows),) = parse(answer.json())
        except (LabelError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ServerError(
                f"{self.client.name} answered without log-probabilities of the text: {error}"
            ) from None
        count = len(tokens)
        short = [row for row in rows[1:count] if row is None or len(row) < self.k]
        if read[:count] != list(tokens) or short:
            fewest = min((len(row or ()) for row in short), default=0)
            raise ServerError(
                f"{self.client.name} answered {count} tokens with {len(read)}, or with fewer than "
                f"the {self.k} entries that were asked for (of a token there are {fewest}); lower "
                f"--k, or start it with --max-logprobs {self.k}"
            )
        return as_document(read[:count], rows[:count])


def _ask_vllm(tokens: Sequence[int], k: int) -> tuple[str, dict[str, Any]]:
    body = {"prompt": list(tokens), "max_tokens": 1, "prompt_logprobs": k, "temperature": 1.0}
    return "/v1/completions", {**body, "return_token_ids": True, "add_special_tokens": False}


def _ask_sglang(tokens: Sequence[int], k: int) -> tuple[str, dict[str, Any]]:
    sampling = {"max_new_tokens": 1, "temperature": 1.0}
    body = {"input_ids": list(tokens), "sampling_params": sampling, "top_logprobs_num": k}
    return "/generate", {**body, "return_logprob": True, "logprob_start_len": 0}


def tokenized(client: Client, model: str, text: str) -> list[int] | None:
    """The tokens of a text by the server's tokenizer; None where it does not tell."""
    body = {"model": model, "prompt": text, "add_special_tokens": False}
    answer = client.request("POST", "/tokenize", body)
    try:
        tokens = answer.json()["tokens"]
    except (ValueError, KeyError, TypeError):
        return None
    return [int(token) for token in tokens]
