"""README and the pages under ``docs``: code runs, names exist, links lead somewhere."""

from __future__ import annotations

import contextlib
import dataclasses
import doctest
import importlib
import importlib.util
import io
import json
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import bgkernels as bg
from benchmarks.publish import BEGIN, END
from benchmarks.table import choices, headline
from bgkernels.numpy import NumpyRowStats
from bgkernels.training.methods import METHODS
from tests.models import VOCAB, tiny, tokenizer

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
ROOTS = [ROOT / n for n in ("README.md", "CONTRIBUTING.md", "examples/README.md")]
PAGES = [*ROOTS, *sorted(DOCS.rglob("*.md"))]
APART = (DOCS / "served.md",)
"""Pages whose blocks another test runs, since they need a server."""
NEEDS = {
    "README": ("transformers", "accelerate"),
    "features": ("transformers", "pyarrow"),
    "start": ("transformers",),
    "vocabularies": ("transformers",),
    "transformers": ("transformers", "accelerate"),
    "trl": ("trl", "datasets"),
    "lightning": ("lightning", "transformers"),
    "fsdp": ("transformers",),
}
"""Packages of extras that the blocks of a page import."""
GIVEN = (*ROOTS, DOCS / "features.md")
"""Pages of which each block stands alone, amid the names of :func:`given`."""


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    """Its fenced code in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text(page), re.M | re.S)


def having(*languages: str) -> list[Any]:
    """The pages that have such blocks."""
    return [
        pytest.param(p, id=p.stem)
        for p in PAGES
        if p not in APART and any(blocks(p, x) for x in languages)
    ]


@pytest.fixture
def surroundings(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[None]:
    """A page's blocks run in a folder of their own, and leave the registries as they were."""
    monkeypatch = request.getfixturevalue("monkeypatch")
    page = request.node.callspec.params["page"]
    for package in NEEDS.get(page.stem, ()):
        pytest.importorskip(package, reason=f"needs the extra `integrations`: {package}")
    monkeypatch.chdir(tmp_path)
    for owner in (bg.divergences.registry, bg.routing.registry):
        monkeypatch.setattr(owner, "_factories", dict(owner._factories))
    launched_alone(monkeypatch)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def launched_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``torchrun`` sets for one process, on a port that is free."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(s.getsockname()[1]))
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("page", having("python"))
def test_blocks_run(page: Path, surroundings: None) -> None:
    """The blocks of a page share their names; the text that follows one is what it prints."""
    names: dict[str, Any] = {"__name__": page.stem}
    for match in re.finditer(
        r"^```python\n(.*?)^```(?:\n\n```text\n(.*?)^```)?", text(page), re.M | re.S
    ):
        if page in GIVEN:
            names |= given()
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(match[1], str(page), "exec"), names)
        assert match[2] in (None, printed.getvalue())


def given() -> dict[str, Any]:
    """What these pages take as known: a student, teachers, a batch, labels on disk."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.utils.data import DataLoader

    import bgkernels
    from bgkernels import labels as cached
    from bgkernels.training.models import CausalLM

    student, words, folder = tiny(), tokenizer(), Path("runs/labels")
    batch, length, width = 2, 5, student.config.hidden_size
    if not folder.exists():
        text = [torch.randint(3, VOCAB, (length,)) for _ in range(8)]
        cached.generate(CausalLM(student), text, folder, cached.CaptureConfig(k=8), tokenizer=words)
    teachers = [
        bg.LinearTeacher(torch.randn(batch, length, 24), torch.randn(VOCAB, 24)) for _ in range(2)
    ]
    return {
        "bgkernels": bgkernels, "bg": bg, "torch": torch, "DataLoader": DataLoader,
        "register": bg.divergences.register, "Divergence": bg.divergences.Divergence,
        "student": student, "tokenizer": words, "lm_head": student.lm_head,
        "loss_fn": bg.LinearHybridDistillationLoss(),
        "hidden": torch.randn(batch, length, width, requires_grad=True),
        "weight": torch.randn(VOCAB, width), "labels": torch.randint(VOCAB, (batch, length)),
        "teacher": teachers[0], "t1": teachers[0], "t2": teachers[1],
        "mesh": init_device_mesh("cpu", (1,), mesh_dim_names=("tp",)),
    }  # fmt: skip


@pytest.mark.parametrize("page", having("diff"))
def test_changes_run(page: Path, surroundings: None) -> None:
    """What a change makes of some lines runs, given two models, a batch, and a trainer's parts."""
    from torch.nn import functional as F
    from transformers import Trainer, TrainingArguments

    tokens = torch.randint(3, VOCAB, (4, 6))
    arguments = TrainingArguments("out", max_steps=1, report_to=[], use_cpu=True)
    for block in blocks(page, "diff"):
        kept = "".join(line[1:] for line in block.splitlines(True) if not line.startswith("-"))
        teacher = tiny(seed=2).requires_grad_(False)
        models = {"student": tiny(), "model": tiny(seed=1), "teacher": teacher}
        data = [{"input_ids": t, "labels": t} for t in tokens]
        batch = {"input_ids": tokens, "labels": tokens}
        trainer = {"Trainer": Trainer, "args": arguments, "data": data}
        exec(compile(kept, str(page), "exec"), {"torch": torch, "F": F} | models | batch | trainer)


def commands(page: Path) -> list[str]:
    """Lines of shell in its blocks, and commands in its prose."""
    lines = "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    lines += [x[2:] for b in blocks(page, "text") for x in b.splitlines() if x.startswith("$ ")]
    prose = re.sub(r"^( *)```.*?^\1```", "", text(page), flags=re.M | re.S)
    lines += re.findall(
        r"`((?:(?:bgkernels|make|torchrun|python -m|pip install) |python examples/)[^`]*)`", prose
    )
    return [found for line in lines if (found := line.partition(" #")[0].strip())]


@pytest.mark.parametrize("page", [pytest.param(p, id=p.stem) for p in PAGES if commands(p)])
def test_commands_exist(page: Path) -> None:
    """Programs, files and options that a page names are there."""
    for line in commands(page):
        words = [w for w in shlex.split(line) if w != "..." and not re.match(r"[A-Z_]+=", w)]
        check(re.sub(r"^(torchrun (--\S+ \S+ )*|python )(-m )?", "", shlex.join(words)), line)


def check(command: str, line: str) -> None:
    """One command, by its first word."""
    program, *rest = words = shlex.split(command)
    if program in ("bgkernels", "bgkernels.training"):
        parse(rest)
    elif program == "make":
        targets = re.findall(r"^([a-z]+):", text(ROOT / "Makefile"), re.M)
        assert set(w for w in rest if not w.startswith("-")) <= set(targets), line
    elif program == "pip":
        wanted = re.findall(r"\[([a-z,]+)\]", line)
        assert all(
            f"\n{x} = [" in text(ROOT / "pyproject.toml") for w in wanted for x in w.split(",")
        )
    elif program.startswith(("benchmarks.", "tests.")):
        found = importlib.util.find_spec(program)
        assert found and found.origin, line
        assert all(w in text(Path(found.origin)) for w in rest if w.startswith("--")), line
    elif program == "vllm":
        assert rest[0] == "serve", line  # tests/integrations/test_served_page.py starts it
    elif program == "chromium":
        assert rest[-1].startswith("file://"), line  # tests/training/test_report.py starts it
    elif program == "-c":
        exec(rest[0], {})
    elif program.startswith(".venv/bin/"):
        assert f'"{Path(program).name}"' in text(ROOT / "pyproject.toml"), line
    elif program.endswith(".py"):
        assert (ROOT / program).is_file(), line
    else:
        files = [w for w in words if "/" in w]
        assert files and all((ROOT / f).is_file() for f in files), f"teach this test about: {line}"


def parse(words: list[str]) -> None:
    """A command line of ``bgkernels``; capitals stand for what the reader fills in."""
    typer = pytest.importorskip("typer", reason="needs the extra `training`: typer")
    from bgkernels.training.cli import app

    group = typer.main.get_command(app)
    if not words or words[0].isupper():
        return
    command = group.commands[words[0]]
    context = type(group).context_class(command)
    command.make_parser(context).parse_args([w for w in words[1:] if w != "--help"])


def column(page: Path, heading: str, index: int = 0) -> list[str]:
    """The cells of a table's column, below the header that starts with ``heading``."""
    body = text(page).partition(f"\n{heading}")[2].split("\n\n")[0].splitlines()[2:]
    return [row.strip("|").split("|")[index].strip() for row in body]


def names(cells: list[str]) -> set[str]:
    """The names in code of some cells, without their arguments."""
    return {n for cell in cells for n in re.findall(r"`([\w-]+)(?:\([^`]*\))?`", cell)}


def test_tables_name_what_is_registered() -> None:
    divergences, policies = set(bg.divergences.registry), set(bg.routing.registry)
    assert names(column(DOCS / "choosing.md", "| policy |")) == policies
    assert names(column(DOCS / "choosing.md", "| divergence |")) == divergences
    assert names(column(DOCS / "mathematics.md", "| name | value |")) == divergences
    features = dict(re.findall(r"^\| \*\*(\w+)\*\* \| (.*)", text(DOCS / "features.md"), re.M))
    assert names([features["Divergences"]]) == divergences
    assert names([features["Routing"]]) == policies
    methods = names(column(DOCS / "training.md", "| kind | methods |", 1))
    assert {n for n in methods if not n.startswith("--")} == set(METHODS)
    fields = {f.name for f in dataclasses.fields(NumpyRowStats)}
    assert names(column(DOCS / "integrations" / "numpy.md", "| field |")) == fields


def test_quoted_figures_are_those_of_the_study() -> None:
    """The page about choosing repeats rows of the study, of its second size of student."""
    rows = [
        [cell.split("±")[0].strip() for cell in line.strip("|").split("|")]
        for line in text(DOCS / "study.md").partition("| 24 hidden units")[2].splitlines()
        if line.startswith("|")
    ]
    known = {row[0]: [row[1], row[2], row[3], row[6]] for row in rows if len(row) > 6}
    page = DOCS / "choosing.md"
    quoted = zip(*(column(page, "| by |", i) for i in range(5)), strict=True)
    for name, *figures in quoted:
        assert known[name] == figures, name


def test_blocks_of_benchmarks_are_those_of_the_results() -> None:
    source = re.search(r"from `([^`]+\.json)`", text(DOCS / "benchmarks.md"))
    assert source
    results = json.loads(text(ROOT / source[1]))
    for page, block in {
        "README.md": headline(results),
        "docs/choosing.md": choices(results),
    }.items():
        assert f"{BEGIN}\n{block}\n{END}" in text(ROOT / page), page


def anchors(page: Path) -> set[str]:
    """Identifiers of a page's headings, and what its reference describes."""
    prose = re.sub(r"^( *)```.*?^\1```", "", text(page), flags=re.M | re.S)
    found = set()
    for heading in re.findall(r"^#+ (.*)", prose, re.M):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-"))
    return found | set(re.findall(r"^::: (\S+)", prose, re.M))


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "CHANGELOG.md", ROOT / "SECURITY.md"], ids=lambda p: p.stem
)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text(page)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        if anchor:
            known = anchors(path)
            assert anchor in known or any(anchor.startswith(f"{x}.") for x in known), target


def test_ten_questions_are_answered_two_clicks_from_the_readme() -> None:
    """The first click opens the questions, the second each answer."""
    assert "(docs/faq.md)" in text(ROOT / "README.md")
    questions = column(DOCS / "faq.md", "| question |")
    answers = column(DOCS / "faq.md", "| question |", 1)
    assert len(questions) == 10
    for question, answer in zip(questions, answers, strict=True):
        assert re.search(r"\]\(\S+\)", answer), f"{question} has no link"


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    for package in ("mkdocs", "mkdocstrings", "ziamath"):
        pytest.importorskip(package, reason=f"needs the extra `docs`: {package}")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        fetched = re.findall(
            r'<(?:script|link|img)[^>]*(?:src|href)="(?:https?:)?//[^"]*"', text(page)
        )
        assert not fetched, f"{page} fetches {fetched}"
        assert "arithmatex" not in text(page), f"{page} has a formula that was not drawn"


INTEGRATIONS = sorted((ROOT / "bgkernels" / "integrations").glob("[a-z]*.py"))


@pytest.mark.parametrize("name", [p.stem for p in INTEGRATIONS])
def test_examples_run(name: str) -> None:
    """The doctests of the integrations, each where its package is installed."""
    if name in ("transformers", "trl", "lightning"):
        pytest.importorskip(name, reason=f"needs the extra `integrations`: {name}")
    pytest.importorskip("transformers", reason="needs the extra `training`: transformers")
    module = importlib.import_module(f"bgkernels.integrations.{name}")
    assert doctest.testmod(module).failed == 0
