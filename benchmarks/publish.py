"""Results into the pages: ``python -m benchmarks.publish results.json``.

Fills the blocks of README.md, with the headline figures, and of docs/choosing.md, with our own
modes and budgets; writes docs/benchmarks.md with all tables, and draws docs/figures. ``--print``
shows the tables and touches nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.machine import ROOT
from benchmarks.table import choices, headline, render

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
PAGE = """\
# Benchmarks

`python -m benchmarks.publish` has written this page from `{source}`; do not edit it. `make bench`
measures again, and `python -m benchmarks.compare old.json new.json` shows what has become slower.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.publish", description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--print", action="store_true", help="show the tables instead")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout to write to")
    options = parser.parse_args(arguments)
    results = json.loads(options.results.read_text())
    if options.print:
        print(render(results))
        return
    from benchmarks.plots import draw  # matplotlib, which tables do not need

    docs = options.root / "docs"
    figures = draw(results, docs / "figures")
    pictures = [f"![{p.stem}](figures/{p.name})" for p in figures]
    source = options.results.resolve()
    shown = source.relative_to(ROOT) if source.is_relative_to(ROOT) else source.name
    page = [PAGE.format(source=shown).rstrip(), render(results), *pictures]
    (docs / "benchmarks.md").write_text("\n\n".join(page) + "\n")
    blocks = {"README.md": headline(results), "docs/choosing.md": choices(results)}
    for name, text in blocks.items():
        path = options.root / name
        path.write_text(filled(path.read_text(), text))


def filled(page: str, text: str) -> str:
    """The page with the text between its two marks; ValueError if it has none."""
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"the page must have {BEGIN!r} and {END!r} once each")
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{text.strip()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    main()
