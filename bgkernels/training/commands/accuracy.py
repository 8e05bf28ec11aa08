"""``bgkernels compare --task``: which methods make students right."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bgkernels.training.accuracy import report
from bgkernels.training.accuracy.config import AccuracyConfig
from bgkernels.training.accuracy.run import run_accuracy
from bgkernels.training.commands import options as o
from bgkernels.training.commands.shared import Console, changed, reported
from bgkernels.training.files import write_json, write_text
from bgkernels.training.page import write_report
from bgkernels.training.progress import Terminal
from bgkernels.training.report import markdown

REFUSED = (
    "corpus", "texts", "sequence_length", "batch_size", "teacher", "student", "second_teacher",
    "teacher_steps", "steps", "learning_rate", "divergence", "temperature", "second_weight",
    "memory_budget",
)  # fmt: skip
"""Options of `compare` that the comparison by accuracy sets itself."""


def compare_accuracy(given: dict[str, Any], methods: tuple[str, ...] | None) -> None:
    """Run the comparison, show its tables, and leave them in a file of each kind.

    Args:
        given: options of the command by name.
        methods: of every setting; None: those that the settings have.
    """
    console = Console(stderr=True)
    with reported(console):
        o.refuse(given, *REFUSED)
        config = AccuracyConfig.of(given["task"], given["quick"])
        config = changed(config, output=given["output"])
        if methods is not None:
            settings = tuple(replace(x, methods=methods) for x in config.settings)
            config = replace(config, settings=settings)
        result = run_accuracy(config, Terminal(console))
        write_json(config.output / "accuracy.json", result.plain())
        parts = (report.table(result), report.findings(result), report.costs(result))
        write_text(config.output / "accuracy.md", markdown(*parts))
        write_report(config.output)
    for part in parts:
        Console().print(part)
    console.print(
        f"Written to {config.output}: accuracy.json and .md, report.html", highlight=False
    )
