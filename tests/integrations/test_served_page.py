"""The page on served teachers: its blocks, from the server to the student, as they stand there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("transformers", reason="needs the extra `integrations`: transformers")
pytest.importorskip("accelerate", reason="needs the extra `integrations`: accelerate")
pytest.importorskip("urllib3", reason="needs the extra `served`: urllib3")

from bgkernels.labels import LabelDataset
from bgkernels.training.cli import app
from tests import models
from tests.real_server import MISSING, serving
from tests.stand_in import StandIn, checkpoint

PAGE = Path(__file__).resolve().parents[2] / "docs" / "served.md"
WIDE = {"hidden_size": 128, "head_dim": 64, "num_key_value_heads": 2, "max_position_embeddings": 64}
SEEDS = {"teacher": 1, "student": 2}
SMALL = {
    "distill": ("--sequence-length", "16", "--steps", "2", "--batch-size", "2"),
    "generate-labels": ("--max-length", "64"),
}
"""What these commands need beside, for models as small as ours."""


def blocks() -> list[tuple[str, str]]:
    """Language and text of each."""
    return re.findall(r"^```(sh|python)\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)


def real(folder: Path, model: Any, arguments: list[str]) -> AbstractContextManager[Any]:
    """A server that the page starts."""
    return serving(folder.resolve(), arguments)


def stand_in(folder: Path, model: Any, arguments: list[str]) -> AbstractContextManager[Any]:
    generates = "--runner" not in arguments
    return StandIn(model, str(folder), models.tokenizer(), generates, develops=generates)


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Teacher, student and texts in the present folder; the models, by their folders."""
    monkeypatch.chdir(tmp_path)
    found = {name: checkpoint(Path(name), seed=seed, **WIDE) for name, seed in SEEDS.items()}
    lines = "".join(f'{{"text": "{models.sentence(9, i)}"}}\n' for i in range(40))
    Path("texts.jsonl").write_text(lines)
    Path("corpus").mkdir()
    for i in range(40):
        Path(f"corpus/{i}.txt").write_text(models.sentence(30, i))
    return found


@pytest.mark.parametrize(
    "serve",
    [
        stand_in,
        pytest.param(
            real, marks=[pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=MISSING)]
        ),
    ],
)
def test_from_a_server_to_a_student(serve: Callable[..., Any], written: Any) -> None:
    names: dict[str, Any] = {}
    urls: dict[str, str] = {}
    with ExitStack() as stack:
        for language, block in blocks():
            for said, url in urls.items():
                block = block.replace(said, url)
            if language == "python":
                exec(compile(block, str(PAGE), "exec"), names)
                continue
            command = shlex.split(block.removeprefix("VLLM_SERVER_DEV_MODE=1 "))[1:]
            if command[0] == "serve":
                _, name, *arguments, port = command if "--port" in command else [*command, "8000"]
                arguments = [x for x in arguments if x != "--port"]
                server = stack.enter_context(serve(Path(name), written[name], arguments))
                urls[f"http://localhost:{port}"] = getattr(server, "url", server)
                continue
            command += SMALL[command[0]]
            result = CliRunner().invoke(app, command)
            assert result.exit_code == 0, result.output
    assert names["loss"].isfinite()
    assert len(LabelDataset(Path("labels"))) == 40
    for trained in ("distill/models/entropy", "distill/models/sequence", "gkd/models/gkd"):
        assert Path("runs", trained, "model.safetensors").exists()
