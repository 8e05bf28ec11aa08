"""The CUDA kernels, emulated, under sanitizers: no race in a block, no access beyond a row.

That the race detector sees anything is shown by leaving out barriers, one after the other. Races
between blocks, through global memory, are not modelled.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cuda_emulation import sanitized

pytestmark = pytest.mark.slow
STEPS = "steps 48"


def ran(program: Path, *left_out: str, **options: str) -> subprocess.CompletedProcess[str]:
    """A run; ThreadSanitizer wants addresses that do not change."""
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    command = [*fixed, str(program), *left_out]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | options)


def watched(warps: int, *left_out: str) -> subprocess.CompletedProcess[str]:
    done = ran(sanitized("thread", warps), *left_out, TSAN_OPTIONS="halt_on_error=1 history_size=2")
    if "unexpected memory mapping" in done.stderr:
        pytest.skip(
            "ThreadSanitizer cannot run here: addresses change, and setarch may not fix them"
        )
    return done


def test_no_race_and_each_barrier_that_is_left_out_is_seen() -> None:
    """With two warps a block; and with eight, where several of their states are merged at once."""
    sites: set[tuple[str, str]] = set()
    seen: set[tuple[str, str]] = set()
    for warps in (2, 8):
        done = watched(warps)
        assert done.returncode == 0 and STEPS in done.stdout, done.stderr[:4000]
        sites |= set(re.findall(r"^(\S+\.cuh?) (\d+)$", done.stdout, re.M))
        for site in sorted(sites - seen):
            if "data race" in watched(warps, *site).stderr:
                seen.add(site)
    assert len(sites) >= 4 and seen == sites


def test_no_access_beyond_a_row() -> None:
    done = ran(sanitized("address"))
    assert done.returncode == 0 and STEPS in done.stdout, done.stderr[:4000]
