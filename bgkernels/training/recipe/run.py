"""The recipe: its stages in order, each a model and its marks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from bgkernels.training import models
from bgkernels.training.config import DataConfig, DemoConfig, plain
from bgkernels.training.corpus import load_corpus
from bgkernels.training.errors import ModelError
from bgkernels.training.files import write_json
from bgkernels.training.machine import machine
from bgkernels.training.materials import named_models
from bgkernels.training.progress import Display, Silent
from bgkernels.training.recipe.base import Outcome, Recipe
from bgkernels.training.recipe.config import RecipeConfig
from bgkernels.training.recipe.exam import Standing, error, examine_stage
from bgkernels.training.recipe.finetune import finetune
from bgkernels.training.recipe.lessons import Classroom
from bgkernels.training.recipe.prefer import prefer
from bgkernels.training.recipe.pretrain import pretrain
from bgkernels.training.recipe.prune import prune
from bgkernels.training.recipe.reject import reject
from bgkernels.training.recipe.teachers import teach, teach_second
from bgkernels.training.tasks import parse


class Stage(NamedTuple):
    """A step of the recipe: its title, and the function that makes its model."""

    title: str
    make: Callable[[Recipe], Outcome]


STAGES = {
    "teacher": Stage("teacher", teach),
    "second-teacher": Stage("second teacher", teach_second),
    "pruned": Stage("pruning", prune),
    "pretrained": Stage("pre-training", pretrain),
    "finetuned": Stage("fine-tuning", finetune),
    "rejection": Stage("rejection sampling", reject),
    "preference": Stage("DPO", prefer),
}
"""By the names of their models; the two teachers are one stage."""


@dataclass(frozen=True)
class RecipeResult:
    """What came out.

    Args:
        config: what was asked.
        marks: standing of the model of each stage.
    """

    config: RecipeConfig
    marks: dict[str, Standing]

    def plain(self) -> dict[str, Any]:
        """Values for JSON."""
        examined = self.config.examined
        return {
            "config": plain(self.config),
            "machine": machine(),
            "stages": {
                name: asdict(marks)
                | {"title": STAGES[name].title}
                | {f"{x}_error": error(getattr(marks, x), examined) for x in ("sampled", "greedy")}
                for name, marks in self.marks.items()
            },
            "processor_seconds": sum(m.processor_seconds for m in self.marks.values()),
        }


def run_recipe(config: RecipeConfig, display: Display | None = None) -> RecipeResult:
    """Run the recipe, or the rest of it: what ``config.output`` holds already is not done again.

    Leaves in ``config.output`` the checkpoints of each stage, ``recipe.json``, and the last model
    in ``model/`` (loadable with ``from_pretrained``).

    Args:
        config: what to do.
        display: where to show progress; None: nowhere.

    Raises:
        TrainingError: a cause and its remedy; see :mod:`bgkernels.training.errors`.

    Example:
        >>> result = run_recipe(RecipeConfig.quick())  # doctest: +SKIP
        >>> result.marks["preference"].sampled  # doctest: +SKIP
    """
    display = display or Silent()
    with display.working("reading the task and the named models"):
        recipe = begun(config, display)
    marks: dict[str, Standing] = {}
    for name, stage in STAGES.items():
        started = time.process_time()
        outcome = stage.make(recipe)
        recipe.models[name] = outcome.model
        marks[name] = found = examine_stage(recipe, name, outcome, started)
        display.say(
            f"{stage.title}: {found.sampled:.1%} right when sampled, {found.greedy:.1%} greedy"
        )
    result = RecipeResult(config, marks)
    write_json(config.output / "recipe.json", result.plain())
    models.export(recipe.models[[*STAGES][-1]], recipe.room.tokenizer, config.output / "model")
    return result


def begun(config: RecipeConfig, display: Display) -> Recipe:
    """A recipe before its first stage: the task, in the tokens of the named models or in its own.

    Raises:
        OptionError: there is no such task.
        CorpusError: there is no such corpus.
        ModelError: a named model cannot be used, or the two do not share a tokenizer.
    """
    task = parse(config.task)
    if config.corpus is not None:
        load_corpus(DataConfig(corpus=config.corpus))  # before models that take long to load
    named = DemoConfig(
        teacher=config.teacher,
        second_teacher=config.second_teacher,
        data=DataConfig(sequence_length=sum(task.room)),
        device=config.device,
    )
    sample = "".join(task.words)
    found, tokenizers = named_models(named, sample)
    tokenizer = next(iter(tokenizers.values()), None)
    if tokenizer is not None and tokenizer.eos_token_id is None:
        raise ModelError(
            "--teacher has a tokenizer without an end-of-text token, so answers would not end; "
            "give it one: tokenizer.eos_token = ..."
        )
    return Recipe(config, Classroom(task, tokenizer or task.tokenizer), display, found)
