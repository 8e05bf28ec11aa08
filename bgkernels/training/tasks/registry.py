"""The tasks by name, with their parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

from bgkernels.training.errors import OptionError
from bgkernels.training.tasks.arithmetic import Arithmetic
from bgkernels.training.tasks.base import Task
from bgkernels.training.tasks.programs import Programs

TASKS: dict[str, type[Task]] = {"arithmetic": Arithmetic, "programs": Programs}
"""By the name that the command line knows; the fields of each class are its parameters."""


def find(name: str, **parameters: Any) -> Task:
    """The task of a name.

    Args:
        name: a key of :data:`TASKS`.
        **parameters: fields of its class, for length and difficulty; others keep their defaults.

    Raises:
        OptionError: there is no such task or parameter, or a parameter is out of range.

    Example:
        >>> find("arithmetic", terms=6).terms
        6
    """
    if name not in TASKS:
        raise OptionError(f"a task must be one of {', '.join(TASKS)}; got {name!r}")
    known = {field.name: field.type for field in dataclasses.fields(TASKS[name])}
    for parameter in parameters:
        if parameter not in known:
            raise OptionError(
                f"the task {name!r} has no parameter {parameter!r}; "
                f"it has {', '.join(known) or 'none'}"
            )
    return TASKS[name](**parameters)


def parse(text: str) -> Task:
    """The task of a command line: a name, or ``name:parameter=value,...``.

    Raises:
        OptionError: as of :func:`find`, or what follows the name is not such a list.

    Example:
        >>> parse("arithmetic:terms=3,operations=+-").operations
        '+-'
    """
    name, _, rest = text.partition(":")
    parameters: dict[str, Any] = {}
    for part in rest.split(",") if rest else []:
        parameter, equals, value = part.partition("=")
        if not equals:
            raise OptionError(f"--task must be a name, or name:parameter=value,...; got {text!r}")
        parameters[parameter.strip()] = int(value) if value.strip().isdigit() else value.strip()
    return find(name, **parameters)
