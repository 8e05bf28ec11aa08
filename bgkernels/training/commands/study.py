"""``bgkernels study``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from bgkernels.training.commands.shared import ConfigFile, Console, changed, reported, typer
from bgkernels.training.errors import OptionError
from bgkernels.training.files import write_json, write_text
from bgkernels.training.progress import Terminal
from bgkernels.training.report import markdown
from bgkernels.training.study import figure, report
from bgkernels.training.study.config import StudyConfig
from bgkernels.training.study.run import run_study

DEFAULTS = StudyConfig()
WORLD, TRAINING = "World", "Training"


def study(
    config_file: ConfigFile = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder of study.json, study.md and study.png.", show_default="runs/study"
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few seconds: shows the way, its numbers mean little.")
    ] = False,
    seeds: Annotated[
        int | None,
        typer.Option(min=2, help="Students by each method.", show_default=str(DEFAULTS.seeds)),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The first seed.")] = 0,
    sizes: Annotated[
        str | None,
        typer.Option(
            help="Hidden units of the students, separated by commas.",
            show_default=",".join(map(str, DEFAULTS.sizes)),
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Steps of training.",
            show_default=str(DEFAULTS.steps),
            rich_help_panel=TRAINING,
        ),
    ] = None,
    texts: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Texts of the teacher to learn from.",
            show_default=str(DEFAULTS.texts),
            rich_help_panel=TRAINING,
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(show_default=f"{DEFAULTS.learning_rate:g}", rich_help_panel=TRAINING),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of a text.",
            show_default=str(DEFAULTS.world.steps),
            rich_help_panel=WORLD,
        ),
    ] = None,
    bridges: Annotated[
        int | None,
        typer.Option(min=0, show_default=str(DEFAULTS.world.bridges), rich_help_panel=WORLD),
    ] = None,
    gardens: Annotated[
        int | None,
        typer.Option(min=0, show_default=str(DEFAULTS.world.gardens), rich_help_panel=WORLD),
    ] = None,
) -> None:
    """Put the theory of bridges and gardens to a world where everything can be computed.

    The texts of a tiny language have **bridges**, where a wrong token breaks the text for good,
    and **gardens**, where many tokens will do. Small students learn it from its teacher by each
    method. Their loss on the teacher's texts and on their own, the exposure bias between the two,
    and the risk κ of every single token are then sums over all states, not samples.

    It ends with a table of all students, and a table of what the theory claims against what was
    found. Intervals are over seeds.

    **Examples**

    - `bgkernels study`

    - `bgkernels study --seeds 20 --sizes 8,16,32 --output runs/sizes`

    - `bgkernels study --steps 2400` (what is left of it all once students are trained well?)
    """
    console = Console(stderr=True)
    with reported(console):
        config = StudyConfig.quick() if quick else StudyConfig()
        try:
            config = replace(
                changed(
                    config, output=output, seeds=seeds, steps=steps, texts=texts,
                    learning_rate=learning_rate, sizes=_sizes(sizes),
                ),
                world=changed(config.world, steps=length, bridges=bridges, gardens=gardens),
                seed=seed,
            )  # fmt: skip
        except ValueError as error:
            raise OptionError(str(error)) from error
        result = run_study(config, Terminal(console))
        write_json(config.output / "study.json", result.plain())
        figure.draw(result, config.output / "study.png")
        parts = (report.table(result), report.findings(result), report.summary(result))
        write_text(config.output / "study.md", markdown(*parts))
    for part in parts:
        Console().print(part)
    console.print(f"Written to {config.output}: study.json, .md and .png", highlight=False)


def _sizes(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise OptionError(f"--sizes must be positive numbers separated by commas; got {text!r}")
    return sizes
