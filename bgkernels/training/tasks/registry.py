"""The tasks by name, with their knobs."""

from __future__ import annotations

import dataclasses
from typing import Any

from bgkernels.training.errors import OptionError
from bgkernels.training.tasks.arithmetic import Arithmetic
from bgkernels.training.tasks.base import Task
from bgkernels.training.tasks.programs import Programs

TASKS: dict[str, type[Task]] = {"arithmetic": Arithmetic, "programs": Programs}
"""By the name that the command line knows; the fields of each class are its knobs."""


def find(name: str, **knobs: Any) -> Task:
    """The task of a name.

    Args:
        name: a key of :data:`TASKS`.
        **knobs: of its length and difficulty, the fields of its class; the others keep defaults.

    Raises:
        OptionError: there is no such task or knob, or a knob is out of range.

    Example:
        >>> find("arithmetic", terms=6).terms
        6
    """
    if name not in TASKS:
        raise OptionError(f"a task must be one of {', '.join(TASKS)}; got {name!r}")
    known = {field.name: field.type for field in dataclasses.fields(TASKS[name])}
    for knob in knobs:
        if knob not in known:
            raise OptionError(
                f"the task {name!r} has no knob {knob!r}; it has {', '.join(known) or 'none'}"
            )
    return TASKS[name](**knobs)


def parse(text: str) -> Task:
    """The task of a command line: a name, or ``name:knob=value,knob=value``.

    Raises:
        OptionError: as of :func:`find`, or what follows the name is not such a list.

    Example:
        >>> parse("arithmetic:terms=3,operations=+-").operations
        '+-'
    """
    name, _, rest = text.partition(":")
    knobs: dict[str, Any] = {}
    for part in rest.split(",") if rest else []:
        knob, equals, value = part.partition("=")
        if not equals:
            raise OptionError(f"--task must be a name, or name:knob=value,knob=value; got {text!r}")
        knobs[knob.strip()] = int(value) if value.strip().isdigit() else value.strip()
    return find(name, **knobs)
