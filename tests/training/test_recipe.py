"""The recipe: a miniature of it through all stages, stopped and resumed; its parts one by one."""

from __future__ import annotations

import json
import math
import signal
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from bgkernels.training.cli import app
from bgkernels.training.commands.recipe import configured
from bgkernels.training.commands.shared import read_options
from bgkernels.training.config import ModelShape, plain
from bgkernels.training.errors import CheckpointError, CorpusError, Interrupted, OptionError
from bgkernels.training.models import small_llama
from bgkernels.training.preference import Preference, sequence_log_probs
from bgkernels.training.pruning import Shape
from bgkernels.training.recipe import STAGES, RecipeConfig, RecipeResult, report, run, run_recipe
from bgkernels.training.recipe.attempts import by_checker, by_likelihood, ended
from bgkernels.training.recipe.exam import Standing
from bgkernels.training.recipe.lessons import Lesson, LessonBatches, batch_of
from bgkernels.training.recipe.prefer import pairs
from bgkernels.training.report import markdown
from bgkernels.training.tokens import train_tokenizer
from tests.training.signals import Signals

QUICK = RecipeConfig.quick()


def numbers(result):
    """The marks of each stage, but for how long it took."""
    timed = ("seconds", "processor_seconds")
    return {
        name: {k: v for k, v in asdict(marks).items() if k not in timed}
        for name, marks in result.marks.items()
    }


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    """The quick recipe, run at once."""
    return run_recipe(replace(QUICK, output=tmp_path_factory.mktemp("recipe")))


def test_every_stage_leaves_a_model_and_its_marks(miniature):
    marks, folder = miniature.marks, miniature.config.output
    assert list(marks) == list(STAGES)
    assert marks["pruned"].parameters < marks["teacher"].parameters
    assert {marks[name].parameters for name in [*STAGES][2:]} == {marks["pruned"].parameters}
    assert marks["finetuned"].cross_entropy < marks["pruned"].cross_entropy
    assert marks["rejection"].notes == {"answers learnt": QUICK.problems}  # its judge takes all
    assert 0 < marks["preference"].notes["pairs"] <= QUICK.problems * QUICK.samples // 2
    saved = json.loads((folder / "recipe.json").read_text())
    assert saved["stages"]["preference"]["cross_entropy"] == marks["preference"].cross_entropy
    assert saved["config"]["judge"] == "likelihood"
    assert (folder / "model" / "model.safetensors").exists()


def test_killed_between_stages_it_goes_on_to_the_same_numbers(miniature, tmp_path, monkeypatch):
    config = replace(QUICK, output=tmp_path)

    def dies(recipe):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(run.STAGES, "rejection", run.STAGES["rejection"]._replace(make=dies))
        with pytest.raises(KeyboardInterrupt):
            run_recipe(config)
    logs = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("step-*.pt")}
    assert {p.parent.name for p in logs} >= {"teacher", "finetuned"}
    assert numbers(run_recipe(config)) == numbers(miniature)
    assert {p: p.stat().st_mtime_ns for p in logs} == logs  # nothing was done twice


def test_stopped_in_a_stage_it_goes_on_to_the_same_numbers(miniature, tmp_path):
    config = replace(QUICK, output=tmp_path)
    with pytest.raises(Interrupted, match="stopped by SIGTERM in teacher at step 3"):
        run_recipe(config, Signals(2, signal.SIGTERM))
    assert numbers(run_recipe(config)) == numbers(miniature)


def test_another_configuration_does_not_go_on(miniature):
    with pytest.raises(CheckpointError, match=r"beta is 0\.5 there and 0\.3 here"):
        run_recipe(replace(miniature.config, beta=0.3))


def test_the_command_prints_every_stage(tmp_path):
    options = ["--quick", "--output", str(tmp_path), "--preference-steps", "2"]
    done = CliRunner().invoke(app, ["recipe", *options], env={"COLUMNS": "100"})
    assert done.exit_code == 0, done.output
    assert all(stage.title in done.output for stage in STAGES.values())
    saved = json.loads((tmp_path / "recipe.json").read_text())
    assert saved["config"]["preference"]["steps"] == 2
    assert (tmp_path / "recipe.md").read_text().count("%") >= 2 * len(STAGES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "geometry"}, "a task must be one of arithmetic, programs"),
        ({"judge": "nobody"}, "--judge must be checker or likelihood; got 'nobody'"),
        ({"samples": 1}, "--samples must be at least 2; got 1"),
        ({"examined": 0}, "--examined must be at least 1; got 0"),
        ({"corpus": Path("notes")}, "--corpus needs --teacher"),
        ({"beta": 0.0}, "--beta must be positive"),
        ({"student": Shape(3, 1, 32)}, "--layers must be between 1 and the model's 2; got 3"),
    ],
)
def test_bad_options_are_refused_by_name(changes, message, tmp_path):
    with pytest.raises(OptionError, match=message):
        run_recipe(replace(QUICK, output=tmp_path, **changes))


LESSONS = [Lesson((5, 6), (7, 8, 0)), Lesson((9,), (10, 0)), Lesson((5,), (11, 12, 13, 0))]


def test_batches_have_the_chosen_answers_first():
    groups = [(a, b) for a in LESSONS for b in LESSONS if a != b]
    batches = LessonBatches(groups, 2, seed=0)
    seen = []
    for number in range(3):
        tokens = batches[number].tokens
        rows = [tuple(row[row != 0].tolist()) for row in tokens]
        seen += zip(rows[:2], rows[2:], strict=True)
    whole = {x: tuple(t for t in x.prompt + x.answer if t) for x in LESSONS}
    assert sorted(seen) == sorted((whole[a], whole[b]) for a, b in groups)
    with pytest.raises(CorpusError, match="a batch needs 9 answers or pairs of them, and there"):
        LessonBatches(groups, 9, seed=0)


def test_problems_are_learnt_where_they_should_be():
    answers, everything = (batch_of(LESSONS, prompts=p) for p in (False, True))
    assert torch.equal(answers.tokens, everything.tokens)
    assert answers.items == sum(len(x.answer) for x in LESSONS)
    assert everything.items == sum(len(x) - 1 for x in LESSONS)


def test_pairs_take_the_best_and_the_worst_while_they_differ():
    a, b, c, d = (Lesson((1,), (n,)) for n in range(4))
    wrong = -math.inf
    assert pairs([(0.0, a), (0.0, b), (0.0, c), (wrong, d)]) == [(a, d)]
    assert pairs([(0.0, a), (0.0, b), (wrong, c), (wrong, d)]) == [(a, d), (b, c)]
    assert pairs([(-1.0, a), (-2.0, b), (-2.0, c), (-3.0, d)]) == [(a, d)]
    assert pairs([(wrong, a), (wrong, b)]) == []


@pytest.fixture(scope="module")
def recipe():
    """A recipe whose teacher has random weights."""
    made = run.begun(QUICK, run.Silent())
    vocab = len(made.room.tokenizer)
    made.models["teacher"] = small_llama(ModelShape(16, 1, 2), vocab, 64, seed=3)
    return made


def test_the_checker_takes_right_answers_that_end(recipe):
    problem, other = recipe.room.task.problems("test", 2, seed=0)
    right, wrong = (recipe.room.lessons([p], seed=1)[0] for p in (problem, other))
    endless = Lesson(right.prompt, right.answer[:-1])
    scores = by_checker(recipe, problem, [right, wrong, endless])
    assert scores == [0.0, -math.inf, -math.inf]
    assert ended(torch.tensor([*right.answer, 5]), recipe.room.end) == right.answer


def dense(model, batch):
    """Sums of the labels' log-probabilities, from whole log-softmaxes in fp64."""
    logits = model.network.double()(input_ids=batch.tokens[:, :-1]).logits
    known = batch.labels != -100
    picked = logits.log_softmax(-1).gather(-1, batch.labels.clamp_min(0)[..., None])[..., 0]
    return torch.where(known, picked, 0.0).sum(-1)


def test_the_likelihood_is_the_teachers_mean_of_a_token(recipe):
    answers = recipe.room.lessons(recipe.room.task.problems("test", 3, seed=0), seed=1)
    found = by_likelihood(recipe, None, answers)
    total = dense(recipe.models["teacher"].clone(), batch_of(answers))
    expected = total / torch.tensor([len(x.answer) for x in answers])
    torch.testing.assert_close(torch.tensor(found), expected.float(), rtol=1e-5, atol=0)


def test_preference_is_dpo_and_some_cross_entropy():
    policy, reference = (small_llama(ModelShape(16, 1, 2), 20, 16, seed) for seed in (0, 1))
    batch = batch_of([*LESSONS, *reversed(LESSONS)])
    loss = Preference(policy, reference, beta=0.5, hard_weight=0.3, accumulate=2)
    value = loss(batch, 0, torch.tensor(1))
    value.backward()
    ours = policy.head.weight.grad.clone()
    gain = dense(policy, batch) - dense(reference, batch).detach()
    margins = 0.5 * (gain[:3] - gain[3:])
    tokens = sum(len(x.answer) for x in LESSONS)
    hard = -dense(policy, batch)[:3].sum() / tokens
    expected = (torch.nn.functional.softplus(-margins).mean() + 0.3 * hard) / 2
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    policy.network.zero_grad()
    expected.backward()
    torch.testing.assert_close(ours.double(), policy.head.weight.grad, rtol=1e-4, atol=1e-6)


def test_log_probs_are_of_the_labels_alone():
    model = small_llama(ModelShape(16, 1, 2), 20, 16, seed=0)
    batch = batch_of(LESSONS)
    found = sequence_log_probs(model, batch)
    torch.testing.assert_close(found, dense(model, batch), rtol=1e-5, atol=0)


def test_the_full_size_has_the_same_keys():
    """What the command reads of its options, and what the file of Llama 3.2 says, are the same."""
    path = Path(__file__).parents[2] / "examples" / "llama-3.2" / "recipe.yaml"
    (command,) = [c for c in typer.main.get_command(app).commands.values() if c.name == "recipe"]
    here = {"config_file", "resume", "quick", "seed", "device"}
    assert set(read_options(path)) == {p.name for p in command.params} - here
    options = {p.name: None for p in command.params} | read_options(path)
    config = configured(RecipeConfig(), options | {"resume": True})
    assert config.student == Shape(16, 8, 8192) and config.pretraining.accumulate == 64
    assert config.loss.memory_budget == 2**31 and config.second_teacher.endswith("70B")


def test_the_page_shows_the_result_that_is_kept():
    """Its table is of the file beside it, and that of the default configuration."""
    docs = Path(__file__).parents[2] / "docs"
    saved = json.loads((docs / "recipe.json").read_text(encoding="utf-8"))
    assert saved["config"] == plain(RecipeConfig())
    names = [f.name for f in fields(Standing)]
    marks = {k: Standing(**{n: v[n] for n in names}) for k, v in saved["stages"].items()}
    assert list(marks) == list(STAGES)
    table = markdown(report.table(RecipeResult(RecipeConfig(), marks)))
    assert table.rstrip("\n") in (docs / "recipe.md").read_text(encoding="utf-8")
    assert saved["processor_seconds"] < 900


@pytest.mark.slow
def test_pre_training_reads_a_corpus(tmp_path):
    """With teachers that read any text, stage 3 learns from files instead of the lessons."""
    words = train_tokenizer([Path(__file__).read_text(encoding="utf-8")], 300)
    for name, width in (("teacher", 32), ("second", 16)):
        model = small_llama(ModelShape(width, 2, 2), len(words), 64, 0)
        model.network.save_pretrained(tmp_path / name)
        words.save_pretrained(tmp_path / name)
    notes = tmp_path / "notes"
    notes.mkdir()
    for i in range(3):
        (notes / f"{i}.txt").write_text(f"the {i}th note of the corpus, and a few words. " * 40)
    config = replace(
        QUICK,
        teacher=str(tmp_path / "teacher"),
        second_teacher=str(tmp_path / "second"),
        corpus=notes,
        sequence_length=48,
        output=tmp_path / "run",
    )
    marks = run_recipe(config).marks
    assert marks["pretrained"].parameters == marks["pruned"].parameters
    changed = replace(config, corpus=tmp_path / "nowhere")
    with pytest.raises(CorpusError, match="is not a folder"):
        run_recipe(changed)
