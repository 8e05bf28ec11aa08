"""``torchrun``: two processes train the student that one does, and stop and go on together."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bgkernels.training.log import Log
from bgkernels.training.models import load_pretrained
from tests.training.notes import write_notes
from tests.training_ranks_run import CASES, demo, student

each_case = pytest.mark.parametrize("case", CASES, ids=" ".join)
ROOT = Path(__file__).resolve().parents[2]


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


def checkpoints(folder, case):
    """Where a run of a case keeps its state."""
    return folder / " ".join(case) / f"student-{case[0]}"


def one_process(folder, case):
    """What one process makes of the same batches."""
    return student(folder, case, accumulate=4)


def assert_close(weights, expected):
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=2e-5, msg=name)


@each_case
def test_two_processes_are_one_with_twice_the_batches(folder, found, case):
    weights, losses, _ = found[0][case]["straight"]
    expected, alone, _ = one_process(folder / "alone", case)
    assert losses == pytest.approx(alone, rel=1e-4)
    assert_close(weights, expected)


@each_case
def test_processes_agree(found, case):
    (one, first, _), (two, second, _) = (rank[case]["resumed"] for rank in found)
    assert first == second
    assert all(torch.equal(one[name], two[name]) for name in one)


@each_case
def test_a_signal_to_one_stops_both(folder, found, case):
    for rank in found:
        weights, _, message = rank[case]["stopped"]
        assert weights is None and "stopped by SIGTERM" in message and "at step 3" in message
    records = Log(checkpoints(folder / "stopped", case) / "log.jsonl").read()
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5]


@each_case
def test_interrupted_and_resumed_is_bit_identical(found, case):
    (straight, losses, _), (resumed, again, _) = (
        found[0][case][run] for run in ("straight", "resumed")
    )
    assert losses == again
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


@each_case
def test_one_process_goes_on_from_two(folder, found, case, tmp_path):
    """From their checkpoint after step 3; its weights are those of two processes all the way."""
    shutil.copytree(checkpoints(folder / "stopped", case), checkpoints(tmp_path / "run", case))
    (checkpoints(tmp_path / "run", case) / "step-00000005.pt").unlink()
    (tmp_path / "corpus").symlink_to(folder / "corpus")
    weights, losses, _ = one_process(tmp_path / "run", case)
    assert losses == pytest.approx(found[0][case]["straight"][1], rel=1e-4)
    assert_close(weights, found[0][case]["straight"][0])


def test_a_sharded_demo_measures_and_saves_what_one_process_does(folder, found):
    (folder / "one").mkdir()
    expected = demo(folder / "one")
    assert found[0]["demo"] == found[1]["demo"]
    for measure in ("cross_entropy", "kl"):  # of files; samples of models that differ would differ
        part = found[0]["demo"][measure]["all"]
        assert part["mean"] == pytest.approx(expected[measure]["all"]["mean"], rel=1e-4)
    for name in ("teacher", "entropy"):
        one, two = (
            load_pretrained(f"{folder}/{run}/models/{name}", name, 16)[0].network.state_dict()
            for run in ("one", "two")
        )
        assert_close(two, one)


def test_bfloat16_is_what_is_gathered_alone(found):
    assert found[0]["bf16"] == found[1]["bf16"] == {
        "gathered": ["torch.bfloat16", "Tensor"],
        "kept": ["torch.float32", "DTensor"],
        "gradient": ["torch.float32", "DTensor"],
    }  # fmt: skip
