"""A run whose teacher is behind a server learns what it learns from the teacher loaded."""

from __future__ import annotations

from dataclasses import replace

import pytest
from typer.testing import CliRunner

pytest.importorskip("urllib3", reason="needs the extra `served`: urllib3")

from bgkernels.training import DemoConfig, ModelShape, models, run_demo
from bgkernels.training.cli import app
from bgkernels.training.tokens import train_tokenizer
from tests.stand_in import StandIn


@pytest.fixture(scope="module")
def teacher(corpus, tmp_path_factory):
    """A teacher with its tokenizer in a folder, and its gains."""
    texts = [path.read_text() for path in sorted(corpus.iterdir())]
    words = train_tokenizer(texts, 300)
    model = models.small_llama(ModelShape(32, 1, 1), len(words), length=64, seed=3)
    model.network.model.norm.weight.data.uniform_(0.5, 1.5)
    folder = tmp_path_factory.mktemp("teacher")
    models.export(model, words, folder)
    model.freeze()
    return folder, model.network, words


def configured(base, corpus, folder, output, **changes):
    training = replace(base.student_training, steps=6, accumulate=2, validate_every=3)
    return replace(
        base,
        data=replace(base.data, corpus=corpus, sequence_length=16),
        teacher=str(folder),
        student_training=training,
        output=output,
        **changes,
    )


@pytest.mark.parametrize("method", ["entropy", "gkd"])
def test_served_is_loaded(teacher, corpus, tmp_path, method):
    """Losses, measures and the teacher's own text."""
    folder, network, words = teacher
    base = replace(DemoConfig.quick(), methods=(method,))
    with StandIn(network, str(folder), words) as server:
        config = configured(base, corpus, folder, tmp_path / "served", teacher_url=server.url)
        served = run_demo(config)
    loaded = run_demo(configured(base, corpus, folder, tmp_path / "loaded"))
    one, other = (x.students[method] for x in (served, loaded))
    assert one.history.losses == pytest.approx(other.history.losses, rel=1e-4)
    for name, parts in one.measures.items():
        for part, estimate in parts.items():
            close = pytest.approx(other.measures[name][part].mean, rel=1e-3, abs=1e-4, nan_ok=True)
            assert estimate.mean == close, name
    assert served.teacher.parameters == loaded.teacher.parameters
    assert (tmp_path / "loaded/models/teacher").exists()
    assert not (tmp_path / "served/models/teacher").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--teacher-url", "http://127.0.0.1:9"), "--teacher-url needs --teacher"),
        (("--teacher-url", "gpu7", "--teacher", "{teacher}"), "must be such as http://localhost"),
        (("--teacher-url", "{url}", "--teacher", "nowhere/x/y"), "--teacher must be the path or"),
        (
            ("--teacher-url", "{url}", "--teacher", "{teacher}", "--sequence-length", "128"),
            "takes at most 64 tokens",
        ),
    ],
)
def test_refusals(teacher, corpus, tmp_path, arguments, message):
    folder, network, words = teacher
    with StandIn(network, str(folder), words) as server:
        filled = [x.format(url=server.url, teacher=folder) for x in arguments]
        options = ["distill", "--corpus", str(corpus), "--output", str(tmp_path), *filled]
        result = CliRunner().invoke(app, options)
    assert result.exit_code == 1 and message in " ".join(result.output.split()), result.output
