"""Methods by name: each is the loss that it says, on the text that it says."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from signal import SIGTERM

import pytest
import torch
from torch.nn import functional as F
from typer.testing import CliRunner

from bgkernels.training import distill, generation, models, writing
from bgkernels.training.cli import app
from bgkernels.training.config import DataConfig, DemoConfig, ModelShape, TrainConfig
from bgkernels.training.corpus import load_corpus
from bgkernels.training.errors import Interrupted, MissingExtra, OptionError
from bgkernels.training.log import Log
from bgkernels.training.materials import prepare
from bgkernels.training.methods import METHODS, find
from bgkernels.training.progress import Silent
from bgkernels.training.tokens import IGNORED, Batch
from tests.training.signals import Signals

VOCAB = 300


@pytest.fixture(scope="module")
def config(corpus, tmp_path_factory):
    data = DataConfig(corpus, vocab=VOCAB, sequence_length=16, batch_size=4, held_out=0.1)
    training = TrainConfig(6, 1e-2, validate_every=3, checkpoint_every=4)
    return replace(
        DemoConfig.quick(), data=data, student_training=training,
        output=tmp_path_factory.mktemp("runs"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def pair(config):
    """Student and teacher with opinions."""
    student, teacher = (models.small_llama(ModelShape(16, 1, 1), VOCAB, 16, s) for s in (1, 2))
    for model in (student, teacher):
        model.network.lm_head.weight.data.mul_(2)
    teacher.freeze()
    return student, teacher


@pytest.fixture
def batch():
    tokens = torch.randint(VOCAB, (2, 13), generator=torch.Generator().manual_seed(3))
    learnt = torch.ones_like(tokens, dtype=torch.bool)
    learnt[0, :5] = False
    return Batch.of(tokens, learnt)


def dense(pair, batch):
    """Log-probabilities of both models at the learnt tokens, and those tokens; in fp64."""
    keep = batch.labels != IGNORED
    with torch.no_grad():
        logits = [m.network(batch.tokens[:, :-1]).logits.double()[keep] for m in pair]
    return logits, batch.labels[keep]


def kl(p, q):
    return (p.exp() * (p - q)).sum(-1)


def expected(name, logits, labels, progress):
    """The loss of a method, from its formula on dense logits."""
    s, t = (x.log_softmax(-1) for x in logits)
    nll, p = F.nll_loss(s, labels, reduction="none"), t.exp()
    m = (0.5 * s.exp() + 0.5 * p).log()
    hard = {
        "hard": 1.0, "sequence": 1.0, "static": 0.5, "confidence": p.amax(-1),
        "shannon": 1 + (p * t).sum(-1) / torch.tensor(VOCAB).log(),
        "curriculum": 1 - 0.5 * min(1.0, progress / 0.2), "reverse-confidence": 1 - p.amax(-1),
    }  # fmt: skip
    temperatures = {"soft-t2": 2.0, "cooling": 4 - 3 * progress, "warming": 1 + 3 * progress}
    if name in hard:
        rows = hard[name] * nll + (1 - torch.as_tensor(hard[name])) * kl(t, s)
    elif name in temperatures:
        tau = temperatures[name]
        s, t = ((x / tau).log_softmax(-1) for x in logits)
        rows = tau**2 * kl(t, s)
    else:
        rows = {
            "argmax": lambda: F.nll_loss(s, t.argmax(-1), reduction="none"),
            "soft": lambda: kl(t, s),
            "on-policy": lambda: kl(t, s),
            "reverse-kl": lambda: kl(s, t),
            "minillm": lambda: kl(s, t),
            "jsd": lambda: 0.5 * kl(t, m) + 0.5 * kl(s, m),
            "gkd": lambda: 0.5 * kl(t, m) + 0.5 * kl(s, m),
            "total-variation": lambda: 0.5 * (s.exp() - p).abs().sum(-1),
        }[name]()
    return float(rows.mean())


FORMULAS = [
    "hard",
    "sequence",
    "static",
    "confidence",
    "shannon",
    "curriculum",
    "reverse-confidence",
    "soft-t2",
    "cooling",
    "warming",
    "argmax",
    "soft",
    "on-policy",
    "reverse-kl",
    "minillm",
    "jsd",
    "gkd",
    "total-variation",
]


@pytest.mark.parametrize("step", [1, 4])
@pytest.mark.parametrize("name", FORMULAS)
def test_loss_is_the_formula(config, pair, batch, name, step):
    objective = distill.make_objective(config, name, *pair)
    found = objective(batch, step, batch.items).item()
    assert found == pytest.approx(expected(name, *dense(pair, batch), step / 6), rel=1e-4)


VARIANTS = {
    "confidence+reverse": "reverse-confidence",
    "soft+t2": "soft-t2",
    "hard+argmax": "argmax",
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_the_method_that_it_says(config, pair, batch, name):
    losses = [
        distill.make_objective(config, x, *pair)(batch, 2, batch.items)
        for x in (name, VARIANTS[name])
    ]
    assert torch.equal(*losses)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_moves_the_student_towards_something(config, pair, batch, name):
    """A small step against the gradient lowers the loss of the same batch."""
    student = pair[0].clone()
    objective = distill.make_objective(config, name, student, pair[1], pair[1])
    before = objective(batch, 3, batch.items)
    before.backward()
    with torch.no_grad():
        for p in student.network.parameters():
            p -= 1e-3 * p.grad
        assert objective(batch, 3, batch.items) < before


def test_the_student_continues_the_beginnings(config, pair, batch):
    objective = distill.make_objective(config, "on-policy", *pair)
    one, two, other = objective.rewrite([batch] * 3, [5, 5, 6], 0)
    continues(one, batch)
    assert torch.equal(one.tokens, two.tokens) and not torch.equal(one.tokens, other.tokens)


def continues(written, batch):
    """The beginning is the text's, the rest is not, and the rest alone is learnt."""
    given = batch.labels.shape[1] // 4
    assert torch.equal(written.tokens[:, :given], batch.tokens[:, :given])
    assert (written.labels[:, : given - 1] == IGNORED).all()
    assert torch.equal(written.labels[:, given - 1 :], written.tokens[:, given:])
    assert not torch.equal(written.tokens, batch.tokens)


@pytest.mark.parametrize("stride", [1, 3])
def test_the_teacher_continues_many_batches_at_once(config, pair, monkeypatch, stride):
    """Each text is the same whichever is asked for first, as a resumed run must find it."""
    batches, calls = prepare(config, load_corpus(config.data)).batches, []
    monkeypatch.setattr(
        writing,
        "continue_text",
        lambda *x, **options: calls.append(x) or generation.continue_text(*x, **options),
    )
    write = writing.Writer(pair[1], VOCAB, prompt=0.25, seed=0)
    forward, backward = (writing.WrittenBatches(batches, write, stride) for _ in range(2))
    size = generation.ROWS // len(batches[0].tokens)
    numbers = range(stride - 1, 2 * size * stride, stride)
    found = {n: forward[n] for n in numbers}
    assert len(calls) == 2
    for n in reversed(numbers):
        continues(found[n], batches[n])
        assert torch.equal(backward[n].tokens, found[n].tokens)
    alone = write([batches[numbers[1]]], [numbers[1]])
    assert torch.equal(alone[0].tokens, found[numbers[1]].tokens)


def test_half_on_policy_keeps_half_of_the_text(config, pair, batch):
    objective = distill.make_objective(config, "gkd", *pair)
    kept = [objective.rewrite([batch], [step], step)[0] is batch for step in range(6)]
    assert kept == [True, False] * 3
    assert distill.make_objective(config, "soft", *pair).rewrite([batch], [1], 1) == [batch]


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_two_teachers_are_weighed(config, pair, batch, weight):
    second = models.small_llama(ModelShape(32, 1, 1), VOCAB, 16, 5)
    second.network.lm_head.weight.data.mul_(2)
    changed = replace(config, loss=replace(config.loss, second_weight=weight))
    objective = distill.make_objective(changed, "two-teachers", *pair, second)
    (student, teacher, other), _ = dense((*pair, second), batch)
    s, t, u = (x.log_softmax(-1) for x in (student, teacher, other))
    formula = ((1 - weight) * kl(t, s) + weight * kl(u, s)).mean()
    assert objective(batch, 0, batch.items).item() == pytest.approx(float(formula), rel=1e-4)


def test_a_second_teacher_is_asked_for(config, pair):
    with pytest.raises(OptionError, match="'two-teachers' needs --second-teacher"):
        distill.make_objective(config, "two-teachers", *pair)
    assert distill.make_objective(config, "soft", *pair, pair[1]).second is None


def test_unknown_method_is_named():
    with pytest.raises(OptionError, match=r"a method must be one of hard, .*got 'harder'"):
        find("harder")


@pytest.fixture(scope="module")
def materials(config):
    return prepare(config, load_corpus(config.data))


def trained(
    config, materials, pair, method="entropy", *, batch_size=4, folder, display=None, **training
):
    """A student of one method, and its history."""
    data = replace(materials.batches, batch_size=batch_size)
    changed = replace(
        config, output=config.output / folder,
        student_training=replace(config.student_training, **training),
    )  # fmt: skip
    return distill.train_student(
        changed, replace(materials, batches=data), method, pair[1], display or Silent()
    )


def parameters(model):
    return torch.cat([p.detach().flatten() for p in model.network.parameters()])


def test_accumulated_batches_are_one_large_batch(config, materials, pair):
    whole, _ = trained(config, materials, pair, folder="whole")
    parts, _ = trained(config, materials, pair, batch_size=2, accumulate=2, folder="parts")
    torch.testing.assert_close(parameters(parts), parameters(whole), rtol=1e-3, atol=2e-5)


def test_gradient_checkpointing_changes_nothing(config, materials, pair):
    plain, _ = trained(config, materials, pair, folder="plain")
    saving, _ = trained(config, materials, pair, gradient_checkpointing=True, folder="saving")
    torch.testing.assert_close(parameters(saving), parameters(plain), rtol=1e-4, atol=1e-6)


def test_bf16_stays_near_fp32(config, materials, pair):
    _, history = trained(config, materials, pair, folder="exact")
    rough, rounded = trained(config, materials, pair, bf16=True, folder="rough")
    assert rough.network.dtype == torch.float32
    assert rounded.losses != history.losses
    torch.testing.assert_close(
        torch.tensor(rounded.losses), torch.tensor(history.losses), rtol=0.02, atol=0
    )


@pytest.mark.parametrize("method", ["gkd", "sequence", "curriculum", "cooling"])
def test_interrupted_and_resumed_is_bit_identical(config, materials, pair, method):
    straight, history = trained(config, materials, pair, method, folder=f"{method}-straight")
    with pytest.raises(Interrupted, match="at step 3"):
        trained(config, materials, pair, method, folder=method, display=Signals(2, SIGTERM))
    resumed, again = trained(config, materials, pair, method, folder=method)
    assert torch.equal(parameters(resumed), parameters(straight))
    assert again.losses == history.losses


def test_log_has_a_line_a_step(config, materials, pair):
    trained(config, materials, pair, folder="logged")
    records = Log(config.output / "logged" / "student-entropy" / "log.jsonl").read()
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records if "cross_entropy" in r] == [3, 6]
    assert all(r["peak_memory"] > 2**20 and r["tokens_per_second"] > 0 for r in records)


class Crashing(Silent):
    """Ends the run after step 5."""

    def training(self, title, steps):
        return nullcontext(self.crash)

    def crash(self, now):
        if now.step == 5:
            raise RuntimeError("crash")


def test_tensorboard_has_the_log(config, materials, pair):
    """After a crash at step 5 the run goes on from 4: every step is there once."""
    pytest.importorskip("tensorboard", reason="needs the extra `tensorboard`")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = replace(config, tensorboard=True)
    with pytest.raises(RuntimeError, match="crash"):
        trained(shown, materials, pair, folder="board", display=Crashing())
    trained(shown, materials, pair, folder="board")
    folder = config.output / "board" / "student-entropy"
    records, events = (
        Log(folder / "log.jsonl").read(),
        EventAccumulator(str(folder / "tensorboard")),
    )
    events.Reload()
    for name in ("loss", "learning_rate", "cross_entropy"):
        points = [(e.step, e.value) for e in events.Scalars(name)]
        expected = [(r["step"], pytest.approx(r[name])) for r in records if name in r]
        assert points == expected


def test_tensorboard_is_asked_for(config, materials, pair, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(
        MissingExtra, match=r"'tensorboard'.*pip install 'bgkernels\[tensorboard\]'"
    ):
        trained(replace(config, tensorboard=True), materials, pair, folder="no board")


# ---- the command line


def invoke(*arguments):
    return CliRunner(env={"COLUMNS": "160", "TERM": "dumb"}).invoke(app, [*map(str, arguments)])


def test_compare_has_a_row_for_each_method(corpus, tmp_path):
    result = invoke(
        "compare", "--quick", "--corpus", corpus, "--output", tmp_path, "--steps", 2,
        "--teacher-steps", 2, "--methods", "soft,gkd,risk-guided", "--sequence-length", 12,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for name in ("soft", "gkd", "risk-guided"):
        assert METHODS[name].title in result.output
    found = json.loads((tmp_path / "results.json").read_text())
    assert set(found["students"]) == {"soft", "gkd", "risk-guided"}


def test_a_model_is_trained_then_distilled_then_trained(corpus, tmp_path):
    """The commands follow one another: the output of each is the input of the next."""
    text = ("--corpus", corpus, "--sequence-length", 12, "--steps", 2, "--batch-size", 2)
    first = invoke("train", *text, "--output", tmp_path / "one", "--accumulate", 2)
    assert first.exit_code == 0 and "Cross-entropy on held-out text" in first.output
    model = tmp_path / "one" / "model"
    second = invoke(
        "distill", *text, "--teacher", model, "--student", model, "--method", "confidence",
        "--output", tmp_path / "two", "--bf16",
    )  # fmt: skip
    assert second.exit_code == 0 and "confidence-routed" in second.output
    student = tmp_path / "two" / "models" / "confidence"
    pair = ("--teacher", model, "--second-teacher", student, "--student", model)
    both = invoke("distill", *text, *pair, "--method", "two-teachers", "--output", tmp_path / "2t")
    assert both.exit_code == 0 and METHODS["two-teachers"].title in both.output
    third = invoke("train", *text, "--student", student, "--output", tmp_path / "three")
    assert third.exit_code == 0, third.output
    assert (tmp_path / "three" / "model" / "config.json").exists()


@pytest.mark.parametrize("command", ["compare --methods", "distill --method"])
def test_unknown_method_is_one_message(command, tmp_path):
    result = invoke(*command.split(), "nothing", "--output", tmp_path)
    assert result.exit_code == 1 and "a method must be one of" in result.output


@pytest.mark.parametrize("command", ["demo", "distill", "compare", "train", "study", "analyze"])
def test_every_command_teaches(command):
    result = invoke(command, "--help")
    assert result.exit_code == 0 and "Example" in result.output and "--config" in result.output


@pytest.mark.parametrize(
    "path",
    sorted((Path(__file__).parents[2] / "examples").glob("*/*.yaml")),
    ids=lambda p: p.stem,
)
def test_example_configurations_are_understood(path):
    """Each file's first line says its command; only its data are missing here."""
    command = path.read_text().split()[2]
    result = invoke(command, "--config", path, "--corpus", "/nowhere")
    assert result.exit_code == 1 and "/nowhere is not a folder" in result.output, result.output
