"""The study: its sums against enumeration of all texts, and what holds robustly of students."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from bgkernels.training.claims import Interval, judge
from bgkernels.training.cli import app
from bgkernels.training.study import StudyConfig, WorldConfig
from bgkernels.training.study.claims import CLAIMS
from bgkernels.training.study.exact import examine
from bgkernels.training.study.lesson import REFERENCE, STUDIED, heard, teach, teacher_texts
from bgkernels.training.study.measures import measure
from bgkernels.training.study.run import discrepancy
from bgkernels.training.study.students import Students
from bgkernels.training.study.world import BRIDGE, GARDEN, make_world, write

TINY = WorldConfig(
    steps=4, vocab=5, bridges=2, gardens=1, bridge_choices=2, garden_choices=4, slip=0.05
)


@pytest.fixture(params=[True, False], ids=["forgiving", "strict"])
def world(request):
    return make_world(replace(TINY, forgiving=request.param))


@pytest.fixture
def logits(world):
    shape = (2, world.steps, world.vocab, world.vocab)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 2


def walk(world, tokens):
    """States ``(step, condition, last)`` along a text, by the rules in words."""
    condition, last, states = 0, 0, []
    for t, token in enumerate(tokens):
        states.append((t, condition, last))
        last = int(world.kept[t, condition, token])
        condition = int(world.following[t, condition, token])
    return states


def enumerate_losses(world, student):
    """Every text with its probability under teacher and student, and its loss."""
    for tokens in itertools.product(range(world.vocab), repeat=world.steps):
        by_teacher = by_student = 1.0
        loss = 0.0
        for (t, c, last), token in zip(walk(world, tokens), tokens, strict=True):
            p, q = world.teacher[t, c].exp(), student[t, last].double().softmax(-1)
            by_teacher, by_student = by_teacher * float(p[token]), by_student * float(q[token])
            loss += float((p * (p / q).log()).sum())
        yield tokens, by_teacher, by_student, loss


def test_losses_equal_enumeration(world, logits):
    exact = examine(world, logits)
    texts = list(enumerate_losses(world, logits[1]))
    assert sum(x[1] for x in texts) == pytest.approx(1) == sum(x[2] for x in texts)
    taught, own = (sum(x[i] * x[3] for x in texts) for i in (1, 2))
    assert float(exact.taught_loss[1].sum()) == pytest.approx(taught, rel=1e-12)
    assert float(exact.own_loss[1].sum()) == pytest.approx(own, rel=1e-12)
    whole = sum(p * math.log(p / q) for _, p, q, _ in texts)  # KL of whole texts, by its chain rule
    assert taught == pytest.approx(whole, rel=1e-10)
    broken = sum(q for tokens, _, q, _ in texts if walk(world, tokens)[-1][1] >= 2)
    assert float(exact.broken[1]) == pytest.approx(broken, rel=1e-12)


def test_risk_is_what_one_forced_token_costs(world, logits):
    """κ(a|s), from the loss of texts that say ``a`` in ``s`` and are the teacher's otherwise."""
    exact, at = examine(world, logits), 1
    texts = [
        (tokens, by_teacher, walk(world, tokens))
        for tokens, by_teacher, *_ in enumerate_losses(world, logits[0])
    ]
    for condition, last in itertools.product(range(4), range(world.vocab)):
        weight = torch.zeros(world.vocab, dtype=torch.float64)
        to_come = torch.zeros_like(weight)
        for tokens, by_teacher, states in texts:
            if states[at] == (at, condition, last):
                later = sum(float(exact.loss[0, t, c, x]) for t, c, x in states[at + 1 :])
                weight[tokens[at]] += by_teacher
                to_come[tokens[at]] += by_teacher * later
        if weight.sum() > 0:
            cost, usual = to_come / weight, to_come.sum() / weight.sum()
            torch.testing.assert_close(exact.risk[0, at, condition], cost - usual)


def test_exposure_bias_is_the_risk_weighted_error(world, logits):
    exact = examine(world, logits)
    assert discrepancy(exact) < 1e-12 < float((exact.own_loss - exact.taught_loss).abs().sum())


def test_the_teacher_itself_has_no_bias():
    """A student that says what the teacher says loses nothing, where nothing is hidden from it."""
    world = make_world(replace(TINY, bridges=0, gardens=0))
    logits = world.teacher[:, 0][None, :, None].expand(1, -1, world.vocab, -1)
    exact = examine(world, logits)
    for value in (exact.own_loss, exact.risk, exact.bias, exact.distance):
        assert value.abs().max() < 1e-12


def test_world_has_bridges_and_gardens():
    world = make_world(WorldConfig())
    assert [(world.kinds == kind).sum().item() for kind in (BRIDGE, GARDEN)] == [5, 4]
    for t in (world.kinds == BRIDGE).nonzero().flatten().tolist():
        assert (world.following[t, 0] == 2).sum() == world.vocab - 4, "most tokens break the text"
        assert (world.following[t, 2:] >= 2).all(), "a broken text stays broken"
        assert world.teacher[t, 0].argmax() != world.teacher[t, 2].argmax()
    for t in (world.kinds == GARDEN).nonzero().flatten().tolist():
        assert (world.following[t, :2] < 2).all(), "nothing breaks in a garden"
        assert world.teacher[t, 0].exp().max() < 0.4


def test_samples_follow_the_exact_distribution():
    """The chain that is sampled for training is the one that is summed over."""
    config = StudyConfig(world=TINY, seeds=2, texts=4000)
    world = make_world(config.world)
    texts, exact = teacher_texts(config, world), examine(world, torch.zeros(1, 4, 5, 5))
    for t in range(world.steps):
        index = texts.condition[..., t] * world.vocab + texts.last[..., t]
        share = torch.bincount(index.flatten(), minlength=4 * world.vocab) / index.numel()
        assert (share - exact.taught[0, t].flatten()).abs().max() < 0.02
    rows = heard(world, texts).exp()
    torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:-1]))


def test_each_student_is_alone():
    """Trained side by side or apart, a student is the same, but for rounding."""
    config = StudyConfig(world=TINY, seeds=2, texts=32, steps=20, batch=4)
    world = make_world(config.world)
    both = teach(config, world, STUDIED["soft"], 6, teacher_texts(config, world))
    one = replace(config, seeds=1)
    alone = teach(one, world, STUDIED["soft"], 6, teacher_texts(one, world))
    torch.testing.assert_close(both.students.table()[:1], alone.students.table())
    assert not torch.equal(*both.students.table())


def test_a_student_says_what_its_table_says():
    students = Students(range(2), steps=3, vocab=5, hidden=4)
    last = torch.tensor([[0, 4, 2], [3, 3, 1]])
    table = students.table()
    said = students.say(1, last, last)
    for student, text in itertools.product(range(2), range(3)):
        torch.testing.assert_close(said[student, text], table[student, 1, last[student, text]])


@pytest.fixture(scope="module")
def measured():
    """Small students of the methods that the claims below compare, four seeds."""
    config = StudyConfig(seeds=4, steps=150, texts=300)
    world = make_world(config.world)
    texts = teacher_texts(config, world)
    found, reference = {}, None
    for name in (REFERENCE, "hard", "soft", "confidence"):
        lesson = teach(config, world, STUDIED[name], 16, texts)
        exact = examine(world, lesson.students.table())
        reference = reference or exact
        assert discrepancy(exact) < 1e-10
        assert lesson.losses[-1] < 0.5 * lesson.losses[0]
        found[name] = measure(exact, reference)
    return found


ROBUST = (
    "At bridges",
    "In gardens",
    "On the teacher's",
    "The hybrid has less exposure bias than s",
)


@pytest.mark.parametrize(
    "claim", [c for c in CLAIMS if c.text.startswith(ROBUST)], ids=lambda c: c.text
)
def test_robust_claims_hold_for_every_seed(claim, measured):
    finding = judge(claim, 16, measured)
    assert finding.wins == 1 and finding.verdict == "holds"


def test_bias_is_shared_out_among_kinds(measured):
    for values in measured.values():
        parts = sum(values[f"bias_{kind}"] for kind in ("bridge", "garden", "plain"))
        torch.testing.assert_close(parts, values["bias"])


def test_interval_covers_the_mean():
    values = torch.tensor([1.0, 2.0, 3.0, 6.0])
    interval = Interval.of(values)
    assert interval.mean == 3 and 1 <= interval.low < 3 < interval.high <= 6
    assert interval == Interval.of(values)


@pytest.mark.parametrize(
    "name, value", [("steps", 8), ("garden_choices", 3), ("bridge_choices", 64), ("slip", 0)]
)
def test_impossible_worlds_are_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must"):
        WorldConfig(**{name: value})


def test_texts_are_reproducible():
    world = make_world(TINY)
    one, two = (write(world, lambda t, last, c: world.teacher[t, c], (3,), 5) for _ in range(2))
    assert torch.equal(one.tokens, two.tokens)


# ---- the command line


def invoke(*arguments):
    return CliRunner(env={"COLUMNS": "160", "TERM": "dumb"}).invoke(
        app, ["study", *map(str, arguments)]
    )


def test_quick_study_end_to_end(tmp_path):
    config = tmp_path / "study.yaml"
    config.write_text("steps: 99\ntexts: 20\nsizes: '4,6'\n")
    result = invoke("--quick", "--config", config, "--steps", 4, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "What is claimed" in result.output and "bootstrap" in result.output
    found = json.loads((tmp_path / "out" / "study.json").read_text())
    assert (found["config"]["steps"], found["config"]["texts"]) == (4, 20), "the option given wins"
    assert found["identity"] < 1e-10 and found["on_policy_cost"] > 0
    assert set(found["students"]) == {"4", "6"} and set(found["students"]["4"]) == set(STUDIED)
    assert (tmp_path / "out" / "study.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--sizes", "8,x"), "--sizes must be positive numbers"),
        (("--length", 5), "`steps` must hold 5 bridges and 4 gardens"),
    ],
)
def test_errors_are_one_message(arguments, message):
    result = invoke("--quick", *arguments)
    assert result.exit_code == 1 and message in result.output and "Traceback" not in result.output


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.yaml", "step: 3", "names 'step', which is no option of `study`"),
        ("a.json", "{", "cannot be read"),
        ("a.yaml", "- 1", "must be a mapping"),
        ("a.yaml", "a: [", "cannot be read"),
    ],
)
def test_bad_config_files_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    result = invoke("--config", tmp_path / name)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
