"""The comparison by accuracy: rows that can be reproduced, rates by validation, claims by seed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from bgkernels.training import distill
from bgkernels.training.accuracy import report, rows, school
from bgkernels.training.accuracy.claims import CLAIMS, HYBRIDS
from bgkernels.training.accuracy.config import FEW, METHODS, AccuracyConfig, Setting
from bgkernels.training.accuracy.run import run_accuracy
from bgkernels.training.claims import Claim, judge
from bgkernels.training.cli import app
from bgkernels.training.config import ModelShape, TrainConfig
from bgkernels.training.methods import find
from bgkernels.training.report import markdown
from bgkernels.training.tokens import IGNORED, Batch

TASK = "arithmetic:terms=2,digits=2"
WAYS = ("hard", "soft", "sequence", "threshold+argmax", "on-policy")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Too small to learn, large enough to run every line."""
    lesson = TrainConfig(4, 1e-2, validate_every=4, checkpoint_every=4)
    shape = ModelShape(16, 1, 2)
    return AccuracyConfig(
        output=tmp_path_factory.mktemp("accuracy"), task=TASK,
        teacher_shape=shape, teacher_training=lesson, teacher_texts=80, schooling=lesson,
        schooling_texts=64, settings=(Setting("tiny", shape, 48, WAYS),), seeds=2,
        rates=(1e-3, 1e-2), steps=4, batch=8, problems=6, samples=2, windows=4,
    )  # fmt: skip


@pytest.fixture(scope="module")
def result(config):
    return run_accuracy(config)


def test_every_method_has_every_rate_once_and_the_chosen_one_for_every_seed(result) -> None:
    for method in WAYS:
        mine = [r for r in result.rows if r.method == method]
        assert sorted((r.rate, r.seed) for r in mine if r.seed == 0) == [(1e-3, 0), (1e-2, 0)]
        tried = {r.rate: r.validation for r in mine if r.seed == 0}
        assert tried[result.rates["tiny"][method]] == max(tried.values())
        assert [r.seed for r in result.chosen("tiny", method)] == [0, 1]


def test_rows_come_again_to_the_last_digit(result, config, tmp_path) -> None:
    """Made anew, elsewhere, after others or alone."""
    few = replace(config.settings[0], methods=("sequence", "threshold+argmax", "on-policy"))
    again = run_accuracy(replace(config, settings=(few,), output=tmp_path))
    known = [r.numbers for r in result.rows if r.method in few.methods]
    assert sorted(map(repr, known)) == sorted(repr(r.numbers) for r in again.rows)
    chosen = result.chosen("tiny", "on-policy")[1]
    teacher = school.appoint(config, school.Silent())
    alone = school.Class(school.School(config, config.settings[0], teacher), seed=1)
    row = rows.make_row(alone, "on-policy", chosen.rate, school.Silent())
    assert row.numbers == chosen.numbers


def test_rows_that_are_there_are_not_made_again(result, config, monkeypatch) -> None:
    def never(*arguments):
        raise AssertionError("a student was trained again")

    monkeypatch.setattr(rows, "make_row", never)
    assert run_accuracy(config).rows == result.rows


def test_other_configurations_are_other_rows(config) -> None:
    teacher = school.appoint(config, school.Silent())

    def identity(config):
        pupils = school.Class(school.School(config, config.settings[0], teacher), seed=0)
        return rows._file(pupils, "soft", 1e-3)[1]

    assert identity(config) == identity(replace(config, output=config.output / "elsewhere"))
    others = ({"steps": 5}, {"samples": 3}, {"schooling_texts": 65}, {"task": "arithmetic"})
    assert len({identity(replace(config, **other)) for other in ({}, *others)}) == 5


def test_students_of_a_seed_start_alike_and_differ_between_seeds(result, config) -> None:
    teacher = school.appoint(config, school.Silent())
    place = school.School(config, config.settings[0], teacher)
    first, again, second = (school.Class(place, seed) for seed in (0, 0, 1))
    assert first.start.digest == again.start.digest != second.start.digest
    one, same, other = (x.materials.batches[2].tokens for x in (first, again, second))
    assert torch.equal(one, same) and not torch.equal(one, other)
    said = {x.problem.prompt for x in place.corpus.train}
    assert said == {x.problem.prompt for x in place.dictated[0].train}
    assert place.corpus.train != place.dictated[0].train


def test_the_costs_tell_who_writes(result) -> None:
    costs = result.costs["tiny"]
    assert all(0 <= writing <= seconds for seconds, writing in costs.values())
    assert costs["on-policy"][1] > 0.2 * costs["on-policy"][0]
    assert costs["soft"][1] < 0.1 * costs["soft"][0]


def test_findings_are_paired_by_seed_and_have_a_margin() -> None:
    scores = {"one": torch.tensor([0.5, 0.6, 0.9]), "two": torch.tensor([0.51, 0.61, 0.91])}
    measured = {name: {"right": values} for name, values in scores.items()}
    more, as_much = (
        Claim("one is right as often", "right", "one", "two", larger=True, margin=margin)
        for margin in (0.0, 0.02)
    )
    assert judge(more, "all", measured).verdict == "fails"
    found = judge(as_much, "all", measured)
    assert found.verdict == "holds" and found.difference.mean == pytest.approx(-0.01, rel=1e-5)


def test_claims_are_about_methods_that_there_are(result) -> None:
    for claim in CLAIMS:
        find(claim.better), find(claim.worse)
        assert {claim.better, claim.worse} <= set(METHODS)
        assert claim.measure in result.rows[0].measures
    assert len({claim.text for claim in CLAIMS}) == len(CLAIMS)
    assert set(FEW) <= set(METHODS) and all(f"{x}+reverse+argmax" in FEW for x in HYBRIDS)


def test_the_tables_have_every_student_and_claim(result) -> None:
    text = markdown(report.table(result), report.findings(result), report.costs(result))
    assert all(find(method).title in text for method in WAYS)
    judged = [f for f in result.findings() if f.group == "tiny"]
    assert judged and all(f.claim.text in text for f in judged)
    json.dumps(result.plain(), allow_nan=False)


def test_nothing_after_the_end_is_learnt() -> None:
    tokens = torch.tensor([[5, 6, 7, 0, 0, 9], [5, 6, 7, 8, 9, 4]])
    labels = Batch.of(tokens).after(2).until(0).labels
    assert labels.tolist() == [[IGNORED, 7, 0, IGNORED, IGNORED], [IGNORED, 7, 8, 9, 4]]
    assert Batch.of(tokens).until(None).labels.tolist() == tokens[:, 1:].tolist()


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["train", "--task", "sums"], "a task must be one of arithmetic, programs; got 'sums'"),
        (["train", "--task", "arithmetic", "--corpus", "x"], "--corpus has no effect on --task"),
        (["distill", "--task", "arithmetic", "--sequence-length", "32"], "--sequence-length"),
        (["compare", "--task", "arithmetic", "--steps", "3"], "--steps has no effect on --task"),
        (["compare", "--task", "arithmetic:terms=x"], "from 2 to 100; got 'x'"),
        (["distill", "--method", "soft+loud"], "may be followed by +argmax, +reverse, +t2"),
    ],
)
def test_what_does_not_fit_a_task_is_named(arguments, expected, tmp_path) -> None:
    done = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path)])
    assert done.exit_code == 1 and expected in " ".join(done.output.split())


def test_commands_train_distil_and_analyze_a_task(tmp_path) -> None:
    run = CliRunner()
    few = ["--texts", "40", "--steps", "2", "--batch-size", "4"]
    done = run.invoke(app, ["train", "--task", TASK, *few, "--output", str(tmp_path / "a")])
    assert "of the sampled solutions are right" in " ".join(done.output.split()), done.output
    teacher = str(tmp_path / "a" / "model")
    done = run.invoke(
        app, ["distill", "--task", TASK, *few, "--method", "threshold+argmax", "--teacher", teacher,
              "--output", str(tmp_path / "b")],
    )  # fmt: skip
    assert "right, greedy" in done.output, done.output
    found = json.loads((tmp_path / "b" / "results.json").read_text())
    assert set(found["students"]["threshold+argmax"]["marks"]) >= {"right", "wrong_bridge"}
    student = str(tmp_path / "b" / "models" / "threshold+argmax")
    done = run.invoke(
        app, ["analyze", "--task", TASK, "--teacher", teacher, "--student", student, "--windows",
              "4", "--rollouts", "0", "--output", str(tmp_path / "c")],
    )  # fmt: skip
    assert "first go wrong at a bridge" in " ".join(done.output.split()), done.output


def test_compare_leaves_its_tables(config, monkeypatch, tmp_path) -> None:
    small = replace(config, settings=(replace(config.settings[0], methods=("hard", "soft")),))
    monkeypatch.setattr(AccuracyConfig, "of", classmethod(lambda *_: replace(small, seeds=1)))
    arguments = ["compare", "--task", TASK, "--methods", "soft", "--output", str(tmp_path)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "accuracy.json").read_text())
    assert {row["method"] for row in found["rows"]} == {"soft"}
    assert "soft-only" in (tmp_path / "accuracy.md").read_text()


def test_one_distillation_has_one_loop() -> None:
    assert school.train_student is distill.train_student
