"""A signature changes with a new snapshot, and since a release only with a line in the changelog.

``tests/api/present.txt`` is the API of this tree, and ``tests/api/VERSION.txt`` that of a release:
a copy, made when the release gets its heading in ``CHANGELOG.md``.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
import re
from pathlib import Path

import pytest

from tests.public_api import PRESENT, definitions, entry, snapshot

CHANGELOG = PRESENT.parents[2] / "CHANGELOG.md"
EXTRAS = ("transformers", "trl", "lightning")
"""Integrations that need a package of their own, and whose own tests import them."""


def entries(text: str) -> dict[str, str]:
    """The entries of a snapshot, by name; lines that go on are indented, or close a bracket."""
    parts = re.split(r"\n(?![ )])", text.strip())
    return {part.split(":")[0].split("(")[0].split(" =")[0]: part for part in parts if part}


def sections(changelog: str) -> dict[str, str]:
    """The text below each heading of a version, the newest first."""
    parts = re.split(r"^## \[(.+?)\].*$", changelog, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def unannounced(before: str, now: str, section: str) -> list[str]:
    """Names whose entries differ, and which no code span of a section of the changelog has.

    A class that is named speaks for its methods, and a command for its options, if it differs too.
    """
    old, new = entries(before), entries(now)
    changed = [name for name in sorted(old.keys() | new) if old.get(name) != new.get(name)]
    named = {w for span in re.findall(r"`([^`]+)`", section) for w in re.findall(r"[\w-]+", span)}

    def said(name: str) -> bool:
        owner, _, last = name.rpartition(" " if name.startswith("$") else ".")
        return last in named or (owner in changed and said(owner))

    return [name for name in changed if not said(name)]


def test_the_snapshot_is_of_this_tree() -> None:
    saved, found = PRESENT.read_text(encoding="utf-8"), snapshot()
    diff = difflib.unified_diff(saved.splitlines(), found.splitlines(), "saved", "found", n=1)
    assert saved == found, (
        "the public API has changed:\n" + "\n".join(diff) + "\nIf that is meant, name what has "
        "changed under `Unreleased` in CHANGELOG.md, and run: python -m tests.public_api"
    )


def complaint(changelog: str, folder: Path) -> str | None:
    """What is wrong with the API of a tree since its last release; None before the first."""
    log = sections(changelog)
    releases = [version for version in log if version != "Unreleased"]
    saved = {p.stem for p in folder.glob("*.txt")} - {PRESENT.stem}
    if not set(releases[:1]) <= saved <= set(releases):
        return f"{releases[:1]}: copy {PRESENT.name} to {folder.name}/VERSION.txt at a release"
    if not releases:
        return None
    before, now = (folder / f"{name}.txt" for name in (releases[0], PRESENT.stem))
    missing = unannounced(before.read_text("utf-8"), now.read_text("utf-8"), log["Unreleased"])
    if missing:
        return f"changed since {releases[0]}, and not under `Unreleased`: {missing}"
    return None


def test_what_changed_since_the_last_release_is_in_the_changelog() -> None:
    assert complaint(CHANGELOG.read_text(encoding="utf-8"), PRESENT.parent) is None


BEFORE = """\
$ bgkernels train
$ bgkernels train --steps: int = 1000
bgkernels.A(x: int)
bgkernels.A.run() -> None
bgkernels.f(
    x: Tensor,
    y: int = 3,
) -> Tensor
"""


@pytest.mark.parametrize(
    ("change", "to", "missing", "line"),
    [
        ("y: int = 3", "y: int = 4", "bgkernels.f", "- `f` takes 4."),
        ("    y: int = 3,\n", "", "bgkernels.f", "- `bgkernels.f(x)` has no `y`."),
        ("bgkernels.A.run() -> None\n", "", "bgkernels.A.run", "- No more `A.run()`."),
        ("A(x: int)", "A(x: str)", "bgkernels.A", "- `A`: text."),
        ("= 1000", "= 2000", "$ bgkernels train --steps", "- `train --steps` is 2000."),
        ("bgkernels.f", "bgkernels.B.m() -> int\nbgkernels.f", "bgkernels.B.m", "- `B.m`"),
    ],
)  # fmt: skip
def test_a_change_wants_a_line(change: str, to: str, missing: str, line: str) -> None:
    now = BEFORE.replace(change, to)
    assert now != BEFORE and unannounced(BEFORE, now, "") == [missing]
    assert unannounced(BEFORE, now, line) == []
    prose = line.replace("`", "")
    assert unannounced(BEFORE, now, prose) == [missing]  # words of prose name nothing


def test_a_new_class_speaks_for_its_methods_and_a_command_for_its_options() -> None:
    now = BEFORE + "bgkernels.B(x: int)\nbgkernels.B.m() -> int\n$ bgkernels eat\n"
    now += "$ bgkernels eat --all: bool = False\n"
    assert unannounced(BEFORE, now, "- `B`, and `bgkernels eat`.") == []
    assert unannounced(BEFORE, now, "- `m` and `--all`.") == ["$ bgkernels eat", "bgkernels.B"]
    assert unannounced(BEFORE, BEFORE, "") == []


def test_a_release_keeps_its_api_and_lines_of_an_older_one_do_not_count(tmp_path: Path) -> None:
    log = "# Changelog\n\n## [Unreleased]\n\n- `g`\n"
    released = log + "\n## [0.2.0] - 2030-01-01\n\n- `f`\n\n## [0.1.0] - 2029-01-01\n\n- `A`\n"
    (tmp_path / PRESENT.name).write_text(BEFORE.replace("y: int = 3", "y: int = 4"))
    assert complaint(log, tmp_path) is None
    assert "copy present.txt" in (complaint(released, tmp_path) or "")
    (tmp_path / "0.2.0.txt").write_text(BEFORE)
    assert "['bgkernels.f']" in (complaint(released, tmp_path) or "")
    assert complaint(released.replace("`g`", "`f`"), tmp_path) is None
    assert "copy present.txt" in (complaint(log, tmp_path) or "")  # of a release that is not listed


SOURCE = """
from dataclasses import dataclass
class _Base:
    def __init__(self, a: int, /, b="x", *, c: float = 1.5, **rest: int) -> None: ...
    def kept(self) -> str: ...
class Made(_Base, Exception):
    @property
    def size(self) -> int: ...
    @classmethod
    def of(cls, *parts: str) -> Made: ...
    def _own(self) -> None: ...
    def __repr__(self) -> str: ...
@dataclass(frozen=True)
class Row:
    x: Tensor
    y: int | None = None
    _z: int = 0
LIMIT = 3
"""
EXPECTED = """\
m.Made(a: int, /, b='x', *, c: float = 1.5, **rest: int): Exception
m.Made.kept() -> str
m.Made.size: int
m.Made.of(*parts: str) -> Made
m.Row(x: Tensor, y: int | None = None)
"""


def test_signatures_are_read_from_the_source() -> None:
    scope = definitions(ast.parse(SOURCE))
    found = [x for name in ("Made", "Row") for x in entry(f"m.{name}", scope[name], scope)]
    assert found == EXPECTED.splitlines()


def test_every_name_can_be_imported() -> None:
    names = [n for n in entries(PRESENT.read_text(encoding="utf-8")) if not n.startswith("$")]
    here = [n for n in names if not any(f"integrations.{extra}." in n for extra in EXTRAS)]
    assert len(here) > 100
    assert not [name for name in here if resolved(name) is None]


def resolved(name: str) -> object:
    """What a dotted name leads to: modules first, then attributes."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        return functools.reduce(lambda x, part: getattr(x, part, None), parts[cut:], module)
    return None
