"""Tasks whose answers a program checks: as much text as one likes, right or wrong at the end.

A task poses problems, writes right solutions in many wordings, and marks what a model writes. Its
text has *bridges*, where one token is right, and *gardens*, where several are: each task states its
solutions once (:meth:`Task.compose`), to be written with one pen and read with another.

Example:
    >>> task = find("arithmetic", terms=2)
    >>> problem = task.problems("test", 1, seed=0)[0]
    >>> text = task.solve(problem, seed=0)
    >>> task.right(problem, text), task.right(problem, "7")
    (True, False)
"""

from bgkernels.training.tasks.arithmetic import Arithmetic
from bgkernels.training.tasks.base import Problem, Task, Verdict
from bgkernels.training.tasks.exercise import Exercise, exercises, fitted
from bgkernels.training.tasks.programs import Programs
from bgkernels.training.tasks.registry import TASKS, find, parse
from bgkernels.training.tasks.vocabulary import STOP

__all__ = [
    "STOP",
    "TASKS",
    "Arithmetic",
    "Exercise",
    "Problem",
    "Programs",
    "Task",
    "Verdict",
    "exercises",
    "find",
    "fitted",
    "parse",
]
