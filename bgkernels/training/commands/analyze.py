"""``bgkernels analyze``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from bgkernels.training.analysis import AnalysisConfig, figure, report, run_analysis
from bgkernels.training.commands import options as o
from bgkernels.training.commands.shared import ConfigFile, Console, changed, reported, typer
from bgkernels.training.config import DemoConfig
from bgkernels.training.files import write_json
from bgkernels.training.marks import describe
from bgkernels.training.page import write_report
from bgkernels.training.progress import Terminal
from bgkernels.training.tasks import fitted

TEXT, MAPS = "Text", "Maps"
DEFAULTS = DemoConfig()
UNREAD = 64
"""Problems of the training split, of which an analysis reads none."""


def analyze(
    teacher: Annotated[str, typer.Option(help="Hugging Face model, by path or name.")],
    student: Annotated[str, typer.Option(help="The same, of the same tokenizer.")],
    config_file: ConfigFile = None,
    output: Annotated[
        Path, typer.Option(help="Folder of analysis.json, analysis.png and report.html.")
    ] = Path("runs/analysis"),
    seed: Annotated[int, typer.Option(min=0, help="Of the sampled texts.")] = 0,
    device: o.Device = "auto",
    corpus: Annotated[
        Path | None,
        typer.Option(
            help="Folder of text files; some of them are held out.",
            show_default="the sources of Python's standard library",
            rich_help_panel=TEXT,
        ),
    ] = None,
    task: o.Task = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(
            min=8,
            help="Tokens of a held-out window.",
            show_default=str(DEFAULTS.data.sequence_length),
            rich_help_panel=TEXT,
        ),
    ] = None,
    windows: Annotated[
        int, typer.Option(min=2, help="Held-out windows to score.", rich_help_panel=TEXT)
    ] = DEFAULTS.evaluation.windows,
    threshold: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Entropy / log V between bridges and gardens.", rich_help_panel=TEXT
        ),
    ] = DEFAULTS.evaluation.threshold,
    routing: Annotated[
        str,
        typer.Option(help="Policy whose soft weight is mapped, by name.", rich_help_panel=MAPS),
    ] = "entropy",
    passages: Annotated[int, typer.Option(min=1, help="Windows to map.", rich_help_panel=MAPS)] = 2,
    rollouts: Annotated[
        int,
        typer.Option(
            min=0, help="Draws a token for its risk; 0: no map of risk.", rich_help_panel=MAPS
        ),
    ] = 4,
    horizon: Annotated[
        int, typer.Option(min=1, help="Tokens over which a risk is felt.", rich_help_panel=MAPS)
    ] = 8,
) -> None:
    """See where a student errs, whether its errors feed on errors, and what each token risks.

    Held-out text, continuations by the teacher and continuations by the student are scored by both
    models. **Exposure bias** is how much further apart they are on the student's text; **ExAccErr**
    is the same as a share, and its growth with length shows errors that feed on errors.

    A page and a picture then show passages token by token: the teacher's entropy (bridges and
    gardens), the weight that a routing policy gives to the soft label, the divergence, and the
    *risk*, an estimate of what the student's choice of that token costs in the next few.

    **Example**, after `bgkernels demo`

    - `bgkernels analyze --teacher runs/demo/models/teacher --student runs/demo/models/soft`
    """
    console, given = Console(stderr=True), locals()
    pair = replace(
        DEFAULTS,
        teacher=teacher,
        student=student,
        data=changed(
            DEFAULTS.data,
            corpus=corpus,
            task=task,
            texts=task and UNREAD,
            sequence_length=sequence_length,
        ),
        evaluation=replace(DEFAULTS.evaluation, windows=windows, threshold=threshold),
        seed=seed,
        device=device,
    )
    with reported(console):
        o.refuse(given, "corpus", "sequence_length")
        analysis = run_analysis(
            AnalysisConfig(fitted(pair), routing, passages, horizon, rollouts), Terminal(console)
        )
        write_json(output / "analysis.json", analysis.plain())
        write_report(output)
        figure.draw(analysis, output / "analysis.png")
    Console().print(report.table(analysis))
    if analysis.marks:
        Console().print(describe(analysis.marks))
    console.print(f"Written to {output}: analysis.json and .png, report.html", highlight=False)
