"""The sources as a tree: which module imports which."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "bgkernels"


def module_name(path: Path) -> str:
    """The full name of a module of the package."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def names(path: Path, *, later: bool = True) -> Iterator[str]:
    """The full name of everything that a file imports.

    Args:
        path: of the file.
        later: also within functions, and under ``if TYPE_CHECKING``.
    """
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif later or not runs_later(node):
            waiting += ast.iter_child_nodes(node)


def runs_later(node: ast.AST) -> bool:
    """Whether the statements inside do not run when the module is imported."""
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.unparse(node.test)
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))


def imported(path: Path, *, later: bool = True) -> Iterator[str]:
    """The modules of the package that a file imports, by full name."""
    for name in names(path, later=later):
        if name.partition(".")[0] == "bgkernels":
            yield name if is_module(name) else name.rpartition(".")[0]


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or any(path.with_suffix(s).is_file() for s in (".py", ".pyi"))
