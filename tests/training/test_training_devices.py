"""Where training computes: which device, by which collectives, and what is said of its memory.

There need not be a GPU: torch is asked through patches, and models are moved where they can be.
"""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
from torch import distributed as dist
from typer.testing import CliRunner

from bgkernels.training import log, models, ranks, sharding
from bgkernels.training.cli import app
from bgkernels.training.config import DemoConfig, ModelShape
from bgkernels.training.errors import OptionError, OutOfMemory, enough_memory
from bgkernels.training.evaluate import score
from bgkernels.training.generation import continue_text
from bgkernels.training.loop import Progress
from bgkernels.training.progress import _figures
from bgkernels.training.tokens import Batch

CPU = torch.device("cpu")


@pytest.fixture
def gpus(monkeypatch):
    """``gpus(count, rank)``: a machine with so many, and a process of that number."""

    def pretend(count, rank=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        if rank is not None:
            monkeypatch.setenv("LOCAL_RANK", str(rank))

    return pretend


@pytest.mark.parametrize(
    "name, count, rank, expected",
    [
        ("auto", 0, None, "cpu"),
        ("auto", 0, 1, "cpu"),
        ("auto", 2, None, "cuda:0"),
        ("auto", 2, 1, "cuda:1"),
        ("cuda", 4, 3, "cuda:3"),
        ("cpu", 2, 1, "cpu"),
    ],
)
def test_each_process_has_its_device(gpus, name, count, rank, expected):
    gpus(count, rank)
    assert str(ranks.device(name)) == expected


@pytest.mark.parametrize("name, count, rank", [("cuda", 0, None), ("cuda", 2, 2), ("auto", 1, 1)])
def test_a_missing_gpu_is_an_error(gpus, name, count, rank):
    gpus(count, rank)
    with pytest.raises(OptionError, match=rf"--device {name} needs a GPU.* sees {count} .*fewer"):
        ranks.device(name)


@pytest.mark.parametrize(
    "place, backend", [("cpu", "gloo"), ("cuda:1", "cpu:gloo,cuda:nccl")], ids=["cpu", "cuda"]
)
def test_processes_talk_by_what_their_device_has(monkeypatch, place, backend):
    joined, chosen, left = Mock(), Mock(), Mock()
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(dist, "init_process_group", joined)
    monkeypatch.setattr(dist, "destroy_process_group", left)
    monkeypatch.setattr(torch.cuda, "set_device", chosen)
    with ranks.joined(torch.device(place)):
        joined.assert_called_once_with(backend)
        assert chosen.called == (place != "cpu") and not left.called
    left.assert_called_once_with()


def test_without_torchrun_nothing_is_joined(monkeypatch):
    monkeypatch.setattr(dist, "init_process_group", Mock(side_effect=AssertionError))
    with ranks.joined(CPU):
        assert not ranks.together()


def test_sharding_needs_torchrun():
    model = models.small_llama(ModelShape(16, 1, 1), 32, 8, 0)
    with pytest.raises(OptionError, match=r"--parallel fsdp splits .*torchrun --nproc-per-node"):
        sharding.place(model, DemoConfig(parallel="fsdp", device="cpu"))


def test_memory_is_that_of_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", {torch.device("cuda", 1): 7}.get)
    assert log.peak_memory(torch.device("cuda", 1)) == 7
    assert log.peak_memory(CPU) > 10**7
    assert "1.5 GiB" in _figures(Progress(1, 2.0, 3.0, {}, 3 * 2**29))


@pytest.mark.parametrize(
    "error, expected",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (torch.OutOfMemoryError("no word of it"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_out_of_memory_says_what_to_lower(error, expected):
    advice = r"run: out of memory at step 3\. Lower --memory-budget .*--batch-size .*--parallel"
    with (
        pytest.raises(OutOfMemory, match=advice) if expected else pytest.raises(RuntimeError),
        enough_memory("run", 3),
    ):
        raise error


def test_a_batch_goes_to_a_gpu_from_pinned_memory(monkeypatch):
    moved = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x + 100)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, **how: moved.append(how) or x)
    batch = Batch.of(torch.arange(6).view(1, 6)).to(torch.device("cuda", 0))
    assert batch.tokens[0, 0] == 100 and batch.labels[0, 0] == 101
    assert moved == [{"device": torch.device("cuda", 0), "non_blocking": True}] * 2


def test_nothing_is_made_on_the_wrong_device():
    """Another default device shows tensors that are made where nobody said so."""
    model = models.small_llama(ModelShape(16, 1, 1), 32, 12, 0)
    text = torch.arange(24).view(2, 12)
    with torch.device("meta"):
        said = continue_text(model, text[:, :4], 8, 32, seed=0)
        found = score(model, model, Batch.of(said).after(4))
    for x in (said, found.nll, found.kl, found.teacher_nll, found.ambiguity, found.valid):
        assert x.device == CPU


def test_commands_offer_the_choice():
    runner = CliRunner(env={"COLUMNS": "120", "TERM": "dumb"})
    for command in ("demo", "distill", "compare", "train", "prune", "analyze"):
        shown = runner.invoke(app, [command, "--help"]).output
        assert "--device" in shown and "auto|cpu|cuda" in shown, command
    for command in ("distill", "compare", "train"):
        assert "ddp|fsdp" in runner.invoke(app, [command, "--help"]).output, command
