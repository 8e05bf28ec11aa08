"""An interpreter of a small subset of Python, for programs that nobody has read.

A program is parsed by :mod:`ast` and walked; nothing of it is ever executed by Python itself. It
has whole numbers, assignments, arithmetic, comparisons, ``if``, ``for … in range(…)``, ``while``
and ``print``. Steps and sizes of numbers are bounded, so every program ends.
"""

from __future__ import annotations

import ast
import operator
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from bgkernels.training.errors import TrainingError

STEPS, SIZE, LENGTH = 10_000, 2**63, 4_000
"""Most nodes that are visited, bound of a number, most characters of a program."""

ARITHMETIC: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
COMPARISONS: dict[type[ast.cmpop], Callable[[int, int], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}


class ProgramError(TrainingError):
    """A program is not of the subset, fails, or takes too long; the message says which."""


def run_program(source: str, inputs: Mapping[str, int]) -> list[int]:
    r"""What a program prints.

    Args:
        source: of the program.
        inputs: variables that it finds, by name.

    Raises:
        ProgramError: it cannot be parsed, has something that the subset lacks, divides by zero,
            reads a variable that is not set, makes a number of 2⁶³ or more, or takes more than
            10,000 steps.

    Example:
        >>> run_program("for i in range(3):\n    a = a + i\nprint(a)", {"a": 4})
        [7]
    """
    if len(source) > LENGTH:
        raise ProgramError(f"a program must have at most {LENGTH} characters; got {len(source)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's, about what the program may mean
            tree = ast.parse(source)
        machine = _Machine(inputs)
        machine.block(tree.body)
    except (SyntaxError, ValueError, MemoryError) as error:
        raise ProgramError(f"the program cannot be parsed: {error}") from None
    except RecursionError:
        raise ProgramError("the program is nested too deeply") from None
    return machine.printed


class _Machine:
    """Variables, steps done, and what has been printed."""

    def __init__(self, inputs: Mapping[str, int]) -> None:
        self.variables, self.steps = dict(inputs), 0
        self.printed: list[int] = []

    def block(self, body: list[ast.stmt]) -> None:
        for statement in body:
            self._visit(statement)

    def _visit(self, node: ast.AST) -> Any:
        """Do a statement, or find the value of an expression."""
        self.steps += 1
        if self.steps > STEPS:
            raise ProgramError(f"the program takes more than {STEPS} steps; does it loop?")
        visit = getattr(self, f"_{type(node).__name__.lower()}", None)
        if visit is None:
            raise _foreign(node)
        return visit(node)

    def _assign(self, node: ast.Assign) -> None:
        if len(node.targets) != 1:
            raise _foreign(node)
        self._put(node.targets[0], self._visit(node.value))

    def _augassign(self, node: ast.AugAssign) -> None:
        name = node.target
        if not isinstance(name, ast.Name):
            raise _foreign(name)
        self._put(name, self._calculate(node.op, self._name(name), self._visit(node.value)))

    def _put(self, target: ast.AST, value: int) -> None:
        if not isinstance(target, ast.Name):
            raise _foreign(target)
        self.variables[target.id] = value

    def _if(self, node: ast.If) -> None:
        self.block(node.body if self._visit(node.test) else node.orelse)

    def _while(self, node: ast.While) -> None:
        if node.orelse:
            raise _foreign(node)
        while self._visit(node.test):
            self.block(node.body)

    def _for(self, node: ast.For) -> None:
        bounds = [self._visit(x) for x in _arguments(node.iter, "range", 3)]
        if node.orelse:
            raise _foreign(node)
        if bounds[2:] == [0]:
            raise ProgramError("the third argument of range must not be zero")
        for value in range(*bounds):
            self._put(node.target, value)
            self.steps += 1
            self.block(node.body)

    def _expr(self, node: ast.Expr) -> None:
        (value,) = _arguments(node.value, "print", 1)
        self.printed.append(self._visit(value))

    def _pass(self, node: ast.Pass) -> None:
        pass

    def _name(self, node: ast.Name) -> int:
        if node.id not in self.variables:
            raise ProgramError(f"the program reads {node.id!r} before it is set")
        return self.variables[node.id]

    def _constant(self, node: ast.Constant) -> int:
        if type(node.value) not in (int, bool):
            raise _foreign(node)
        return _sized(int(node.value))  # type: ignore[arg-type]

    def _binop(self, node: ast.BinOp) -> int:
        return self._calculate(node.op, self._visit(node.left), self._visit(node.right))

    def _calculate(self, sign: ast.operator, left: int, right: int) -> int:
        function = ARITHMETIC.get(type(sign))
        if function is None:
            raise _foreign(sign)
        try:
            return _sized(function(left, right))
        except ZeroDivisionError:
            raise ProgramError("the program divides by zero") from None

    def _unaryop(self, node: ast.UnaryOp) -> int:
        value: int = self._visit(node.operand)
        if isinstance(node.op, ast.Not):
            return int(not value)
        if isinstance(node.op, ast.USub):
            return -value
        raise _foreign(node.op)

    def _compare(self, node: ast.Compare) -> int:
        left = self._visit(node.left)
        for sign, other in zip(node.ops, node.comparators, strict=True):
            function = COMPARISONS.get(type(sign))
            if function is None:
                raise _foreign(sign)
            right = self._visit(other)
            if not function(left, right):
                return 0
            left = right
        return 1

    def _boolop(self, node: ast.BoolOp) -> int:
        decided = isinstance(node.op, ast.Or)
        value = 0
        for operand in node.values:
            value = self._visit(operand)
            if bool(value) == decided:
                break
        return value


def _arguments(node: ast.expr, name: str, most: int) -> list[ast.expr]:
    """The arguments of a plain call of this function, at least one and at most so many."""
    called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name
    if not isinstance(node, ast.Call) or not called or node.keywords:
        raise _foreign(node)
    if not 1 <= len(node.args) <= most:
        raise ProgramError(
            f"{name} takes 1 to {most} arguments; the program gives {len(node.args)}"
        )
    return node.args


def _sized(value: int) -> int:
    if not -SIZE < value < SIZE:
        raise ProgramError("the program makes a number of 2^63 or more")
    return value


def _foreign(node: ast.AST) -> ProgramError:
    line = getattr(node, "lineno", None)
    where = f" in line {line}" if line else ""
    return ProgramError(f"the subset of Python has no such {type(node).__name__}{where}")
