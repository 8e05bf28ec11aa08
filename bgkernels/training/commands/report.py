"""``bgkernels report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from bgkernels.training.commands.shared import Console, reported, typer
from bgkernels.training.page import write_report


def report(
    run: Annotated[
        Path,
        typer.Argument(help="Folder of a run of demo, distill, train, analyze or compare."),
    ],
) -> None:
    """Make one page of a run: `report.html` in its folder, to be looked at in a browser.

    It has learning curves, tables, and passages token by token: for each token what the teacher and
    every student would have said there, and how each would have gone on. The page needs no other
    file and no network. No model is loaded; of a run that was stopped there are curves alone.

    **Example**

    - `bgkernels report runs/demo`
    """
    console = Console(stderr=True)
    with reported(console):
        path = write_report(run)
    console.print(f"Written: {path}", highlight=False, soft_wrap=True)
