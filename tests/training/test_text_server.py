"""Text from a server of the teacher or the student: what the model would have written here."""

from __future__ import annotations

import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("urllib3", reason="needs the extra `served`: urllib3")

from bgkernels.labels.errors import ServerError
from bgkernels.labels.served.client import Client
from bgkernels.labels.served.completions import Completions
from bgkernels.training import DemoConfig, ModelShape, models, run_demo
from bgkernels.training.cli import app
from bgkernels.training.generation import ROWS, generate
from bgkernels.training.log import Log
from bgkernels.training.text_server import TextServer
from bgkernels.training.tokens import Batch, train_tokenizer
from bgkernels.training.writing import WrittenBatches
from tests.stand_in import StandIn

ROOT = Path(__file__).resolve().parents[2]
SURE = 1e5
"""Gain of the last norm with which a model says its favourites, by whatever random numbers."""


@pytest.fixture(scope="module")
def words(corpus):
    return train_tokenizer([path.read_text() for path in sorted(corpus.iterdir())], 300)


@pytest.fixture(scope="module")
def folders(words, tmp_path_factory):
    """Of a teacher and a student that are sure."""
    found = {}
    for role, seed in (("teacher", 3), ("student", 4)):
        model = models.small_llama(ModelShape(32, 1, 1), len(words), length=64, seed=seed)
        model.network.model.norm.weight.data.fill_(SURE)
        found[role] = tmp_path_factory.mktemp("models") / role
        models.export(model, words, found[role])
    return found


@pytest.fixture
def server(words, folders, request):
    """Of the model whose role is asked for."""
    model, _ = models.load_pretrained(str(folders[request.param]), "--model", 64)
    model.freeze()
    with StandIn(model.network, str(folders[request.param]), words, True, develops=True) as found:
        yield found


def configured(corpus, folders, output, method, **changes):
    base = replace(DemoConfig.quick(), methods=(method,), output=output)
    training = replace(base.student_training, steps=6, accumulate=2, learning_rate=1e-5)
    data = replace(base.data, corpus=corpus, sequence_length=16)
    names = {role: str(folder) for role, folder in folders.items()}
    return replace(base, data=data, student_training=training, **names, **changes)


@pytest.mark.parametrize(
    ("method", "server"), [("sequence", "teacher"), ("gkd", "student")], indirect=["server"]
)
def test_a_run_learns_what_it_learns_from_text_of_its_own(
    method, server, corpus, folders, tmp_path
):
    served = configured(corpus, folders, tmp_path / "served", method, generate_with=server.url)
    here = configured(corpus, folders, tmp_path / "here", method)
    one, other = (run_demo(config).students[method].history for config in (served, here))
    assert one.losses == pytest.approx(other.losses, rel=1e-3)
    assert server.reloads == (3 if method == "gkd" else 0)
    resumed = run_demo(served).students[method].history
    assert resumed.losses == one.losses


@pytest.mark.slow
@pytest.mark.parametrize("server", ["student"], indirect=True)
def test_two_processes_give_their_weights_as_one(server, corpus, folders, tmp_path):
    """Of a student whose parameters are shared out among them."""
    alone = run_demo(configured(corpus, folders, tmp_path / "one", "gkd"))
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2 -m bgkernels.training"
    command = f"{launch} distill --method gkd --parallel fsdp --steps 6 --sequence-length 16"
    options = ["--learning-rate", "1e-5", "--output", str(tmp_path), "--corpus", str(corpus)]
    options += ["--generate-with", server.url]
    for role, folder in folders.items():
        options += [f"--{role}", str(folder)]
    done = subprocess.run(
        [sys.executable, *command.split(), *options],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    losses = [line["loss"] for line in Log(tmp_path / "student-gkd" / "log.jsonl").read()]
    assert losses == pytest.approx(alone.students["gkd"].history.losses, rel=1e-3)
    assert server.reloads == 3


@pytest.mark.parametrize("server", ["student"], indirect=True)
def test_the_server_has_the_weights_of_the_step(server, folders, tmp_path):
    student, _ = models.load_pretrained(str(folders["student"]), "--student", 64)
    text = TextServer(Completions(Client(server.url), "teacher"), "student", tmp_path)
    prompts = torch.arange(12).view(4, 3)
    for step in range(3):
        student.network.model.norm.weight.data.mul_(-1).add_(step)
        text.update(student)
        said = text(student, prompts, 9, student.vocab, seed=step)
        expected = generate(student, prompts, 9, student.vocab, 0, temperature=0.0)
        assert torch.equal(said, expected)


@pytest.mark.parametrize("server", ["teacher"], indirect=True)
def test_rows_stops_and_lengths(server, folders, tmp_path):
    model, _ = models.load_pretrained(str(folders["teacher"]), "--teacher", 64)
    model.freeze()
    text = TextServer(Completions(Client(server.url), "teacher"), "teacher", tmp_path)
    prompts, lengths = torch.arange(60).view(12, 5), torch.arange(12) % 5 + 1
    free = generate(model, prompts, 9, model.vocab, 0, lengths=lengths, temperature=0.0)
    stop = int(free.flatten().mode().values)
    for end in (None, stop):
        options = {"lengths": lengths, "temperature": 0.0, "stop": end}
        expected = generate(model, prompts, 9, model.vocab, 0, **options)
        assert torch.equal(text(model, prompts, 9, model.vocab, 0, **options), expected)


def test_a_part_of_the_vocabulary(words, tmp_path):
    """Samples have the frequencies of the leading columns, although the server has more."""
    rows, vocab = 600, 12
    model = models.small_llama(ModelShape(32, 1, 1), 24, length=64, seed=3)
    model.freeze()
    prompts = torch.tensor([[3, 1, 2]])
    with StandIn(model.network, generates=True) as server:
        text = TextServer(Completions(Client(server.url), "teacher"), "teacher", tmp_path)
        said = text(model, prompts.expand(rows, -1), 1, vocab, seed=0)[:, 0]
        expected = model.network(prompts).logits[0, -1, :vocab].softmax(-1) * rows
        found = said.bincount(minlength=vocab)
        assert ((found - expected) ** 2 / expected).sum() < vocab + 5 * (2 * vocab) ** 0.5
        assert len(server.asked) > rows
        with pytest.raises(ServerError, match="too often says tokens from number 0 on"):
            text(model, prompts, 1, 0, seed=0)


def test_the_next_group_is_written_while_one_is_learnt_from():
    begun, groups = threading.Semaphore(0), []

    def write(batches, numbers):
        groups.append(list(numbers))
        begun.release()
        return list(batches)

    class Corpus:
        def __getitem__(self, number):
            return Batch.of(torch.full((4, 5), number))

    size = ROWS // 4
    batches = WrittenBatches(Corpus(), write, ahead=2 * size + 1)
    for number in range(2 * size + 1):
        assert batches[number].tokens[0, 0] == number
        if number % size == 0 and number < 2 * size:
            assert begun.acquire(timeout=30) and begun.acquire(timeout=30)
            begun.release()
    assert [group[0] for group in groups] == [0, size, 2 * size]


@pytest.mark.parametrize(
    ("server", "arguments", "message"),
    [
        ("teacher", ["--method", "gkd"], "serves the teacher, whose text no method of this run"),
        ("student", ["--method", "sequence"], "choose one that does: on-policy, gkd, minillm"),
        ("student", ["--method", "gkd", "--lora", "2"], "leave one of them out"),
    ],
    indirect=["server"],
)
def test_refusals(server, arguments, message, corpus, folders, tmp_path):
    refused(server, arguments, message, corpus, folders, tmp_path)


@pytest.mark.parametrize("server", ["student"], indirect=True)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"develops": False}, "start it with VLLM_SERVER_DEV_MODE=1"),
        ({"limit": 12}, "takes at most 12 tokens of a text; lower the length, now 16"),
        ({"owner": "sglang"}, "serves SGLang; start it as: vllm serve MODEL"),
    ],
)
def test_servers_that_lack_something(server, changes, message, corpus, folders, tmp_path):
    for name, value in changes.items():
        setattr(server, name, value)
    refused(server, ["--method", "gkd", "--steps", "2"], message, corpus, folders, tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("teacher", "nats a token away from those of the teacher, so it serves another model"),
        ("other", "and http://127.0.0.1:{port} serves {root}; start it as: vllm serve MODEL"),
    ],
)
def test_another_model(name, message, words, corpus, folders, tmp_path):
    model = models.small_llama(ModelShape(32, 1, 1), len(words), length=64, seed=9)
    model.freeze()
    root = str(folders["teacher"]) if name == "teacher" else "some/other"
    with StandIn(model.network, root, words, generates=True) as server:
        message = message.format(port=server.port, root=root)
        refused(server, ["--method", "sequence"], message, corpus, folders, tmp_path)


def refused(server, arguments, message, corpus, folders, tmp_path):
    command = ["distill", "--corpus", str(corpus), "--output", str(tmp_path), *arguments]
    command += ["--generate-with", server.url, "--sequence-length", "16"]
    for role, folder in folders.items():
        command += [f"--{role}", str(folder)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1 and message in " ".join(result.output.split()), result.output
