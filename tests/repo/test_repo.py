"""Rules of the tree: who may import whom, sizes, docstrings and their examples."""

from __future__ import annotations

import doctest
import functools
import importlib
import inspect
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import bgkernels as bg
from tests.tree import PACKAGE, ROOT, imported, module_name, names

PUBLIC = "the public files"
AROUND = ("integrations", "labels", "training", "vocabularies")
CORE = [p for p in sorted(PACKAGE.rglob("*.py")) if p.relative_to(PACKAGE).parts[0] not in AROUND]
LAYERS = ("rows", "backends", "streaming", "loss", PUBLIC)
"""Each imports only those before it."""
ABOVE = {
    "integrations": {"integrations", "labels", "vocabularies"},
    "training": {"training", "integrations", "labels", "vocabularies"},
    "labels": {"labels", "training", "vocabularies"},
    "vocabularies": {"vocabularies"},
}
"""What each part around the core imports, beside the public API."""


def layer(module: str) -> str:
    """The folder of the package that a module is in; a file at its root is public."""
    first = (*module.split("."), "")[1]
    return first if (PACKAGE / first).is_dir() and first else PUBLIC


@pytest.mark.parametrize("path", CORE, ids=lambda p: module_name(p))
def test_layers_import_those_before_them(path: Path) -> None:
    here = LAYERS.index(layer(module_name(path)))
    above = [m for m in imported(path) if layer(m) not in LAYERS[: here + 1]]
    if path.parent.name == "backends":  # show_config reads the version when it is called
        above = [m for m in above if m != "bgkernels"]
    assert not above, f"{path.name} imports {above}"


@pytest.mark.parametrize("part", ABOVE)
def test_the_parts_around_the_core_use_the_public_api(part: str) -> None:
    for path in (PACKAGE / part).rglob("*.py"):
        others = {layer(m) for m in imported(path)} - {PUBLIC} - ABOVE[part]
        assert not others, f"{path} imports {others}"


def test_the_root_of_the_package_is_what_users_import() -> None:
    entries = {p.name for p in PACKAGE.iterdir() if p.name != "__pycache__"}
    assert len(entries) <= 18, sorted(entries)


LEVELS = 21
"""No chain is longer than it is today; the aim is 9."""


def test_imports_of_the_core_are_shallow() -> None:
    """The longest chain of modules, each of which runs when the next is imported."""
    edges = {module_name(p): set(imported(p, later=False)) for p in CORE}

    @functools.cache
    def chain(module: str) -> tuple[str, ...]:
        below = (chain(m) for m in edges.get(module, ()) if m not in ("bgkernels", module))
        return (*max(below, key=len, default=()), module)

    longest = max(map(chain, edges), key=len)
    assert len(longest) <= LEVELS, longest


def test_no_test_is_the_library_of_another() -> None:
    """What several need is in a module of ``tests`` whose name does not begin with ``test_``."""
    for path in [*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        shared = [n for n in names(path) if re.match(r"(tests|benchmarks)\..*\btest_", n)]
        assert not shared, f"{path} imports {shared}"


def test_csrc_sees_neither_torch_nor_python() -> None:
    for path in (ROOT / "csrc").rglob("*.*"):
        included = re.findall(r'#\s*include\s*[<"]([^>"]+)', path.read_text(encoding="utf-8"))
        assert not [x for x in included if re.match(r"(torch|ATen|c10)/", x)], path
        if path.name not in ("bind.cpp", "bind.h", "bind_cuda.cpp"):
            assert not [x for x in included if re.match(r"(pybind11/|Python\.h)", x)], path


def tracked() -> list[Path]:
    """Files under version control, or, outside a checkout, the sources there are."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0 and listed.stdout:
        found = [ROOT / line for line in listed.stdout.splitlines()]
        return [p for p in found if p.is_file()]
    folders = ("bgkernels", "csrc", "tests", "benchmarks")
    return [p for f in folders for p in (ROOT / f).rglob("*.*") if "__pycache__" not in p.parts]


SOURCES = {".py", ".cpp", ".h", ".inl", ".cu", ".cuh"}


def test_files_are_short() -> None:
    lines = {
        p: len(p.read_text(encoding="utf-8").splitlines()) for p in tracked() if p.suffix in SOURCES
    }
    assert not {p: n for p, n in lines.items() if n > 400}
    for folder in ("bgkernels", "csrc"):
        inside = [n for p, n in lines.items() if ROOT / folder in p.parents]
        assert statistics.median(inside) <= 150, folder


def test_no_machine_paths() -> None:
    pattern = re.compile(r"(?<![\w.~])/(work|home|root|Users|opt|mnt)/\w")
    for path in tracked():
        if path.suffix in SOURCES | {".md", ".toml", ".txt", ".json", ".yaml", ".yml"}:
            found = pattern.search(path.read_text(encoding="utf-8"))
            assert found is None, f"{path}: {found and found.group(0)}"


MODULES = [
    module_name(p)
    for p in sorted(PACKAGE.rglob("*.py"))
    if p.stem != "__main__" and "integrations" not in p.parts
]
"""The integrations have their examples run with those of their pages."""


@pytest.mark.parametrize("name", [m for m in MODULES if "triton" not in m])
def test_examples_run(name: str) -> None:
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0


def test_everything_public_is_documented() -> None:
    for name in bg.__all__:
        thing = getattr(bg, name)
        assert inspect.getdoc(thing), name
    for registry in (bg.divergences, bg.routing):
        for entry in registry.registry:
            assert inspect.getdoc(getattr(registry, entry)), entry


def test_import_needs_torch_and_numpy_alone() -> None:
    blocked = ("triton", "transformers", "tokenizers", "matplotlib", "rich", "typer", "pyarrow")
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); import bgkernels"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_build_does_not_mention_torch() -> None:
    code = [line.split("#")[0] for line in (ROOT / "CMakeLists.txt").read_text().splitlines()]
    assert "torch" not in "\n".join(code)
    assert "torch" not in {name.split(".")[0] for name in names(ROOT / "setup.py")}
