"""Labels from a server are those of the teacher loaded, whatever goes wrong meanwhile."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("urllib3", reason="needs the extra `served`: urllib3")

from bgkernels.labels import CaptureConfig, LabelDataset, LabelError, generate
from bgkernels.labels.errors import ServerError
from bgkernels.labels.served.api import LogProbabilities
from bgkernels.labels.served.client import Client
from bgkernels.labels.served.source import ServedLogProbabilities
from bgkernels.training.cli import app
from tests import models
from tests.labels.documents import CONFIG, DOCUMENTS, VOCAB, Tokenizer, make_teacher
from tests.labels.served import same, states
from tests.stand_in import StandIn, checkpoint

PATIENCE = {"backoff": 0.01, "timeout": 2.0}


@pytest.fixture(scope="module")
def teacher():
    return make_teacher()


def test_a_thousand_documents(teacher, tmp_path):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 9, (1000,), generator=generator).tolist()
    texts = [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in lengths]
    config = CaptureConfig(k=7, batch_size=16, documents_per_shard=300)
    counted = []
    with StandIn(teacher.network) as server:
        source = states(Client(server.url), teacher)
        assert generate(
            source, texts, tmp_path / "s", config, on_batch=lambda *x: counted.append(x)
        )
        assert sum(server.texts.values()) == sum(map(bool, lengths))
    assert generate(teacher, texts, tmp_path / "l", config)
    same(tmp_path / "s", tmp_path / "l")
    assert [sum(x) for x in zip(*counted, strict=True)] == [1000, sum(lengths)]
    served, loaded = (LabelDataset(tmp_path / name).info for name in "sl")
    assert (served.gamma, served.seed, served.k) == (loaded.gamma, loaded.seed, loaded.k)


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


@pytest.fixture(scope="module")
def whole(teacher, tmp_path_factory):
    """Labels from a server that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    with StandIn(teacher.network) as server:
        generate(states(Client(server.url), teacher), DOCUMENTS, folder, CONFIG)
    return content(folder)


@pytest.mark.parametrize("fault", ["cut", "busy", "broken"])
def test_faults_change_nothing(fault, teacher, whole, tmp_path):
    with StandIn(teacher.network, fault=lambda n: fault if n % 2 else "") as server:
        client = Client(server.url, in_flight=3, **PATIENCE)
        assert generate(states(client, teacher), DOCUMENTS, tmp_path, CONFIG)
    assert content(tmp_path) == whole


def test_what_was_fetched_is_kept(teacher, whole, tmp_path):
    with StandIn(teacher.network, fault=lambda n: "short" if n == 8 else "") as server:
        client = Client(server.url, in_flight=1)
        with pytest.raises(ServerError, match="answered 8 tokens with 7 states"):
            generate(states(client, teacher), DOCUMENTS, tmp_path, CONFIG)
        kept = content(tmp_path)
        assert kept.items() <= whole.items() and len(kept) == 4
        server.texts.clear()
        assert generate(states(client, teacher), DOCUMENTS, tmp_path, CONFIG)
        assert sum(server.texts.values()) == 2  # of the last shard
    assert content(tmp_path) == whole


KILLS = """
import os, random, signal
import safetensors.torch, urllib3
import bgkernels as bg
from bgkernels.labels import generate
from bgkernels.labels.served.client import Client
from tests.labels.documents import CONFIG, DOCUMENTS, make_teacher
from tests.labels.served import same, states

teacher = make_teacher()  # too small for threads, so that a fork is safe

def run(folder, moment):
    left = [moment]
    def deadly(owner, name):
        original = getattr(owner, name)
        def wrapper(*args, **kwargs):
            left[0] -= 1
            os.kill(os.getpid(), signal.SIGKILL) if not left[0] else None
            return original(*args, **kwargs)
        setattr(owner, name, wrapper)
    for owner, name in ((os, "replace"), (os, "fsync"), (bg, "capture"), (Client, "request")):
        deadly(owner, name)
    generate(states(Client({url!r}), teacher), DOCUMENTS, folder, CONFIG)

def child(*args):
    pid = os.fork()
    if not pid:
        run(*args)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

moments = random.Random(0).sample(range(1, 27), 20)
for number, moment in enumerate(moments):
    place = f"{folder}/{{number}}"
    assert child(place, moment) == -signal.SIGKILL, moment
    assert child(place, 0) == 0
"""


@pytest.mark.slow
def test_twenty_kills(teacher, whole, tmp_path):
    with StandIn(teacher.network) as server:
        code = KILLS.format(url=server.url, folder=tmp_path)
        subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
    for number in range(20):
        assert content(tmp_path / str(number)) == whole, number


def test_shares(teacher, whole, tmp_path):
    with StandIn(teacher.network) as server:
        source = states(Client(server.url), teacher)
        made = []
        for share in ((1, 2), (0, 2)):
            options = {"share": share, "report": made.append}
            assert generate(source, DOCUMENTS, tmp_path, CONFIG, **options) == (share[0] == 0)
        assert len(made) == 3 and sum(server.texts.values()) == len([*filter(None, DOCUMENTS)])
    assert content(tmp_path) == whole


@pytest.mark.parametrize("sglang", [False, True], ids=["vllm", "sglang"])
def test_log_probabilities_alone(sglang, teacher, tmp_path):
    config = CaptureConfig(k=7, batch_size=3, documents_per_shard=4)
    with StandIn(teacher.network, generates=True) as server:
        probabilities = LogProbabilities(Client(server.url), "teacher", 7, sglang)
        source = ServedLogProbabilities(probabilities, "teacher", VOCAB)
        assert generate(source, DOCUMENTS, tmp_path / "s", config, tokenizer=Tokenizer())
        with pytest.raises(LabelError, match=r"temperature must be 1.*Serve hidden states"):
            generate(source, DOCUMENTS, tmp_path / "t", CONFIG)
    assert generate(teacher, DOCUMENTS, tmp_path / "l", config)
    for served, loaded in zip(*(LabelDataset(tmp_path / x) for x in "sl"), strict=True):
        assert torch.equal(served.tokens, loaded.tokens)
        assert served.labels.sample is None and served.labels.entropy is None
        rows = slice(0, len(loaded.tokens) - 1)  # the last is not asked for
        if len(loaded.tokens) > 1:
            for name in ("indices", "logprobs"):
                left, right = (getattr(x.labels, name)[rows] for x in (served, loaded))
                torch.testing.assert_close(left[:, :7], right, rtol=2e-3, atol=1e-5)
    info = LabelDataset(tmp_path / "s").info
    assert (info.gamma, info.seed, info.k, info.vocab) == (None, None, 7, VOCAB)


# ---- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    return folder, checkpoint(folder)


def run(folder, data, *arguments):
    options = ("--teacher", folder, "--data", data, "--max-length", 8, *arguments)
    result = CliRunner().invoke(app, ["generate-labels", *map(str, options)])
    return result.exit_code, " ".join(result.output.split())


@pytest.mark.parametrize("generates", [False, True], ids=["states", "log-probabilities"])
def test_command(folder, tmp_path, generates):
    path, model = folder
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(f'{{"text": "{models.sentence(5, i)}"}}\n' for i in range(5)))
    options = {"tokenizer": models.tokenizer(), "generates": generates}
    with StandIn(model, str(path), **options) as server:
        arguments = ("--server", server.url, "--k", 4, "--documents-per-shard", 2, "--output")
        parts = tmp_path / "parts"
        code, output = run(path, data, *arguments, parts, "--shard", "1/2")
        assert code == 0 and "others are still writing" in output
        assert {x.stem for x in parts.iterdir()} == {"shard-00001"}
        assert run(path, data, *arguments, parts, "--shard", "0/2")[0] == 0
        code, output = run(path, data, *arguments, tmp_path / "all")
        assert code == 0 and "5/5" in output and "tok/s" in output
    assert content(parts) == content(tmp_path / "all")
    tokens = [x.tokens.tolist() for x in LabelDataset(parts, tokenizer=models.tokenizer())]
    assert tokens == [models.tokenizer()(models.sentence(5, i))["input_ids"] for i in range(5)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shard", "2/2"), "--shard must be such as 0/8"),
        (("--shard", "half"), "got 'half'"),
        (("--max-length", 65), "takes at most 64 tokens"),
        (("--server", "gpu7"), "must be such as http://localhost:8000"),
    ],
)
def test_command_refuses(folder, tmp_path, arguments, message):
    path, model = folder
    data = tmp_path / "texts.jsonl"
    data.write_text('{"text": "w5 w6"}\n')
    with StandIn(model, str(path)) as server:
        options = ("--server", server.url, "--output", tmp_path / "x", *arguments)
        code, output = run(path, data, *options)
    assert code == 1 and message in output, output
    assert not (tmp_path / "x").exists()
