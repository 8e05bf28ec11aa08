"""Instruction sets of the compiled backend: chosen by name, and kept apart by the linker."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

_C = pytest.importorskip("bgkernels.backends.native._C")


def test_targets_by_name(target: str) -> None:
    assert _C.cpu_target() == target
    with pytest.raises(ValueError, match=r"must be one of .*baseline.*, got 'abacus'"):
        _C.set_cpu_target("abacus")
    assert _C.cpu_target() == target
    code = "from bgkernels.backends.native import _C; print(_C.cpu_target())"
    env = os.environ | {"BGKERNELS_CPU_TARGET": target}
    shown = subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True)
    assert shown.stdout.decode().split() == [target]


def test_an_unknown_forced_target_is_a_reason() -> None:
    code = """if True:
        import torch
        from bgkernels.backends.native import NativeBackend
        print(NativeBackend().supports(torch.device("cpu"), (torch.float32,)))"""
    env = os.environ | {"BGKERNELS_CPU_TARGET": "abacus"}
    shown = subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True)
    assert "BGKERNELS_CPU_TARGET" in shown.stdout.decode()


def test_no_target_shares_a_weak_symbol() -> None:
    """The linker keeps one copy of each: it could carry AVX-512 into the baseline."""
    nm = shutil.which("nm")
    if nm is None or sys.platform != "linux":
        pytest.skip("needs nm")
    listing = subprocess.run([nm, "-C", _C.__file__], check=True, capture_output=True)
    weak = [x for x in listing.stdout.decode().splitlines() if re.search(r" [WVu] bgk::", x)]
    targets = ("baseline", "avx2", "avx512", "cuda")
    assert [x for x in weak if not any(f"bgk::{t}::" in x for t in targets)] == []
