"""The command line: ``bgkernels COMMAND``, each command from a module of its own."""

from __future__ import annotations

from bgkernels.labels.command import generate_labels
from bgkernels.training.commands.analyze import analyze
from bgkernels.training.commands.bench import bench
from bgkernels.training.commands.demo import compare, demo, distill
from bgkernels.training.commands.prune import prune
from bgkernels.training.commands.recipe import recipe
from bgkernels.training.commands.report import report
from bgkernels.training.commands.shared import typer
from bgkernels.training.commands.study import study
from bgkernels.training.commands.train import train

app = typer.Typer(
    name="bgkernels",
    help="Hybrid distillation of language models: hard and soft labels, weighted token by token.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
COMMANDS = (
    demo, distill, compare, train, prune, recipe, generate_labels, study, analyze, report,
)  # fmt: skip
for command in COMMANDS:
    app.command()(command)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(bench)
