"""What has become slower or larger: ``python -m benchmarks.compare old.json new.json``.

Times are compared as ratios to the limit of their own run, so that results of a busy machine, or of
another one, mean something beside each other; memory as bytes above the inputs. Exits with 1 where
one of ours has grown by more than the tolerance.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.table import limit, markdown


@dataclass(frozen=True)
class Change:
    """One figure of one entry in both results."""

    case: str
    entry: str
    figure: str
    old: float
    new: float

    @property
    def growth(self) -> float:
        """0.1: a tenth more."""
        return self.new / self.old - 1


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.15, help="0.15: 15 %% more")
    options = parser.parse_args(arguments)
    old, new = (json.loads(path.read_text()) for path in (options.old, options.new))
    found = list(changes(old, new))
    if not found:
        sys.exit("the two results have no entry of ours in common")
    print(report(found))
    worse = [c for c in found if c.growth > options.tolerance]
    if worse:
        sys.exit(f"{len(worse)} figures grew by more than {options.tolerance:.0%}")


def changes(old: dict[str, Any], new: dict[str, Any]) -> Iterator[Change]:
    """Our figures that both results have."""
    before, after = _figures(old), _figures(new)
    for key in before.keys() & after.keys():
        yield Change(*key, before[key], after[key])


def _figures(results: dict[str, Any]) -> dict[tuple[str, str, str], float]:
    made = {}
    for field in results["fields"]:
        for e in field["entries"]:
            if e["kind"] == "ours" and "error" not in e:
                figures = {"× limit": e["seconds"]["median"] / limit(field)}
                figures |= {"peak, MiB": e["peak"] / 2**20}
                made |= {(field["title"], e["entry"], k): x for k, x in figures.items()}
    return made


def report(found: list[Change]) -> str:
    """A table, the worst first."""
    rows = [
        [c.case, c.entry, c.figure, f"{c.old:.3g}", f"{c.new:.3g}", f"{c.growth:+.0%}"]
        for c in sorted(found, key=lambda c: -c.growth)
    ]
    return markdown(["case", "entry", "figure", "old", "new", "growth"], rows)


if __name__ == "__main__":
    main()
