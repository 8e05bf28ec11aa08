"""The machine code of the CUDA kernels: no spills, few registers, logits asked for early.

As it was when ``benchmarks.ptxas`` last ran; and, where ``nvcc`` is, as it is now: compiled once
for each state of the sources, which takes half a minute.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks import ptxas

KERNELS = {"absorb", "merge", "pairs", "add", "finalize", "fold", "vjp", "scale"}


def check(rows: list[dict[str, Any]]) -> None:
    assert {r["kernel"].partition("<")[0] for r in rows} == {f"{name}_kernel" for name in KERNELS}
    assert ptxas.faults(rows) == []


@pytest.mark.parametrize("architecture", ptxas.ARCHITECTURES)
def test_what_was_found(architecture: str) -> None:
    check(json.loads((ptxas.RESULTS / f"{architecture}.json").read_text())["kernels"])


def present(architecture: str) -> list[dict[str, Any]]:
    """Of the sources as they are, from a file of an earlier test if they have not changed."""
    source = ptxas.ROOT / "csrc"
    texts = sorted(p for p in source.rglob("*") if p.suffix in (".cu", ".cuh", ".h"))
    state = hashlib.sha256(b"".join(p.read_bytes() for p in texts)).hexdigest()[:16]
    path: Path = ptxas.ROOT / "build" / "ptxas" / f"{state}-{architecture}.json"
    if not path.exists():
        files = sorted((source / "cuda").glob("*.cu"))
        rows = [row for file in files for row in ptxas.compiled(file, architecture)]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows))
    rows: list[dict[str, Any]] = json.loads(path.read_text())
    return rows


@pytest.mark.slow
def test_what_is_there_now() -> None:
    pytest.importorskip("triton")
    if shutil.which("nvcc") is None or not ptxas.tool().exists():
        pytest.skip("needs nvcc, and the cuobjdump of Triton's package")
    check(present("sm_90a"))


def test_faults_are_seen() -> None:
    good = {"kernel": "vjp_kernel<Half>", "spilled": 0, "registers": 128, "before logits": 149,
            "generic loads": 0}  # fmt: skip
    assert ptxas.faults([good]) == []
    bad = {"spilled": 8, "registers": 129, "before logits": 150, "generic loads": 1}
    for name, value in bad.items():
        assert len(ptxas.faults([good | {name: value}])) == 1
    assert ptxas.faults([good | {"before logits": 0}])  # none was found
    assert not ptxas.faults([good | {"kernel": "fold_kernel", "before logits": 0}])
