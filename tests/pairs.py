"""Two processes that run a module of the tests together."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


def saved_by_two(module: str, folder: Path, **environment: str) -> dict[str, Any]:
    """What process 0 of two saved as ``found.pt`` in a folder, which the module is given."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        **environment,
    }
    command = [sys.executable, "-m", module, str(folder)]
    processes = [
        subprocess.Popen(
            command, cwd=ROOT, env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    output = [p.communicate(timeout=300)[0] for p in processes]
    assert not any(p.returncode for p in processes), "\n".join(output)
    result: dict[str, Any] = torch.load(folder / "found.pt")
    return result
