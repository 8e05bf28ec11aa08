"""``bgkernels recipe``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from bgkernels.training.commands import options as o
from bgkernels.training.commands.shared import ConfigFile, Console, changed, reported, typer
from bgkernels.training.config import TrainConfig
from bgkernels.training.files import write_text
from bgkernels.training.progress import Terminal
from bgkernels.training.recipe import RecipeConfig, report, run_recipe
from bgkernels.training.report import markdown
from bgkernels.training.tasks import TASKS

DEFAULTS = RecipeConfig()
STAGES, ANSWERS = "Stages", "Answers"
PHASES = {
    "teacher": "teaching",
    "pretrain": "pretraining",
    "finetune": "finetuning",
    "rejection": "rejection",
    "preference": "preference",
}
"""The stages that train, as options name them, and their fields of the configuration."""


def _number(help: str, default: float, low: float = 1, panel: str | None = None) -> Any:
    return typer.Option(min=low, help=help, show_default=f"{default:g}", rich_help_panel=panel)


def _steps(of: str, training: TrainConfig, low: int = 1) -> Any:
    return _number(f"Steps of {of}.", training.steps, low, STAGES)


def _rate(of: str, training: TrainConfig) -> Any:
    return _number(f"Highest learning rate of {of}.", training.learning_rate, 0, STAGES)


def recipe(
    config_file: ConfigFile = None,
    task: Annotated[
        str | None,
        typer.Option(
            help=f"One of {', '.join(TASKS)}, with parameters: NAME:PARAMETER=VALUE,...",
            show_default=DEFAULTS.task,
        ),
    ] = None,
    output: o.Output = None,
    resume: o.Resume = True,
    quick: o.Quick = False,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    teacher: Annotated[
        str | None,
        typer.Option(
            help="Hugging Face model, by path or name.",
            show_default="a small Llama",
            rich_help_panel=o.MODELS,
        ),
    ] = None,
    corpus: Annotated[
        Path | None,
        typer.Option(
            help="Folder or data file of text that pre-training reads; needs --teacher.",
            show_default="the lessons",
            rich_help_panel=o.TEXT,
        ),
    ] = None,
    sequence_length: o.SequenceLength = None,
    second_teacher: Annotated[
        str | None,
        typer.Option(
            help="Another one, of another size and the same tokenizer.",
            show_default="a smaller Llama",
            rich_help_panel=o.MODELS,
        ),
    ] = None,
    layers: Annotated[
        int | None,
        _number("Blocks of the teacher to keep.", DEFAULTS.student.layers, panel=o.MODELS),
    ] = None,
    heads: Annotated[
        int | None,
        _number("Key-value heads to keep in a block.", DEFAULTS.student.heads, panel=o.MODELS),
    ] = None,
    width: Annotated[
        int | None,
        _number("Feed-forward neurons to keep.", DEFAULTS.student.width, panel=o.MODELS),
    ] = None,
    lessons: Annotated[int | None, _number("Problems with solutions.", DEFAULTS.lessons)] = None,
    batch_size: Annotated[
        int | None, _number("Solutions, or pairs of answers, in a batch.", DEFAULTS.batch_size)
    ] = None,
    accumulate: o.Accumulate = None,
    teacher_steps: Annotated[
        int | None, _steps("each teacher on the task; 0: as they are", DEFAULTS.teaching, 0)
    ] = None,
    teacher_learning_rate: Annotated[float | None, _rate("the teachers", DEFAULTS.teaching)] = None,
    pretrain_steps: Annotated[
        int | None, _steps("pre-training on two teachers", DEFAULTS.pretraining)
    ] = None,
    pretrain_learning_rate: Annotated[
        float | None, _rate("pre-training", DEFAULTS.pretraining)
    ] = None,
    finetune_steps: Annotated[int | None, _steps("fine-tuning", DEFAULTS.finetuning)] = None,
    finetune_learning_rate: Annotated[
        float | None, _rate("fine-tuning", DEFAULTS.finetuning)
    ] = None,
    rejection_steps: Annotated[
        int | None, _steps("learning the best answers", DEFAULTS.rejection)
    ] = None,
    rejection_learning_rate: Annotated[
        float | None, _rate("learning the best answers", DEFAULTS.rejection)
    ] = None,
    preference_steps: Annotated[int | None, _steps("DPO", DEFAULTS.preference)] = None,
    preference_learning_rate: Annotated[float | None, _rate("DPO", DEFAULTS.preference)] = None,
    problems: Annotated[
        int | None,
        _number(
            "Problems that are answered in each of the last two stages.",
            DEFAULTS.problems,
            panel=ANSWERS,
        ),
    ] = None,
    samples: Annotated[
        int | None, _number("Answers to each of them.", DEFAULTS.samples, 2, ANSWERS)
    ] = None,
    judge: Annotated[
        Literal["checker", "likelihood"] | None,
        typer.Option(
            help="Who says which answers are best: the task's checker, or the teacher's likelihood "
            "of a token.",
            show_default=DEFAULTS.judge,
            rich_help_panel=ANSWERS,
        ),
    ] = None,
    beta: Annotated[
        float | None,
        _number("Of DPO: what leaving the model before it costs.", DEFAULTS.beta, 0, ANSWERS),
    ] = None,
    hard_weight: Annotated[
        float | None,
        _number(
            "Weight of the chosen answers' cross-entropy in DPO.", DEFAULTS.hard_weight, 0, ANSWERS
        ),
    ] = None,
    examined: Annotated[
        int | None,
        _number("Problems that every model is marked on.", DEFAULTS.examined, panel=ANSWERS),
    ] = None,
    bf16: o.Bf16 = False,
    gradient_checkpointing: o.GradientCheckpointing = False,
    second_weight: o.SecondWeight = None,
    memory_budget: o.MemoryBudget = None,
) -> None:
    """Make a small model of a large one in six stages, as Llama 3.2 was made.

    Two teachers of different size learn a task whose answers a program checks; the larger one is
    **pruned**; what is left is **pre-trained** on the distributions of both, **fine-tuned** on
    solutions, fine-tuned again on the best of several answers of its own (**rejection sampling**),
    and prefers its better answers to its worse ones (**DPO**). Every model answers the same
    held-out problems.

    It ends with a table of the share of right answers after each stage. Nothing is downloaded;
    interrupted, the same command goes on where it stopped.

    **Examples**

    - `bgkernels recipe --task arithmetic:terms=3`

    - `bgkernels recipe --judge likelihood --output runs/unchecked` (as if nobody could check)

    - `bgkernels recipe --config examples/llama-3.2/recipe.yaml`
    """
    console = Console(stderr=True)
    with reported(console):
        config = configured(RecipeConfig.quick() if quick else RecipeConfig(), locals())
        result = run_recipe(config, Terminal(console))
        table = report.table(result)
        write_text(config.output / "recipe.md", markdown(table))
    Console().print(table)
    console.print(f"Written to {config.output}: recipe.json and .md, model/", highlight=False)


def configured(base: RecipeConfig, given: dict[str, Any]) -> RecipeConfig:
    """The base with the options of the command.

    Args:
        base: what options that were not given keep to.
        given: options by name, None where not given.

    Raises:
        OptionError: a number is out of range.
    """

    def pick(config: Any, *names: str) -> Any:
        return changed(config, **{name: given.get(name) for name in names})

    shared = ("accumulate", "bf16", "gradient_checkpointing")
    phases = {
        field: changed(
            pick(getattr(base, field), *shared),
            steps=given.get(f"{stage}_steps"),
            learning_rate=given.get(f"{stage}_learning_rate"),
        )
        for stage, field in PHASES.items()
    }
    budget = given.get("memory_budget")
    names = (
        "output", "task", "corpus", "sequence_length", "lessons", "batch_size", "teacher",
        "second_teacher", "problems", "samples", "judge", "beta", "hard_weight", "examined",
        "device", "seed",
    )  # fmt: skip
    made: RecipeConfig = replace(
        pick(base, *names),
        student=pick(base.student, "layers", "heads", "width"),
        loss=changed(pick(base.loss, "second_weight"), memory_budget=budget and budget * 2**20),
        fresh=not given.get("resume", True),
        **phases,
    )
    return made
