"""The options that several commands have, and the configuration that they make together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from bgkernels.training.commands.shared import changed, typer
from bgkernels.training.config import PRETRAINED_RATE, DemoConfig
from bgkernels.training.errors import OptionError
from bgkernels.training.tasks import TASKS, fitted

DEFAULTS = DemoConfig()
TEXT, MODELS, TRAINING, LOSS = "Text", "Models", "Training", "Loss"
_training = DEFAULTS.student_training

Output = Annotated[
    Path | None, typer.Option(help="Folder of everything that is written.", show_default=False)
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume/--fresh",
        help="Go on from the checkpoints in --output, or discard the students' and start again. A "
        "teacher of the same configuration is kept either way.",
    ),
]
Quick = Annotated[
    bool,
    typer.Option("--quick", help="Seconds instead of minutes: shows the way, learns little."),
]
Seed = Annotated[int, typer.Option(min=0, help="Of weights, batches and samples.")]
Corpus = Annotated[
    Path | None,
    typer.Option(
        help="Folder of text files (*.txt, *.md, *.py and the like), or a data file (.jsonl, "
        ".parquet) of texts, conversations, or prompts and completions.",
        show_default="the sources of Python's standard library",
        rich_help_panel=TEXT,
    ),
]
Task = Annotated[
    str | None,
    typer.Option(
        help=f"In place of text, a task whose answers a program checks: {', '.join(TASKS)}, and "
        "parameters as in arithmetic:terms=5,digits=1. Answers are marked at the end.",
        show_default=False,
        rich_help_panel=TEXT,
    ),
]
Texts = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Problems of --task to learn from, each with one solution.",
        show_default=str(DEFAULTS.data.texts),
        rich_help_panel=TEXT,
    ),
]
SkipUnusable = Annotated[
    bool,
    typer.Option(
        "--skip-unusable",
        help="Leave out records of a data file that cannot be used, and name them.",
        rich_help_panel=TEXT,
    ),
]
SequenceLength = Annotated[
    int | None,
    typer.Option(
        min=8,
        help="Tokens of a sequence.",
        show_default=str(DEFAULTS.data.sequence_length),
        rich_help_panel=TEXT,
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Sequences of a batch.",
        show_default=str(DEFAULTS.data.batch_size),
        rich_help_panel=TEXT,
    ),
]
Teacher = Annotated[
    str | None,
    typer.Option(
        help="Hugging Face model, by path or name, used as it is.",
        show_default="a small Llama trained on the text",
        rich_help_panel=MODELS,
    ),
]
TeacherUrl = Annotated[
    str | None,
    typer.Option(
        help="Servers that run the --teacher, separated by commas: http://host:8000. Of it only "
        "head and tokenizer are read here.",
        show_default="the teacher is loaded",
        rich_help_panel=MODELS,
    ),
]
GenerateWith = Annotated[
    str | None,
    typer.Option(
        help="Servers (vllm serve MODEL) that write the text of sequence-level and on-policy "
        "methods, separated by commas: of the --teacher, or of the --student, with "
        "VLLM_SERVER_DEV_MODE=1 and --output where they can read it.",
        show_default="text is written here",
        rich_help_panel=MODELS,
    ),
]
Student = Annotated[
    str | None,
    typer.Option(
        help="Hugging Face model to distil into. Its tokenizer may be another.",
        show_default="a smaller Llama with random weights",
        rich_help_panel=MODELS,
    ),
]
SecondTeacher = Annotated[
    str | None,
    typer.Option(
        help="Another Hugging Face model, for the method two-teachers. Needs the same tokenizer.",
        show_default=False,
        rich_help_panel=MODELS,
    ),
]
TeacherSteps = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Steps of the teacher's training; without effect on a named --teacher.",
        show_default=str(DEFAULTS.teacher_training.steps),
        rich_help_panel=TRAINING,
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Steps of each student.",
        show_default=str(_training.steps),
        rich_help_panel=TRAINING,
    ),
]
LearningRate = Annotated[
    float | None,
    typer.Option(
        help="Highest learning rate of the student.",
        show_default=f"{_training.learning_rate:g}, or {PRETRAINED_RATE:g} for a named --student",
        rich_help_panel=TRAINING,
    ),
]
Accumulate = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Batches of a step; both terms share one normaliser over all of them.",
        show_default=str(_training.accumulate),
        rich_help_panel=TRAINING,
    ),
]
Bf16 = Annotated[
    bool,
    typer.Option(
        "--bf16", help="Run the bodies of the models in bfloat16.", rich_help_panel=TRAINING
    ),
]
GradientCheckpointing = Annotated[
    bool,
    typer.Option(
        "--gradient-checkpointing",
        help="Compute activations again in backward instead of keeping them.",
        rich_help_panel=TRAINING,
    ),
]
Compile = Annotated[
    bool,
    typer.Option("--compile", help="torch.compile the student's body.", rich_help_panel=TRAINING),
]
Device = Annotated[
    Literal["auto", "cpu", "cuda"],
    typer.Option(
        help="Where models compute; auto is a GPU if there is one, and under torchrun each process "
        "has its own."
    ),
]
Parallel = Annotated[
    Literal["ddp", "fsdp"],
    typer.Option(
        help="How processes of torchrun have the models: each a copy (ddp), or each its share of "
        "all parameters, gathered layer by layer where they are used (fsdp).",
        rich_help_panel=TRAINING,
    ),
]
Lora = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Train adapters of this rank (LoRA) and not the weights; the adapter is kept in "
        "adapters/, and the model is saved with it merged.",
        show_default="train the weights",
        rich_help_panel=TRAINING,
    ),
]
TensorBoard = Annotated[
    bool,
    typer.Option(
        "--tensorboard",
        help="Keep the log for TensorBoard too, in tensorboard/ beside the checkpoints.",
        rich_help_panel=TRAINING,
    ),
]
Divergence = Annotated[
    str | None,
    typer.Option(
        help="Of the soft label: a name in bg.divergences, such as forward_kl, reverse_kl, "
        "jeffreys, generalized_jsd, total_variation; for methods that do not bring their own.",
        show_default="forward_kl",
        rich_help_panel=LOSS,
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        help="Softens both distributions in the divergence.",
        show_default="1.0",
        rich_help_panel=LOSS,
    ),
]
SecondWeight = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="Weight of the second teacher's divergence; the first one's is the rest of 1.",
        show_default=f"{DEFAULTS.loss.second_weight:g}",
        rich_help_panel=LOSS,
    ),
]
MemoryBudget = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="MiB of temporaries that the loss may use.",
        show_default="the library's",
        rich_help_panel=LOSS,
    ),
]


def configured(base: DemoConfig, given: dict[str, Any]) -> DemoConfig:
    """The base with the options of a command.

    Args:
        base: what options that were not given keep to.
        given: options by name, None where not given; a command's ``locals()`` will do.

    Raises:
        OptionError: there is no such task, or it is given with what it sets itself.
    """
    refuse(given, "corpus", "sequence_length")

    def pick(config: Any, *names: str) -> Any:
        return changed(config, **{name: given.get(name) for name in names})

    rate = given.get("learning_rate")
    if rate is None and given.get("student") is not None:
        rate = PRETRAINED_RATE
    budget = given.get("memory_budget")
    training = pick(base.student_training, "steps", "accumulate", "validate_every")
    made: DemoConfig = replace(
        pick(base, "output", "seed", "methods", "lora", "tensorboard", "parallel", "device"),
        data=pick(
            base.data, "corpus", "task", "texts", "skip_unusable", "sequence_length", "batch_size"
        ),
        teacher=given.get("teacher"),
        teacher_url=given.get("teacher_url"),
        generate_with=given.get("generate_with"),
        student=given.get("student"),
        second_teacher=given.get("second_teacher"),
        teacher_training=changed(base.teacher_training, steps=given.get("teacher_steps")),
        student_training=changed(
            training,
            learning_rate=rate,
            bf16=given.get("bf16"),
            gradient_checkpointing=given.get("gradient_checkpointing"),
            compile=given.get("compile"),
        ),
        loss=changed(
            pick(base.loss, "divergence", "temperature", "second_weight"),
            memory_budget=budget and budget * 2**20,
        ),
        fresh=not given.get("resume", True),
    )
    return fitted(made)


def refuse(given: dict[str, Any], *names: str) -> None:
    """Refuse options that a task has no use for.

    Raises:
        OptionError: one of them was given beside ``--task``.
    """
    for name in names if given.get("task") is not None else ():
        if given.get(name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise OptionError(f"{option} has no effect on --task; leave one of them out")
