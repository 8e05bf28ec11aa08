"""The pages under ``docs``: their scripts run as they stand, and their links lead somewhere."""

from __future__ import annotations

import doctest
import importlib
import re
import socket
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
NEEDS = {
    "transformers": ("transformers", "accelerate"),
    "trl": ("trl", "datasets"),
    "lightning": ("lightning", "transformers"),
    "fsdp": ("transformers",),
}
"""Packages of the extra `integrations` that the script of a page imports."""


def blocks(page: Path) -> list[str]:
    """Its fenced Python."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def launched_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``torchrun`` sets for one process, on a port that is free."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(s.getsockname()[1]))
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.stem)
def test_scripts_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in NEEDS.get(page.stem, ()):
        pytest.importorskip(package, reason=f"needs the extra `integrations`: {package}")
    monkeypatch.chdir(tmp_path)
    if page.stem == "fsdp":
        launched_alone(monkeypatch)
    namespace: dict[str, Any] = {"__name__": page.stem}
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    local = [t for t in targets if "://" not in t]
    assert not [t for t in local if not (page.parent / t).exists()]


INTEGRATIONS = sorted((ROOT / "bgkernels" / "integrations").glob("[a-z]*.py"))


@pytest.mark.parametrize("name", [p.stem for p in INTEGRATIONS])
def test_examples_run(name: str) -> None:
    """The doctests of the integrations, each where its package is installed."""
    if name in ("transformers", "trl", "lightning"):
        pytest.importorskip(name, reason=f"needs the extra `integrations`: {name}")
    pytest.importorskip("transformers", reason="needs the extra `training`: transformers")
    module = importlib.import_module(f"bgkernels.integrations.{name}")
    assert doctest.testmod(module).failed == 0
