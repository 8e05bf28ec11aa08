"""What all commands share: configuration files, error messages, and exit statuses."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

from bgkernels.training.errors import Interrupted, OptionError, TrainingError, extra

try:
    with extra():
        import typer
        from rich.console import Console
        from rich.logging import RichHandler
        from rich.markup import escape
except TrainingError as error:
    sys.exit(f"error: {error}")

__all__ = ["ConfigFile", "Console", "changed", "reported", "typer"]

T = TypeVar("T")


def changed(config: T, **given: Any) -> T:
    """The configuration with the options that were given; None means not given."""
    values = {key: value for key, value in given.items() if value is not None}
    return replace(config, **values)  # type: ignore[type-var]


@contextmanager
def reported(console: Console) -> Iterator[None]:
    """Show what goes wrong in the block as one message, and leave with a status.

    Warnings of the package, a corrupt checkpoint for one, go to the same place, above the bars.
    """
    handler = RichHandler(console=console, show_time=False, show_path=False)
    logging.getLogger("bgkernels").handlers = [handler]
    try:
        yield
    except Interrupted as stop:
        console.print(f"[yellow]{escape(str(stop))}[/]", highlight=False)
        raise typer.Exit(128 + stop.signum) from None
    except TrainingError as problem:
        console.print(f"[bold red]error:[/] {escape(str(problem))}", highlight=False)
        raise typer.Exit(1) from None


def read_options(path: Path) -> dict[str, Any]:
    """Options from a YAML or JSON file: a mapping from their names, dashes or underscores.

    Raises:
        OptionError: it cannot be read, or is not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else _yaml(text)
    except (OSError, ValueError) as error:
        raise OptionError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise OptionError(
            f"--config {path} must be a mapping from option names to values, such as "
            f"`steps: 2000`; it is a {type(values).__name__}"
        )
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def _yaml(text: str) -> Any:
    with extra():
        import yaml  # type: ignore[import-untyped]  # stubs would be a package for one call
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _apply(context: typer.Context, path: Path | None) -> Path | None:
    """Make the file's values the defaults of the other options."""
    if path is None:
        return None
    known = {str(p.name) for p in context.command.params} - {"config"}
    try:
        values = read_options(path)
        if unknown := sorted(values.keys() - known):
            raise OptionError(
                f"--config {path} names {unknown[0]!r}, which is no option of "
                f"`{context.info_name}`; there are: {', '.join(sorted(known))}"
            )
    except TrainingError as problem:
        raise typer.BadParameter(str(problem)) from None
    context.default_map = {**(context.default_map or {}), **values}
    return path


ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        callback=_apply,
        is_eager=True,
        dir_okay=False,
        help="YAML or JSON file of options by name; those given here win.",
        show_default=False,
    ),
]
"""The ``--config`` option, the same for every command."""
