"""A stand-in on loopback for a server of vLLM or SGLang: its endpoints, and what may go wrong."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests import models

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOP = 20
"""The most log-probabilities of a token that it sends."""

Fault = str
"""``stall``, ``cut``, ``busy``, ``broken``, ``short``, ``normalised``, or nothing."""


def checkpoint(folder: Path, family: str = "llama", seed: int = 1, **changes: Any) -> Any:
    """A teacher and its tokenizer in a folder; its norms have gains of their own."""
    model = models.tiny(family, seed, **changes)
    for name, p in model.named_parameters():
        if "norm" in name:
            p.data.uniform_(0.5, 1.5)
    model.eval().requires_grad_(False).save_pretrained(folder)
    models.tokenizer().save_pretrained(folder)
    return model


@dataclass
class StandIn:
    """Serves a model while it is entered.

    Args:
        model: of transformers.
        root: where it says that the model is from.
        tokenizer: of the model.
        generates: has vLLM's ``/v1/completions`` and SGLang's ``/generate``, not ``/pooling``;
            ``"both"``: all of them.
        develops: reads other weights, too, where it generates.
        key: what it asks for.
        delay: seconds that a text takes it.
        fault: what goes wrong with a request, by its number from 0.
        owner: whose server it says it is.
        limit: the longest text that it says it takes.
    """

    model: Any
    root: str = ""
    tokenizer: Any = None
    generates: bool | str = False
    develops: bool = False
    key: str = ""
    delay: float = 0.0
    fault: Callable[[int], Fault] = lambda number: ""
    owner: str = "vllm"
    limit: int = 64
    port: int = 0
    texts: Counter[tuple[int, ...]] = field(default_factory=Counter)
    asked: list[float] = field(default_factory=list)
    most: int = 0
    """Texts that were read, when, and the most at once."""
    reloads: int = 0

    def __enter__(self) -> StandIn:
        self._lock, self._open, self._now = threading.Lock(), set[socket.socket](), 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1

            def setup(self) -> None:
                super().setup()
                server._open.add(self.connection)

            def finish(self) -> None:
                server._open.discard(self.connection)
                super().finish()

            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                server._get(self)

            def do_POST(self) -> None:
                server._post(self)

        self._http = _Listener(("127.0.0.1", self.port), Handler)
        self.port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        for connection in list(self._open):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _allowed(self, handler: BaseHTTPRequestHandler) -> bool:
        allowed = not self.key or handler.headers["Authorization"] == f"Bearer {self.key}"
        if not allowed:
            _answer(handler, 401, {"error": "Unauthorized"})
        return allowed

    def _get(self, handler: BaseHTTPRequestHandler) -> None:
        if not self._allowed(handler):
            return
        if handler.path != "/v1/models":
            return _answer(handler, 404, {"detail": "Not Found"})
        one = {"id": "teacher", "root": self.root, "owned_by": self.owner, "parent": None}
        _answer(handler, 200, {"data": [{**one, "max_model_len": self.limit}]})

    def _post(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])) or "null")
        if not self._allowed(handler):
            return
        endpoints = {"/tokenize": self._tokenize} if self.tokenizer is not None else {}
        if self.generates:
            endpoints |= {"/v1/completions": self._complete, "/generate": self._generate}
        if self.develops:
            endpoints |= {"/collective_rpc": self._reload, "/reset_prefix_cache": self._forget}
        if self.generates in (False, "both"):
            endpoints["/pooling"] = self._pool
        if handler.path not in endpoints:
            return _answer(handler, 404, {"detail": "Not Found"})
        if handler.path == "/tokenize":
            return self._tokenize(handler, body, "")
        with self._lock:
            fault = self.fault(len(self.asked))
            self.asked.append(time.perf_counter())
            self._now += 1
            self.most = max(self.most, self._now)
        try:
            if fault == "busy":
                return _answer(handler, 429, {"error": {"message": "busy"}}, {"Retry-After": "0"})
            if fault == "broken":
                return _answer(handler, 500, {"error": {"message": "broken"}})
            time.sleep(10.0 if fault == "stall" else self.delay)
            endpoints[handler.path](handler, body, fault)
        finally:
            with self._lock:
                self._now -= 1

    def _tokenize(self, handler: Any, body: Any, fault: Fault) -> None:
        tokens = self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
        _answer(handler, 200, {"tokens": tokens, "count": len(tokens)})

    def _hidden(self, tokens: list[int]) -> Tensor:
        with torch.no_grad():
            states: Tensor = self.model.model(torch.tensor([tokens])).last_hidden_state[0]
        with self._lock:
            self.texts[tuple(tokens)] += 1
        return states

    def _pool(self, handler: Any, body: Any, fault: Fault) -> None:
        hidden = self._hidden(body["input"])
        if fault == "normalised" or body["use_activation"]:
            hidden = hidden / hidden.norm(dim=1, keepdim=True)
        if fault == "short":
            hidden = hidden[1:]
        content = hidden.to(DTYPES[body["embed_dtype"]]).contiguous().view(torch.uint8)
        data = content.numpy().tobytes()
        entry = {"index": 0, "embed_dtype": body["embed_dtype"], "shape": list(hidden.shape)}
        entry |= {"start": 0, "end": len(data), "endianness": "little"}
        handler.send_response(200)
        handler.send_header("metadata", json.dumps({"data": [entry]}))
        handler.send_header("Content-Type", "application/octet-stream")
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data[: len(data) // 2] if fault == "cut" else data)
        if fault == "cut":
            handler.close_connection = True

    def _rows(self, tokens: list[int], k: int, fault: Fault) -> list[dict[int, float]]:
        """Log-probabilities of each next token: the best, and the one that follows."""
        logprobs = self.model.lm_head(self._hidden(tokens)).log_softmax(-1)
        best = logprobs.topk(k // 2 if fault == "short" else k)
        rows = [
            dict(zip(i.tolist(), p.tolist(), strict=True))
            for i, p in zip(best.indices, best.values, strict=True)
        ]
        for row, p, token in zip(rows, logprobs, tokens[1:], strict=False):
            row.setdefault(token, float(p[token]))
        return rows

    def _complete(self, handler: Any, body: Any, fault: Fault) -> None:
        if "prompt_logprobs" not in body:
            return self._continue(handler, body, fault)
        tokens, k = body["prompt"], body["prompt_logprobs"]
        if k > TOP:
            text = f"Requested prompt logprobs of {k}, which is greater than max allowed: {TOP}"
            return _answer(handler, 400, {"error": {"message": text}})
        rows = [
            {str(i): {"logprob": p} for i, p in row.items()}
            for row in self._rows(tokens, k, fault)[:-1]
        ]
        choice = {"prompt_token_ids": tokens, "prompt_logprobs": [None, *rows], "token_ids": [5]}
        _answer(handler, 200, {"choices": [choice]})

    def _continue(self, handler: Any, body: Any, fault: Fault) -> None:
        """A sample of each next token, with what a checkpoint may recommend switched off."""
        assert (body["top_p"], body["top_k"], body["min_p"]) == (1.0, 0, 0.0)
        assert body["repetition_penalty"] == 1.0 and body["ignore_eos"]
        generator = torch.Generator().manual_seed(body["seed"])
        text, ends = list(body["prompt"]), body["stop_token_ids"]
        for _ in range(body["max_tokens"] - (fault == "short")):
            with torch.no_grad():
                logits = self.model(torch.tensor([text])).logits[0, -1]
            if body["temperature"]:
                p = (logits / body["temperature"]).softmax(-1)
                text.append(int(p.multinomial(1, generator=generator)))
            else:
                text.append(int(logits.argmax()))
            if text[-1] in ends:
                break
        choice = {"token_ids": text[len(body["prompt"]) :]}
        _answer(handler, 200, {"choices": [choice]})

    def _reload(self, handler: Any, body: Any, fault: Fault) -> None:
        """The weights of a checkpoint in place of those that it has."""
        assert body["method"] == "reload_weights"
        folder = Path(body["kwargs"]["weights_path"])
        if not folder.exists():
            return _answer(handler, 500, {"error": {"message": "Worker failed"}})
        other = type(self.model).from_pretrained(folder)
        self.model.load_state_dict(other.state_dict())
        self.reloads += 1
        _answer(handler, 200, {"results": [None]})

    def _forget(self, handler: Any, body: Any, fault: Fault) -> None:
        _answer(handler, 200, {"success": True})

    def _generate(self, handler: Any, body: Any, fault: Fault) -> None:
        tokens = body["input_ids"]
        rows = self._rows(tokens, body["top_logprobs_num"], fault)
        after = zip(rows, tokens[1:], strict=False)
        chosen = [[None, tokens[0], None], *([row[t], t, None] for row, t in after)]
        best = [None, *([[p, i, None] for i, p in row.items()] for row in rows[:-1])]
        meta = {"input_token_logprobs": chosen, "input_top_logprobs": best}
        last = sorted(rows[-1].items(), key=lambda x: -x[1])
        meta["output_token_logprobs"] = [[last[0][1], last[0][0], None]]
        meta["output_top_logprobs"] = [[[p, i, None] for i, p in last]]
        _answer(handler, 200, {"text": "", "meta_info": meta})


class _Listener(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 128

    def handle_error(self, *args: Any) -> None:
        """A client that went away is what some tests are about."""


def _answer(handler: Any, status: int, content: Any, headers: dict[str, str] = {}) -> None:  # noqa: B006
    data = json.dumps(content).encode()
    handler.send_response(status)
    for name, value in {**headers, "Content-Length": str(len(data))}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(data)
