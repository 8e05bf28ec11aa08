"""The real server over HTTP: vLLM on a processor, against the teacher loaded here."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra `integrations`: transformers")
pytest.importorskip("accelerate", reason="needs the extra `integrations`: accelerate")
pytest.importorskip("urllib3", reason="needs the extra `served`: urllib3")

from bgkernels.integrations.served import ServedTeacher
from bgkernels.integrations.transformers import HybridDistillationTrainer
from bgkernels.labels import CaptureConfig, LabelDataset, generate
from bgkernels.labels.errors import ServerError
from bgkernels.labels.served.api import find_model
from bgkernels.labels.served.client import Client
from bgkernels.labels.served.completions import Completions
from bgkernels.training.generation import generate as generate_text
from bgkernels.training.models import load_pretrained
from bgkernels.training.served import served_source
from bgkernels.training.text_server import TextServer
from tests.integrations.steps import arguments, examples
from tests.labels.served import same
from tests.models import VOCAB, tiny
from tests.real_server import MISSING, POOLING, serving
from tests.stand_in import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=MISSING)]

WIDE = {"hidden_size": 128, "head_dim": 64, "num_key_value_heads": 2, "max_position_embeddings": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("teacher")


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Any:
    return checkpoint(folder, "qwen2", **WIDE)


@pytest.fixture(scope="module")
def urls(teacher: Any, folder: Path) -> Iterator[list[str]]:
    """A server of hidden states, and one that generates."""
    with ExitStack() as stack, ThreadPoolExecutor() as threads:
        starts = [serving(folder, POOLING), serving(folder, ())]
        yield [*threads.map(stack.enter_context, starts)]


def test_labels(urls: list[str], teacher: Any, folder: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 60, (60,), generator=generator).tolist()
    texts = [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in lengths]
    config = CaptureConfig(k=7, documents_per_shard=25)
    loaded, words = load_pretrained(str(folder), "--teacher", 60)
    loaded.freeze()
    assert generate(loaded, texts, tmp_path / "loaded", config, tokenizer=words)
    for url, name in zip(urls, ("states", "logprobs"), strict=True):
        source, words = served_source(Client(url), str(folder), 60, config.k)
        assert source.whole == (name == "states")
        assert generate(source, texts, tmp_path / name, config, tokenizer=words)
    same(tmp_path / "states", tmp_path / "loaded")
    pairs = zip(LabelDataset(tmp_path / "logprobs"), LabelDataset(tmp_path / "loaded"), strict=True)
    for served, whole in pairs:
        if len(whole.tokens) > 1:  # the last token's are not asked for
            left, right = (x.labels.logprobs[:-1, :7] for x in (served, whole))
            torch.testing.assert_close(left, right, rtol=2e-3, atol=1e-4)


def test_an_update(urls: list[str], teacher: Any, folder: Path, tmp_path: Path) -> None:
    """The weights after some steps are those with the teacher loaded."""
    weights = []
    for source in (ServedTeacher(urls[0], folder, reference=urls[1]), teacher):
        student = tiny()
        trainer = HybridDistillationTrainer(
            student, arguments(tmp_path, max_steps=4), teacher=source, train_dataset=examples()
        )
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-5)


def test_text(urls: list[str], folder: Path, tmp_path: Path) -> None:
    """The favourites of each next token, before and after other weights; and samples."""
    model, _ = load_pretrained(str(folder), "--teacher", 64)
    model.freeze()
    client = Client(urls[1])
    server = TextServer(Completions(client, find_model(client).name), "student", tmp_path)
    prompts, greedy = torch.arange(3, 43).view(8, 5), {"temperature": 0.0}
    server.check(model)
    for step in range(3):
        expected = generate_text(model, prompts, 12, VOCAB, 0, **greedy)
        assert (server(model, prompts, 12, VOCAB, 0, **greedy) == expected).float().mean() > 0.9
        model.network.model.norm.weight.data.mul_(-1).add_(0.1 * step)
        server.update(model)
    rows, vocab = 400, VOCAB // 2
    said = server(model, prompts[:1].expand(rows, -1), 1, vocab, seed=5)[:, 0]
    expected = model.network(prompts[:1]).logits[0, -1, :vocab].softmax(-1) * rows
    found = said.bincount(minlength=vocab)
    assert ((found - expected) ** 2 / expected).sum() < vocab + 5 * (2 * vocab) ** 0.5
    model, _ = load_pretrained(str(folder), "--teacher", 64)
    server.update(model)  # for other tests


def test_another_model_is_refused(urls: list[str], tmp_path: Path) -> None:
    checkpoint(tmp_path / "other", "qwen2", seed=7, **WIDE)
    with pytest.raises(ServerError, match="did not make"):
        ServedTeacher(urls[0], tmp_path / "other", model=None)
    with pytest.raises(ServerError, match="nats a token away"):
        ServedTeacher(urls[0], tmp_path / "other", reference=urls[1])
    with pytest.raises(ServerError, match=r"status 404.*--runner pooling"):
        ServedTeacher(urls[1], tmp_path / "other")
