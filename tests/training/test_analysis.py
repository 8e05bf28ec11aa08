"""Exposure bias on real models: ratios, risks and maps, against dense torch and definitions."""

from __future__ import annotations

import json
import math

import pytest
import torch
from typer.testing import CliRunner

import bgkernels as bg
from bgkernels.training import evaluate, generation, models
from bgkernels.training.analysis.passages import read_passage
from bgkernels.training.analysis.risk import choice_risk
from bgkernels.training.cli import app
from bgkernels.training.config import ModelShape
from bgkernels.training.maps import LAYERS
from bgkernels.training.tokens import train_tokenizer
from tests.training.notes import WORDS, write_notes

VOCAB, LENGTH = 280, 16


def sharp_llama(seed):
    """A small model with opinions."""
    model = models.small_llama(ModelShape(16, 1, 1), VOCAB, LENGTH, seed)
    model.network.lm_head.weight.data.mul_(2)
    model.freeze()
    return model


@pytest.fixture(scope="module")
def pair():
    return sharp_llama(1), sharp_llama(2)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([" ".join(WORDS)], VOCAB)


@pytest.fixture
def text():
    return torch.randint(VOCAB, (7,), generator=torch.Generator().manual_seed(3))


def log_probs(model, tokens):
    with torch.no_grad():
        return model.network(tokens).logits.double().log_softmax(-1)


def kl(student, teacher, tokens):
    """KL(teacher ‖ student) after each token."""
    s, t = log_probs(student, tokens), log_probs(teacher, tokens)
    return (t.exp() * (t - s)).sum(-1)


def scored(kl_values, valid=None):
    values = torch.tensor(kl_values, dtype=torch.float64)
    valid = torch.ones_like(values, dtype=torch.bool) if valid is None else torch.tensor(valid)
    return evaluate.Tokens(values, values, values, torch.zeros_like(values), valid, valid)


def test_accumulated_error_is_the_ratio_of_sums():
    """ExAccErr(l) = (Σ_{t≤l} KL on own text) / (Σ_{t≤l} KL on the teacher's text) - 1."""
    own, taught = scored([[0.0, 3.0, 5.0], [0.0, 1.0, 9.0]]), scored([[0.0, 1, 2], [0, 3, 2]])
    for x in (own, taught):
        x.valid[:, 0] = False  # the prompt
    readings = evaluate.Readings(taught, taught, own)
    found = readings.accumulation([1, 2], threshold=0.5)
    assert found[1]["all"].mean == pytest.approx(4 / 4 - 1)
    assert found[2]["bridge"].mean == pytest.approx(18 / 8 - 1)
    assert math.isnan(found[2]["garden"].mean)


def test_error_of_a_ratio():
    """Where own errors are proportional to taught ones, their ratio is known without error."""
    values = torch.rand(50, 4, dtype=torch.float64)
    taught, own = scored(values.tolist()), scored((1.5 * values).tolist())
    ratio = evaluate.Readings(taught, taught, own).measures(0.5)["excess_error"]["all"]
    assert ratio.mean == pytest.approx(0.5) and ratio.error < 1e-12
    generator = torch.Generator().manual_seed(0)
    noisy = scored((values + torch.rand(50, 4, generator=generator, dtype=torch.float64)).tolist())
    ratio = evaluate.Readings(taught, taught, noisy).measures(0.5)["excess_error"]["all"]
    chosen = torch.randint(50, (4000, 50), generator=generator)
    resampled = noisy.kl.sum(-1)[chosen].sum(-1) / taught.kl.sum(-1)[chosen].sum(-1)
    assert ratio.error == pytest.approx(float(resampled.std()), rel=0.15), "the bootstrap agrees"


def test_a_student_like_its_teacher_risks_nothing(pair, text):
    student, _ = pair
    risk = choice_risk(student, student, text, horizon=3, rollouts=2, seed=0)
    assert risk.shape == (6,) and not risk.any()


def test_risk_is_what_the_choice_costs_later(pair, text):
    student, teacher = pair
    found = choice_risk(student, teacher, text, horizon=3, rollouts=4, seed=11)
    assert found.any()
    for position in range(1, len(text)):
        prompts, costs = text[:position].repeat(4, 1), []
        for chooser in (student, teacher):
            said = generation.continue_text(chooser, prompts, 1, VOCAB, 11 + 2 * position)
            said = generation.continue_text(teacher, said, 3, VOCAB, 12 + 2 * position)
            costs.append(kl(student, teacher, said)[:, position:-1].sum() / 4)
        expected = float(costs[0] - costs[1])
        assert float(found[position - 1]) == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_maps_equal_dense_torch(pair, tokenizer, text):
    student, teacher = pair
    policy = bg.routing.confidence("max")
    found = read_passage(student, teacher, tokenizer, text, policy)
    t = log_probs(teacher, text[None, :-1])[0]
    dense = {
        "ambiguity": -(t.exp() * t).sum(-1) / math.log(VOCAB),
        "soft_weight": 1 - t.exp().amax(-1),
        "kl": kl(student, teacher, text[None, :-1])[0],
    }
    for name, expected in dense.items():
        values = torch.tensor(getattr(found, name), dtype=torch.float64)
        torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)
    assert "risk" not in found.layers() and len(found.tokens) == 6


# ---- the command line


@pytest.fixture(scope="module")
def saved(tmp_path_factory, pair, tokenizer):
    """Both models on disk, and a corpus."""
    folder = tmp_path_factory.mktemp("pair")
    for name, model in zip(("student", "teacher"), pair, strict=True):
        models.export(model, tokenizer, folder / name)
    (folder / "corpus").mkdir()
    write_notes(folder / "corpus")
    return folder


def invoke(*arguments):
    return CliRunner(env={"COLUMNS": "160", "TERM": "dumb"}).invoke(
        app, ["analyze", *map(str, arguments)]
    )


def test_analysis_end_to_end(saved, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps({"student": str(saved / "student"), "corpus": str(saved / "corpus")})
    )
    result = invoke(
        "--config", config, "--teacher", saved / "teacher", "--output", tmp_path, "--windows", 4,
        "--sequence-length", 12, "--horizon", 2, "--rollouts", 1, "--passages", 1,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "ExAccErr" in result.output and "exposure bias" in result.output
    found = json.loads((tmp_path / "analysis.json").read_text())
    assert found["prompts"] == 4 and set(found["passages"][0]) == {
        "tokens",
        "given",
        "voices",
        *LAYERS,
    }
    longest = list(found["accumulation"].values())[-1]["all"]["mean"]
    assert longest == pytest.approx(found["measures"]["excess_error"]["all"]["mean"])
    assert found["passages"][0]["voices"].keys() == {"teacher", "student"}
    assert "exposure bias" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "analysis.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--routing", "nowhere"), "`routing` must be one of"),
        (("--student", "/nowhere"), "--student must be the path or the name"),
    ],
)
def test_errors_are_one_message(saved, arguments, message):
    base = ("--teacher", saved / "teacher", "--corpus", saved / "corpus")
    result = invoke(*base, "--student", saved / "student", "--sequence-length", 12, *arguments)
    assert result.exit_code == 1, result.output
    assert message in " ".join(result.output.split())
