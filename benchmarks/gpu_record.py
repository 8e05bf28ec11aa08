"""The file of a run on a GPU: it is written after each section, and a later run goes on from it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SAME = ("commit", "packages", "backend", "dry")
"""Of a machine's stamp: what must be alike for a run to go on from another's file."""


class Record:
    """The sections of a run.

    Args:
        path: of the file, which may be there.
        stamp: of the machine, the code and the run.
    """

    def __init__(self, path: Path, stamp: Row) -> None:
        self.path, self.sections = path, {"machine": stamp}  # type: Path, dict[str, Any]
        if path.exists():
            old = json.loads(path.read_text())
            if all(old.get("machine", {}).get(name) == stamp.get(name) for name in SAME):
                self.sections = old

    def run(self, name: str, section: Callable[[], Iterable[Row]]) -> list[Row]:
        """The rows of a section, from the file or measured now; an error of it is a row."""
        if name not in self.sections:
            rows: list[Row] = []
            try:
                rows.extend(section())
            except Exception as error:  # the sections after it are worth as much
                rows.append({"error": f"{type(error).__name__}: {str(error)[:160]}"})
            self.sections[name] = rows
            self.write()
        return self.sections[name]

    def write(self) -> None:
        """Replace the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.sections, indent=1, ensure_ascii=False)
        made = self.path.with_suffix(".part")
        made.write_text(text + "\n")
        made.replace(self.path)


def readme_table(headline: list[Row]) -> str:
    """The README's table of a GPU: steps of the headline that were measured."""
    lines = ["|  | step, ms | × products | temporaries, MiB |", "| --- | ---: | ---: | ---: |"]
    for row in headline:
        if "ms" in row:
            numbers = (f"{row['ms']:.1f}", row.get("ratio", ""), round(row["peak MiB"]))
            lines.append(f"| {row['step']} | {' | '.join(map(str, numbers))} |")
    return "\n".join(lines)
