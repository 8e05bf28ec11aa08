"""Marks: shares of right solutions, and where and how the wrong ones go wrong."""

from __future__ import annotations

import math

import pytest
import torch

from bgkernels.training import marks
from bgkernels.training.config import ModelShape
from bgkernels.training.errors import OptionError
from bgkernels.training.marks import Marks, describe, entropy_of_wording, examine, finite
from bgkernels.training.models import small_llama
from bgkernels.training.tasks import STOP, Verdict, find

RIGHT = Verdict(True, choices=(("verb", 0), ("stop", 1)))


def test_measures_are_shares_of_what_they_say() -> None:
    bridge, garden = (Verdict(False, slip, kind) for slip, kind in ((4, "bridge"), (10, "garden")))
    found = Marks(((RIGHT, bridge), (garden, garden), (RIGHT, RIGHT)), (RIGHT, bridge, RIGHT))
    measures = found.measures()
    assert measures["right"] == 3 / 6 and measures["greedy"] == 2 / 3
    assert measures["passed"] == 2 / 3 and measures["slip"] == (4 + 10 + 10) / 3
    assert measures["wrong_bridge"] == 1 / 6 and measures["wrong_garden"] == 2 / 6
    assert "50.0%" in describe(measures)


def test_a_mean_over_nothing_is_no_number() -> None:
    measures = Marks(((RIGHT,),), (RIGHT,)).measures()
    assert math.isnan(measures["slip"]) and finite(measures)["slip"] is None


def test_entropy_of_wording_is_that_of_each_garden_weighed_by_its_choices() -> None:
    said = [("verb", 0), ("verb", 1), ("verb", 2), ("verb", 3), ("stop", 0), ("stop", 0)]
    verdicts = [Verdict(True, choices=(choice,)) for choice in said]
    assert entropy_of_wording(verdicts) == pytest.approx(4 * math.log(4) / 6)
    assert entropy_of_wording([]) == 0


def test_examine_reads_what_a_model_says(monkeypatch) -> None:
    """A model that solves all problems when greedy, and but the first sample of each otherwise."""
    task = find("arithmetic", terms=3)
    problems = task.problems("test", 5, seed=0)
    model = small_llama(ModelShape(16, 1, 1), len(task.tokenizer), 60, seed=0)
    asked = []

    def speak(model, prompts, length, vocab, seed, *, temperature, stop):
        asked.append((len(prompts), temperature))
        rows = []
        for number, prompt in enumerate(prompts.tolist()):
            text = task.tokenizer.decode(prompt).replace(task.tokenizer.pad_token, "")
            problem = next(x for x in problems if x.prompt == text)
            said = task.tokenizer.encode(task.solve(problem, number))
            if temperature and number % 3 == 0:
                said[-1] = said[-1] % 10 + 2  # another digit at the end
            rows.append(said + [STOP] * (length - len(said)))
        return torch.tensor(rows)

    monkeypatch.setattr(marks, "generate", speak)
    found = examine(model, task, problems, samples=3, seed=0)
    measures = found.measures()
    assert asked == [(15, 1.0), (5, 0.0)]
    assert measures["greedy"] == measures["passed"] == 1.0
    assert measures["right"] == pytest.approx(2 / 3) and measures["wrong_bridge"] == 1 / 3
    assert [len(x) for x in found.sampled] == [3] * 5


def test_a_model_of_too_few_tokens_is_refused() -> None:
    task = find("arithmetic")
    model = small_llama(ModelShape(16, 1, 1), 20, 60, seed=0)
    with pytest.raises(OptionError, match="needs a vocabulary of 49 tokens; the model has 20"):
        examine(model, task, task.problems("test", 1, seed=0))


def test_samples_are_those_of_the_seed() -> None:
    task = find("programs", steps=1)
    problems = task.problems("test", 3, seed=0)
    model = small_llama(ModelShape(16, 1, 1), len(task.tokenizer), 60, seed=0)
    model.freeze()
    one, same, other = (
        marks.write_solutions(model, task, problems, samples=2, seed=seed) for seed in (1, 1, 2)
    )
    assert one == same != other and one[0][0] != one[0][1]
