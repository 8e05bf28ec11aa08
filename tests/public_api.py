"""The public API as text: every name that users may rely on, with its signature.

``python -m tests.public_api`` writes ``tests/api/present.txt``, and ``test_public_api.py`` compares
it. It is read from the sources, so that it is the same under every version of Python and torch, and
needs no extra but for the command line.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import bgkernels

PACKAGE = Path(bgkernels.__file__).parent
PRESENT = Path(__file__).parent / "api" / "present.txt"
EXPORTING = ("", "labels", "teachers", "vocabularies")
"""Packages whose ``__all__`` is public, wherever its names are defined."""
WHOLE = ("divergences", "functional", "modules", "numpy", "registry", "routing")
"""Modules all of whose names are public but for those that begin with an underscore."""
CHOSEN = {
    "distributed": ("global_num_items",),
    "integrations.served.head": ("CheckpointHead", "read_head"),
    "integrations.served.teacher": ("ServedTeacher",),
    "labels.served.client": ("Client",),
    "training.models": ("CausalLM", "load_pretrained"),  # teachers of `labels.generate`
}
"""Of other modules, the names that the pages use."""
PASSED_ON = {
    "divergences": ("Divergence",),
    "routing": ("Policy", "Weight", "Weights"),
}
"""Names that a public module has from another."""
MACHINERY = ("rows.extras", "streaming")
"""Where classes are defined that users only make: their methods are the library's business."""
PROTOCOLS = ("__call__", "__contains__", "__getitem__", "__iter__", "__len__")


def parse(module: str) -> ast.Module:
    """The source of a module or package, by its name below ``bgkernels``."""
    path = PACKAGE.joinpath(*module.split("."))
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(source.read_text(encoding="utf-8"))


def full(module: str, name: str) -> str:
    return ".".join(filter(None, ("bgkernels", module, name)))


def definitions(tree: ast.Module) -> dict[str, ast.stmt]:
    """What a module defines itself, by name, in order."""
    found: dict[str, ast.stmt] = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            found[ast.unparse(target)] = node
    return found


def public(name: str) -> bool:
    """Not private; constants and type variables are in capitals, and are nobody's business."""
    return name in PROTOCOLS or not (name.startswith("_") or name.isupper())


def decorated(node: ast.FunctionDef | ast.ClassDef, name: str) -> bool:
    return any(ast.unparse(d).split("(")[0].endswith(name) for d in node.decorator_list)


def parameters(a: ast.arguments, *, bound: bool = False) -> list[str]:
    """The parameters of a function; of a method, without the first."""

    def shown(arg: ast.arg, default: ast.expr | None) -> str:
        equals = " = " if arg.annotation else "="
        return ast.unparse(arg) + (equals + ast.unparse(default) if default else "")

    positional = [*a.posonlyargs, *a.args]
    missing = [None] * (len(positional) - len(a.defaults))
    found = [*map(shown, positional, [*missing, *a.defaults])]
    if a.posonlyargs:
        found.insert(len(a.posonlyargs), "/")
    if a.vararg or a.kwonlyargs:
        found.append("*" + (ast.unparse(a.vararg) if a.vararg else ""))
    found += map(shown, a.kwonlyargs, a.kw_defaults)
    found += ["**" + ast.unparse(a.kwarg)] if a.kwarg else []
    return found[bound:]


def called(name: str, parts: list[str], returns: str) -> str:
    """A signature, on a line of its own or with a line for each parameter."""
    line = f"{name}({', '.join(parts)}){returns}"
    if len(line) <= 100:
        return line
    return "\n    ".join([f"{name}(", *(f"{part}," for part in parts)]) + f"\n){returns}"


def function(name: str, node: ast.FunctionDef, *, bound: bool = False) -> str:
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    if decorated(node, "property"):
        return name + returns.replace(" -> ", ": ")
    bound = bound and not decorated(node, "staticmethod")
    return called(name, parameters(node.args, bound=bound), returns)


def members(node: ast.ClassDef, scope: dict[str, ast.stmt]) -> Iterator[ast.stmt]:
    """The body of a class, and that of the private classes of its module that it extends."""
    for base in node.bases:
        inner = scope.get(ast.unparse(base))
        if isinstance(inner, ast.ClassDef) and inner.name.startswith("_"):
            yield from members(inner, scope)
    yield from node.body


def cls(name: str, node: ast.ClassDef, scope: dict[str, ast.stmt]) -> Iterator[str]:
    """A class: how it is made and what it extends, then its methods and properties."""
    body = list(members(node, scope))
    fields = [
        ast.unparse(x) for x in body
        if isinstance(x, ast.AnnAssign) and not ast.unparse(x.target).startswith("_")
    ]  # fmt: skip
    methods = {x.name: x for x in body if isinstance(x, ast.FunctionDef)}
    if "__init__" in methods:
        made, fields = parameters(methods["__init__"].args, bound=True), []
    elif decorated(node, "dataclass"):
        made, fields = fields, []
    else:
        made = []
    bases = [ast.unparse(base) for base in node.bases if public(ast.unparse(base))]
    yield called(name, made, f": {', '.join(bases)}" if bases else "")
    yield from (f"{name}.{field}" for field in fields)
    for own, method in methods.items():
        if public(own):
            yield function(f"{name}.{own}", method, bound=True)


def entry(name: str, node: ast.stmt, scope: dict[str, ast.stmt]) -> Iterator[str]:
    """The lines of one definition."""
    if isinstance(node, ast.FunctionDef):
        yield function(name, node)
    elif isinstance(node, ast.ClassDef):
        yield from cls(name, node, scope)
    elif isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value:
        yield f"{name} = {ast.unparse(node.value)}"


def exports(package: str) -> Iterator[tuple[str, str, str]]:
    """``(name, module, name there)`` of what a package exports from modules of ours."""
    tree = parse(package)
    listed = set(PASSED_ON.get(package, ()))
    if not listed:
        listed = set(ast.literal_eval(definitions(tree)["__all__"].value))
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            module = (node.module or "").partition(".")[2]
            yield from ((x.name, module, x.name) for x in node.names if x.name in listed)


def python_api() -> Iterator[str]:
    """Every public name of the package."""
    integrations = sorted(p.stem for p in (PACKAGE / "integrations").glob("[a-z]*.py"))
    wanted: dict[str, set[str] | None] = {m: None for m in WHOLE}
    wanted |= {f"integrations.{stem}": None for stem in integrations}
    wanted |= {module: set(names) for module, names in CHOSEN.items()}
    for package in (*EXPORTING, *PASSED_ON):
        for name, module, there in exports(package):
            origin = full(module, there)
            if full(package, name) != origin:  # which is a module
                yield f"{full(package, name)} = {origin}"
            if module and wanted.setdefault(module, set()) is not None:
                wanted[module].add(there)
    for module, names in wanted.items():
        scope = definitions(parse(module))
        for name, node in scope.items():
            if public(name) and (names is None or name in names):
                lines = entry(full(module, name), node, scope)
                yield next(lines)
                yield from () if module.startswith(MACHINERY) else lines


def command_line() -> Iterator[str]:
    """Every command with its options: what they take, and what they default to."""
    from bgkernels.training.cli import app

    for command in app.registered_commands:
        run: Any = command.callback
        name = f"$ bgkernels {run.__name__.replace('_', '-')}"
        yield name
        for parameter in inspect.signature(run, eval_str=True).parameters.values():
            if not get_args(parameter.annotation):
                continue  # typer's context
            kind, option = get_args(parameter.annotation)
            given = option.default if isinstance(option.default, str) else ""
            flags = given or f"--{parameter.name.replace('_', '-')}"
            kinds = [
                getattr(x, "__name__", repr(x))
                for x in get_args(kind) or (kind,)
                if x is not type(None)
            ]
            required = parameter.default is inspect.Parameter.empty
            default = " (required)" if required else f" = {parameter.default}"
            if isinstance(option.show_default, str):
                default = f" = {option.show_default}"
            yield f"{name} {flags}: {' | '.join(kinds)}{default}"


def snapshot() -> str:
    """The whole API, an entry after the other in the order of the alphabet."""
    return "\n".join(sorted({*python_api(), *command_line()})) + "\n"


if __name__ == "__main__":
    PRESENT.parent.mkdir(exist_ok=True)
    PRESENT.write_text(snapshot(), encoding="utf-8")
