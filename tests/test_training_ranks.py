"""``torchrun``: two processes train the student that one does, and stop and go on together."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bgkernels.training.log import Log
from tests.test_training_parts import write_notes
from tests.training_ranks_run import METHODS, student

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where two processes have trained and saved."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "corpus").mkdir()
    write_notes(folder / "corpus")
    command = "-m torch.distributed.run --standalone --nproc-per-node 2 -m tests.training_ranks_run"
    done = subprocess.run(
        [sys.executable, *command.split(), folder],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_are_one_with_twice_the_batches(folder, found, method):
    weights, losses, _ = found[0][method][1]
    expected, alone, _ = student(folder, method, accumulate=4, stopped=False)
    assert losses == pytest.approx(alone, rel=1e-4)
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("method", METHODS)
def test_processes_agree(found, method):
    (one, first, _), (two, second, _) = (rank[method][1] for rank in found)
    assert first == second
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("method", METHODS)
def test_a_signal_to_one_stops_both(folder, found, method):
    for rank in found:
        weights, _, message = rank[method][0]
        assert weights is None and "stopped by SIGTERM" in message and "at step 3" in message
    records = Log(folder / f"2 {method}" / f"student-{method}" / "log.jsonl").read()
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5]
