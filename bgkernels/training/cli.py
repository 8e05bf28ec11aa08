"""The command line: ``bgkernels demo`` and ``bgkernels generate-labels``."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

from bgkernels.training import report
from bgkernels.training.config import (
    PRETRAINED_RATE,
    DataConfig,
    DemoConfig,
    LossConfig,
    TrainConfig,
)
from bgkernels.training.demo import run_demo
from bgkernels.training.errors import Interrupted, TrainingError, extra
from bgkernels.training.progress import Terminal

try:
    with extra():
        import typer
        from rich.console import Console
        from rich.logging import RichHandler
        from rich.markup import escape

        from bgkernels.labels.command import generate_labels
except TrainingError as error:
    sys.exit(f"error: {error}")

app = typer.Typer(
    name="bgkernels",
    help="Hybrid distillation of language models: hard and soft labels, weighed token by token.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

app.command()(generate_labels)

DEFAULTS = DemoConfig()
TEXT, MODELS, TRAINING, LOSS = "Text", "Models", "Training", "Loss"


@app.callback()
def main() -> None:
    """Hybrid distillation of language models: hard and soft labels, weighed token by token."""


@app.command()
def demo(
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for checkpoints, trained models, results.json and results.png.",
            show_default="runs/demo",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--fresh",
            help="Go on from the checkpoints in --output, or discard the students' and distil "
            "again. A teacher of the same configuration is kept either way.",
        ),
    ] = True,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Seconds instead of minutes: shows the way, learns little."),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, batches and samples.")] = 0,
    corpus: Annotated[
        Path | None,
        typer.Option(
            help="Folder of text files (*.txt, *.md, *.py and the like).",
            show_default="the sources of Python's standard library",
            rich_help_panel=TEXT,
        ),
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(
            min=8,
            help="Tokens of a sequence.",
            show_default=str(DEFAULTS.data.sequence_length),
            rich_help_panel=TEXT,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Sequences of a step.",
            show_default=str(DEFAULTS.data.batch_size),
            rich_help_panel=TEXT,
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="Hugging Face model, by path or name, used as it is.",
            show_default="a small Llama trained on the text",
            rich_help_panel=MODELS,
        ),
    ] = None,
    student: Annotated[
        str | None,
        typer.Option(
            help="Hugging Face model to distil into. Needs the teacher's tokenizer.",
            show_default="a smaller Llama with random weights",
            rich_help_panel=MODELS,
        ),
    ] = None,
    teacher_steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Steps of the teacher's training; without effect on a named --teacher.",
            show_default=str(DEFAULTS.teacher_training.steps),
            rich_help_panel=TRAINING,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Steps of each distillation.",
            show_default=str(DEFAULTS.student_training.steps),
            rich_help_panel=TRAINING,
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="Highest learning rate of the distillation.",
            show_default=f"{DEFAULTS.student_training.learning_rate:g}, or "
            f"{PRETRAINED_RATE:g} for a named --student",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    divergence: Annotated[
        str | None,
        typer.Option(
            help="Of the soft label: a name in bg.divergences, such as forward_kl, reverse_kl, "
            "jeffreys, generalized_jsd, total_variation.",
            show_default="forward_kl",
            rich_help_panel=LOSS,
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="Softens both distributions in the divergence.",
            show_default="1.0",
            rich_help_panel=LOSS,
        ),
    ] = None,
    memory_budget: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="MiB of temporaries that the loss may use.",
            show_default="the library's",
            rich_help_panel=LOSS,
        ),
    ] = None,
) -> None:
    """Train a small teacher, distil it three ways, and see what the routing does.

    The students start from the same weights and see the same batches. One learns from the text
    alone (**hard-only**), one from the teacher's distributions alone (**soft-only**), and one from
    a mix that follows each token (**entropy-routed**): more of the hard label at *bridges*, where
    the teacher is sure what comes next, more of the soft one in *gardens*, where much may follow.

    It ends with a table and a picture of how far each student is from the teacher, on held-out
    files and on text of its own. Nothing is downloaded. It takes about six minutes on two cores;
    interrupted, the same command goes on where it stopped.

    **Examples**

    - `bgkernels demo`

    - `bgkernels demo --corpus ~/notes --output runs/notes --steps 2000`

    - `bgkernels demo --teacher runs/demo/models/teacher --output runs/other --divergence jeffreys`
    """
    console = Console(stderr=True)
    _show_warnings(console)
    config = DemoConfig.quick() if quick else DemoConfig()
    if student is not None and learning_rate is None:
        learning_rate = PRETRAINED_RATE
    config = replace(
        config,
        output=output or config.output,
        data=_with(
            config.data, corpus=corpus, sequence_length=sequence_length, batch_size=batch_size
        ),
        teacher=teacher,
        student=student,
        teacher_training=_with(config.teacher_training, steps=teacher_steps),
        student_training=_with(config.student_training, steps=steps, learning_rate=learning_rate),
        loss=_with(
            config.loss,
            divergence=divergence,
            temperature=temperature,
            memory_budget=memory_budget and memory_budget * 2**20,
        ),
        fresh=not resume,
        seed=seed,
    )
    try:
        result = run_demo(config, Terminal(console))
    except Interrupted as stop:
        console.print(f"[yellow]{escape(str(stop))}[/]", highlight=False)
        raise typer.Exit(128 + stop.signum) from None
    except TrainingError as problem:
        console.print(f"[bold red]error:[/] {escape(str(problem))}", highlight=False)
        raise typer.Exit(1) from None
    Console().print(report.table(result))
    console.print(
        f"Written to {config.output}: results.json, results.png, models/", highlight=False
    )


Config = TypeVar("Config", DataConfig, TrainConfig, LossConfig)


def _with(config: Config, **given: Any) -> Config:
    """The configuration with the options that were given; None means not given."""
    return replace(config, **{key: value for key, value in given.items() if value is not None})


def _show_warnings(console: Console) -> None:
    """Print what the package warns of, a corrupt checkpoint for one, above the bars."""
    handler = RichHandler(console=console, show_time=False, show_path=False)
    logging.getLogger("bgkernels").handlers = [handler]
