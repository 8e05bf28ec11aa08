"""Tasks: problems that never cross a split, solutions that are right, verdicts that say why not."""

from __future__ import annotations

import re

import pytest

from bgkernels.training.config import DataConfig, DemoConfig
from bgkernels.training.corpus import load_corpus
from bgkernels.training.errors import CorpusError, OptionError
from bgkernels.training.materials import prepare
from bgkernels.training.tasks import STOP, TASKS, Exercise, find, fitted, parse
from bgkernels.training.tasks.arithmetic import canonical
from bgkernels.training.tasks.programs import Step
from bgkernels.training.tokens import IGNORED

KNOBS = {
    "arithmetic": ["arithmetic", "arithmetic:terms=6,digits=1,operations=+-*%,largest=200"],
    "programs": ["programs", "programs:steps=1", "programs:loops=0,conditions=0"],
}
CASES = [text for texts in KNOBS.values() for text in texts]


@pytest.fixture(params=CASES)
def task(request):
    return parse(request.param)


def evaluated(prompt: str) -> int:
    """A chain worked out from its prompt alone."""
    first, *links = re.findall(r"[-+*%]?\d+", prompt)
    total = int(first)
    for link in links:
        number = int(link[1:])
        match link[0]:
            case "+":
                total += number
            case "-":
                total -= number
            case "*":
                total *= number
            case "%":
                total %= number
    return total


def test_solutions_are_right_and_their_first_wrong_token_is_found(task) -> None:
    for seed, problem in enumerate(task.problems("train", 30, seed=3)):
        text = task.solve(problem, seed)
        verdict = task.check(problem, text)
        assert verdict.right and verdict.slip is None and verdict.choices
        tokens = task.cut(text)
        assert "".join(tokens) == text
        # the end is missing: the place is that of the end, and all choices stand before it
        cut_short = task.check(problem, "".join(tokens[:-1]))
        assert not cut_short.right or task.name == "arithmetic"
        if not cut_short.right:
            assert (cut_short.slip, cut_short.kind) == (len(tokens) - 1, "bridge")
            assert cut_short.choices == verdict.choices


@pytest.mark.parametrize("place", [0, 1, 4])
def test_a_foreign_token_is_the_first_wrong_one(task, place) -> None:
    problem = task.problems("train", 1, seed=0)[0]
    tokens = task.cut(task.solve(problem, 0))
    wrong = "".join([*tokens[:place], "€"])
    verdict = task.check(problem, wrong)
    assert not verdict.right and verdict.slip == place
    garden = task.check(problem, "".join(tokens[: place + 1])).choices
    before = task.check(problem, "".join(tokens[:place])).choices
    assert verdict.kind == ("garden" if len(garden) > len(before) else "bridge")


def test_wording_varies_with_the_seed_alone(task) -> None:
    problem = task.problems("train", 1, seed=0)[0]
    texts = [task.solve(problem, seed) for seed in range(12)]
    assert texts == [task.solve(problem, seed) for seed in range(12)]
    assert len(set(texts)) > 6


def test_no_problem_is_in_two_splits(task) -> None:
    keys = {
        split: {x.key for x in task.problems(split, 20, seed=seed)}
        for seed, split in enumerate(("train", "validation", "test"))
    }
    assert all(len(found) == 20 for found in keys.values())
    assert not keys["train"] & keys["test"] and not keys["train"] & keys["validation"]
    assert not keys["validation"] & keys["test"]
    again = task.problems("test", 20, seed=2)
    assert [x.prompt for x in again] == [x.prompt for x in task.problems("test", 20, seed=2)]


def test_a_problem_in_other_words_is_the_same_problem() -> None:
    assert canonical(4, [("+", 3), ("-", 2), ("*", 5)]) == canonical(
        3, [("-", 2), ("+", 4), ("*", 5)]
    )
    assert canonical(4, [("*", 3), ("+", 2)]) != canonical(4, [("+", 2), ("*", 3)])
    programs = find("programs")
    keys = set()
    for steps in ([Step("+", "3"), Step("+", "4")], [Step("+", "4"), Step("+", "3")]):
        keys |= {p.key for p in [programs.specified(tuple(steps))]}
    assert len(keys) == 1


def test_answers_are_those_of_the_prompt() -> None:
    for operations in ("+", "+-*%"):
        task = find("arithmetic", operations=operations, terms=5, digits=1)
        for problem in task.problems("test", 25, seed=1):
            total = evaluated(problem.prompt)
            assert 0 <= total <= task.largest
            assert task.right(problem, f"anything, then {total}")
            assert not task.right(problem, f"{total}, then {total + 1}")


def test_any_right_program_is_right_and_no_other() -> None:
    task = find("programs")
    problem = task.specified((Step("*", "b", above=3), Step("+", "2", repeat=4)))
    assert problem.prompt == "a, if above 3 times b, 4 times over plus 2\n"
    assert task.right(problem, "if not a <= 3: a = b * a\nprint(8 + a)")
    loop = "while k < 4:\n  k += 1\n  z += 2"
    assert task.right(problem, f"k = 0\nz = a\nif z > 3: z *= b\n{loop}\nprint(z)")
    for wrong in ("print(a)", "if a > 2: a = b * a\nprint(8 + a)", "print(7)", "print(a", "",
                  "while 1: pass", "x = a\nprint(x)\nprint(x)", "import os"):  # fmt: skip
        assert not task.right(problem, wrong), wrong


def test_texts_fit_their_room_and_tell_what_is_learnt(task) -> None:
    given, room = task.room
    tokenizer = task.tokenizer
    for problem in task.problems("train", 40, seed=5):
        solution = task.solve(problem, 1)
        tokens, learnt = Exercise(task, problem, solution).encode(tokenizer)
        assert len(tokens) == len(learnt) == given + room
        said = [token for token, counts in zip(tokens, learnt, strict=True) if counts]
        assert said.pop() == STOP == tokenizer.eos_token_id
        assert tokenizer.decode(said) == solution
        assert tokenizer.decode(tokens[:given]).replace(tokenizer.pad_token, "") == problem.prompt
    with pytest.raises(CorpusError, match="at most"):
        Exercise(task, problem, solution * 9).encode(tokenizer)


@pytest.mark.parametrize("name", TASKS)
def test_a_sequence_of_a_batch_is_one_text(name) -> None:
    config = fitted(DemoConfig(data=DataConfig(task=name, texts=20, batch_size=4)))
    materials = prepare(config, load_corpus(config.data))
    task, tokenizer = find(name), materials.tokenizer
    given, room = task.room
    batch = materials.batches[3]
    assert batch.tokens.shape == (4, given + room + 2) and materials.exam.start == given
    for tokens, labels in zip(batch.tokens, batch.labels, strict=True):
        prompt = tokenizer.decode(tokens[:given].tolist()).replace(tokenizer.pad_token, "")
        said = labels[labels != IGNORED].tolist()
        assert said[-1] == STOP and STOP not in said[:-1]
        problems = {x.problem.prompt: x.problem for x in load_corpus(config.data).train}
        assert task.right(problems[prompt], tokenizer.decode(said[:-1]))


@pytest.mark.parametrize(
    "text, message",
    [
        ("algebra", "must be one of arithmetic, programs; got 'algebra'"),
        ("arithmetic:depth=3", "no parameter 'depth'; it has terms"),
        ("arithmetic:terms", "name:parameter=value"),
        ("arithmetic:terms=1", "from 2 to 100; got 1"),
        ("arithmetic:terms=many", "got 'many'"),
        ("arithmetic:operations=+^", "must be some of"),
        ("programs:steps=0", "from 1 to 20; got 0"),
    ],
)
def test_a_task_that_cannot_be_is_named(text, message) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        parse(text)


def test_what_a_task_has_not_is_named() -> None:
    small = find("arithmetic", terms=2, digits=1)
    with pytest.raises(OptionError, match="too few problems"):
        small.problems("train", 10_000, seed=0)
    with pytest.raises(OptionError, match="a split must be one of train"):
        small.problems("dev", 1, seed=0)
    with pytest.raises(OptionError, match="needs a vocabulary of 49 tokens; the model has 30"):
        small.check_vocabulary(30)
