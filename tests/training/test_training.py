"""The reference training: it learns, it resumes bit for bit, and it loses nothing when it fails."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from bgkernels.training import distill, models
from bgkernels.training.cli import app
from bgkernels.training.config import DataConfig, DemoConfig
from bgkernels.training.corpus import load_corpus
from bgkernels.training.demo import run_demo
from bgkernels.training.errors import (
    CheckpointError,
    Interrupted,
    MissingExtra,
    NonFiniteLoss,
    OptionError,
    OutOfMemory,
    TrainingError,
    extra,
)
from bgkernels.training.files import write_atomically
from bgkernels.training.materials import prepare
from bgkernels.training.progress import Silent
from tests.training.signals import Signals


@pytest.fixture(scope="module")
def setup(corpus):
    """Configuration, materials and a trained teacher, shared by the tests of the loop."""
    config = replace(
        DemoConfig.quick(),
        data=DataConfig(corpus, vocab=300, sequence_length=16, batch_size=4, held_out=0.1),
        output=corpus.parent / "shared",
    )
    materials = prepare(config, load_corpus(config.data))
    teacher, _ = distill.train_teacher(config, materials, Silent())
    return config, materials, teacher


@pytest.fixture
def distilled(setup, tmp_path):
    """``distilled(**changes)`` trains one student in a folder of this test's own."""
    config, materials, teacher = setup

    def run(method="entropy", display=None, output=tmp_path / "run", **changes):
        changed = replace(config, output=output, **changes)
        return distill.train_student(changed, materials, method, teacher, display or Silent())

    return run


@pytest.fixture
def folder(tmp_path):
    """Where ``distilled`` keeps its checkpoints."""
    return tmp_path / "run" / "student-entropy"


def weights(model):
    return model.network.state_dict()


def assert_same_weights(one, two):
    assert all(
        torch.equal(a, b) for a, b in zip(weights(one).values(), weights(two).values(), strict=True)
    )


def interrupt(distilled, step=12, signum=signal.SIGTERM):
    """Stop a run; it has checkpoints at 10 and at ``step + 1``."""
    with pytest.raises(Interrupted) as stopped:
        distilled(display=Signals(step, signum))
    return stopped.value


# ---- learning


@pytest.mark.parametrize("method", ["hard", "soft", "entropy"])
def test_loss_falls_and_measures_follow(distilled, method):
    _, history = distilled(method)
    assert sum(history.losses[-4:]) < 0.9 * sum(history.losses[:4])
    assert [p["step"] for p in history.curve] == [5, 10, 15, 20]
    assert history.curve[-1]["cross_entropy"] < history.curve[0]["cross_entropy"]
    assert history.curve[-1]["kl"] < history.curve[0]["kl"]


def test_same_seed_same_numbers(distilled, tmp_path):
    (one, first), (two, second) = distilled(), distilled(output=tmp_path / "again")
    assert first.losses == second.losses
    assert_same_weights(one, two)


def test_students_start_alike_and_the_teacher_stays(distilled, setup):
    _, materials, teacher = setup
    before = materials.student.digest, teacher.digest
    student, _ = distilled()
    assert (materials.student.digest, teacher.digest) == before
    assert student.digest != before[0]


def test_teacher_is_found_again(setup, monkeypatch):
    config, materials, teacher = setup
    monkeypatch.setattr(distill.Objective, "__call__", lambda *_: pytest.fail("trained again"))
    again, history = distill.train_teacher(config, materials, Silent())
    assert len(history.losses) == config.teacher_training.steps
    assert_same_weights(again, teacher)


# ---- stopping and going on


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_and_resumed_is_bit_identical(distilled, folder, tmp_path, signum):
    straight, full = distilled(output=tmp_path / "straight")
    stopped = interrupt(distilled, signum=signum)
    assert stopped.signum == signum
    assert "step 13" in str(stopped) and str(folder / "step-00000013.pt") in str(stopped)
    assert signal.getsignal(signum) is not None, "the handler from before is back"
    resumed, history = distilled()
    assert history.losses == full.losses and history.curve == full.curve
    assert_same_weights(resumed, straight)
    ends = [
        torch.load(p / "step-00000020.pt") for p in (folder, tmp_path / "straight" / folder.name)
    ]
    one, two = (end["state"]["optimizer"]["state"] for end in ends)
    assert all(torch.equal(one[i][k], two[i][k]) for i in one for k in one[i])


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def replace_by_another_file(path):
    torch.save({"weights": torch.zeros(3)}, path)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty, replace_by_another_file])
def test_corrupt_checkpoint_is_named_and_passed_over(distilled, folder, tmp_path, caplog, damage):
    straight, _ = distilled(output=tmp_path / "straight")
    interrupt(distilled)
    damage(folder / "step-00000013.pt")
    with caplog.at_level(logging.WARNING):
        resumed, _ = distilled()
    assert "step-00000013.pt is corrupt" in caplog.text
    assert_same_weights(resumed, straight)


def test_only_corrupt_checkpoints_is_an_error(distilled, folder):
    interrupt(distilled)
    for path in folder.glob("*.pt"):
        truncate(path)
    with pytest.raises(CheckpointError, match=r"step-00000013\.pt is corrupt and no earlier"):
        distilled()


def test_checkpoint_of_another_configuration_is_refused(distilled, setup):
    distilled()
    other = replace(setup[0].student_training, steps=30)
    with pytest.raises(CheckpointError, match="another configuration: steps is 20 there and 30"):
        distilled(student_training=other)
    _, history = distilled(student_training=other, fresh=True)
    assert len(history.losses) == 30


def test_full_disk_keeps_the_old_checkpoint(distilled, folder, tmp_path, monkeypatch):
    straight, _ = distilled(output=tmp_path / "straight")
    fsync = os.fsync

    def full(handle):
        if (folder / "step-00000010.pt").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match="No space left on device") as failed:
            distilled()
    assert "step-00000010.pt is intact" in str(failed.value)
    assert {path.name for path in folder.iterdir()} == {"step-00000010.pt", "log.jsonl"}
    resumed, _ = distilled()
    assert_same_weights(resumed, straight)


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def broken(file):
        file.write(b"half of the n")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(TrainingError, match=r"could not write .*No space left"):
        write_atomically(path, broken)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_nan_loss_stops_before_the_update(distilled, folder, monkeypatch):
    call, losses = distill.Objective.__call__, []

    def poisoned(self, *arguments):
        loss = call(self, *arguments)
        losses.append(loss)
        return loss * float("nan") if len(losses) == 13 else loss

    monkeypatch.setattr(distill.Objective, "__call__", poisoned)
    with pytest.raises(NonFiniteLoss, match=r"nan .* at step 13; .*step-00000010\.pt"):
        distilled()
    saved = torch.load(folder / "step-00000010.pt")["state"]["model"]
    assert all(torch.isfinite(x).all() for x in saved.values())


def test_out_of_memory_says_what_to_lower(distilled, folder, monkeypatch):
    """Torch's own message for a failed allocation, on a CPU; other errors stay as they are."""
    real = distill.Objective.__call__

    def hungry(self, *arguments):
        return real(self, *arguments) + torch.empty(2**62, dtype=torch.uint8).sum()

    with monkeypatch.context() as patch:
        patch.setattr(distill.Objective, "__call__", hungry)
        with pytest.raises(OutOfMemory, match=r"out of memory at step 1\. Lower --memory-budget"):
            distilled()
    monkeypatch.setattr(distill.Objective, "__call__", lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        distilled()


# ---- the command line


def invoke(*arguments):
    return CliRunner(env={"COLUMNS": "100", "TERM": "dumb"}).invoke(
        app, ["demo", *map(str, arguments)]
    )


def test_help_teaches():
    result = invoke("--help")
    assert result.exit_code == 0
    options = "output corpus teacher student steps teacher-steps batch-size sequence-length seed"
    for (
        name
    ) in f"{options} divergence temperature memory-budget learning-rate resume fresh quick".split():
        assert f"--{name}" in result.output
    assert "bridges" in result.output and "Examples" in result.output


def test_quick_demo_end_to_end(corpus, tmp_path):
    output = tmp_path / "demo"
    arguments = ("--quick", "--corpus", corpus, "--output", output, "--steps", 12)
    result = invoke(*arguments, "--temperature", 2, "--memory-budget", 64, "--sequence-length", 16)
    assert result.exit_code == 0, result.output
    assert "KL(teacher‖student)" in result.output and "entropy-routed" in result.output
    found = json.loads((output / "results.json").read_text())
    assert found["config"]["loss"]["memory_budget"] == 64 * 2**20
    assert set(found["students"]) == {"hard", "soft", "entropy"}
    for student in found["students"].values():
        assert len(student["history"]["losses"]) == 12
        assert student["measures"]["exposure_bias"]["all"]["mean"] is not None
    assert (output / "results.png").read_bytes().startswith(b"\x89PNG")
    page = (output / "report.html").read_text()
    assert "entropy-routed" in page and str(output / "report.html") in result.output
    assert all(
        set(x["voices"]) == {"teacher", "hard", "soft", "entropy"} for x in found["passages"]
    )
    loaded, _ = models.load_pretrained(str(output / "models" / "entropy"), "--student", 16)
    assert loaded.parameters == found["students"]["entropy"]["parameters"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--corpus", "/nowhere"), "--corpus must be a folder"),
        (("--divergence", "forward"), "divergence"),
        (("--temperature", "0"), "temperature"),
    ],
)
def test_errors_are_one_message(tmp_path, arguments, message):
    result = invoke("--quick", "--output", tmp_path, *arguments)
    assert result.exit_code == 1 and "error:" in result.output and message in result.output
    assert "Traceback" not in result.output


def test_wrong_loss_option_is_found_before_training(setup, tmp_path):
    config = replace(setup[0], output=tmp_path, loss=replace(setup[0].loss, divergence="no such"))
    with pytest.raises(OptionError, match="divergence"):
        run_demo(config)
    assert not list(tmp_path.iterdir())


def test_missing_extra_says_what_to_install():
    with pytest.raises(MissingExtra, match=r"pip install 'bgkernels\[training\]'"), extra():
        import a_package_that_does_not_exist  # noqa: F401
