"""Rules of the tree: who may import whom, sizes, docstrings and their examples."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import bgkernels as bg

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "bgkernels"
CORE = sorted(p for p in PACKAGE.glob("*.py"))
BACKENDS = sorted((PACKAGE / "backends").glob("*.py"))
TRAINING = sorted((PACKAGE / "training").rglob("*.py"))
LABELS = sorted((PACKAGE / "labels").glob("*.py"))
INTEGRATIONS = sorted((PACKAGE / "integrations").glob("*.py"))

LAYERS = (
    {"spec", "registry", "oracle", "streams"},
    {"state", "sampling"},
    {"stats"},
    {"risk", "divergences", "sources", "vjp"},
    {"routing", "teachers"},
    {"objective", "backends", "gemm", "checks", "teacher_checks", "distributed", "dtensor"},
    {"heads", "planner", "options"},
    {"comparison", "topk", "mixture"},
    {"driver"},
    {"passes"},
    {"autograd", "ops", "flatten"},
    {"problem"},
    {"reduction", "truncation"},
    {"functional"},
    {"modules", "config", "numpy"},
    {"__init__"},
)
"""Lower layers first: a module imports from lower layers, or beside itself."""


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, anywhere in it, by full name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own(path: Path) -> set[str]:
    """First component below ``bgkernels`` of what a file imports."""
    found = (name.split(".") for name in imports(path) if name.startswith("bgkernels"))
    return {parts[1] if len(parts) > 1 else "__init__" for parts in found}


def level(module: str) -> int:
    found = [i for i, layer in enumerate(LAYERS) if module in layer]
    assert found, f"{module} has no place in the layers"
    return found[0]


@pytest.mark.parametrize("path", CORE, ids=lambda p: p.stem)
def test_layers_point_downwards(path: Path) -> None:
    modules = {p.stem for p in CORE} | {"backends"}
    upwards = [m for m in own(path) & modules if level(m) > level(path.stem)]
    if path.stem == "config":  # reads the version when it is called
        upwards = [m for m in upwards if m != "__init__"]
    assert not upwards, f"{path.stem} imports {upwards}, which are above it"


def test_backends_know_rows_only() -> None:
    allowed = {"spec", "state", "stats", "vjp", "sampling", "checks", "backends", "_C"}
    for path in BACKENDS:
        assert own(path) <= allowed, f"{path.name} imports {own(path) - allowed}"


def test_the_oracle_shares_nothing() -> None:
    assert not own(PACKAGE / "oracle.py")
    names = {name.split(".")[0] for name in imports(PACKAGE / "oracle.py")}
    assert names - set(sys.stdlib_module_names) == {"torch"}


def test_training_and_integrations_use_the_public_api() -> None:
    for path in INTEGRATIONS:
        allowed = {"integrations", "__init__"} | ({"labels"} if path.stem == "labels" else set())
        assert own(path) <= allowed, f"{path.name} imports {own(path)}"
    for path in TRAINING:
        allowed = {"training", "integrations", "__init__"}
        allowed |= {"labels"} if path.stem == "cli" else set()
        assert own(path) <= allowed, f"{path.name} imports {own(path)}"


def test_labels_use_the_public_api_and_training() -> None:
    public = {"labels", "training", "__init__", *bg.__all__}
    for path in LABELS:
        assert own(path) <= public, f"{path.name} imports {own(path)}"


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


def test_no_machine_paths() -> None:
    pattern = re.compile(r"(?<![\w.~])/(work|home|root|Users|opt|mnt)/\w")
    for path in tracked():
        if path.suffix in SOURCES | {".md", ".toml", ".txt", ".json", ".yaml", ".yml"}:
            found = pattern.search(path.read_text(encoding="utf-8"))
            assert found is None, f"{path}: {found and found.group(0)}"


MODULES = [
    "bgkernels" if p.stem == "__init__" else ".".join(p.relative_to(ROOT).with_suffix("").parts)
    for p in [*CORE, *BACKENDS, *TRAINING, *LABELS]
    if p.stem != "__main__"
]


@pytest.mark.parametrize("name", [m for m in MODULES if "triton" not in m])
def test_examples_run(name: str) -> None:
    module = importlib.import_module(name.removesuffix(".__init__"))
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
    assert "torch" not in {name.split(".")[0] for name in imports(ROOT / "setup.py")}
