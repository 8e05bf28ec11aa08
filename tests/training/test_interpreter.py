"""The interpreter prints what Python prints, and refuses by name what is not of the subset."""

from __future__ import annotations

import contextlib
import io
import random
import time

import pytest

from bgkernels.training.tasks.interpreter import LENGTH, ProgramError, run_program

PROGRAMS = [
    "print(a + b * 3 - a // 2 % 5)",
    "if a > b:\n    print(a)\nelif a == b:\n    print(0)\nelse:\n    print(b)",
    "x = 0\nfor i in range(5):\n    if i % 2 == 0 and i != 2 or not a:\n        x += i\nprint(x)",
    "x = 1\nwhile x < 100:\n    x *= 2\n    pass\nprint(x)\nprint(-x)",
    "for i in range(2, 20, a + 20):\n    print(i)",
    "print(1 < a <= 9)\nprint(a != b)\nprint(True)",
    "print(a or b)\nprint(a and b)\nprint(not a)",
    "for i in range(3):\n  for j in range(i):\n    print(i * 10 + j)",
    "x = a - 7\nx //= 2\nx %= 3\nx -= b\nprint(x)",
]


def by_python(source: str, inputs: dict[str, int]) -> list[int]:
    """What Python itself prints."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(source, {}, dict(inputs))
    return [int(eval(line)) for line in said.getvalue().splitlines()]


@pytest.mark.parametrize("source", PROGRAMS)
def test_prints_what_python_prints(source) -> None:
    draw = random.Random(0)
    for _ in range(20):
        inputs = {"a": draw.randint(-9, 9), "b": draw.randint(-9, 9)}
        assert run_program(source, inputs) == by_python(source, inputs)


def test_inputs_are_left_alone() -> None:
    inputs = {"a": 1}
    run_program("a = 5", inputs)
    assert inputs == {"a": 1}


FOREIGN = {
    "import os": "Import", "__import__('os')": "Call", "x = [1]": "List", "x = {1}": "Set",
    "x = {}": "Dict", "x = 2 ** 9": "Pow", "x = 1 << 9": "LShift", "x = a.real": "Attribute",
    "x = lambda: 0": "Lambda", "def f(): pass": "FunctionDef", "x = y = 1": "Assign",
    "x = 1.5": "Constant", "x = 'a'": "Constant", "print(*a)": "Starred", "a + 1": "BinOp",
    "x[0] = 1": "Subscript", "x = f'{a}'": "JoinedStr", "x: int = 1": "AnnAssign",
    "for i in a: pass": "Name", "print(a, sep=1)": "Call", "x = ~a": "Invert", "del a": "Delete",
    "for i in range(2): pass\nelse: pass": "For", "while 0: pass\nelse: pass": "While",
    "x = a if b else 1": "IfExp", "x = a is b": "Is", "try: pass\nexcept: pass": "Try",
    "(x := 3)": "NamedExpr", "assert a": "Assert", "exit()": "Call", "x += 1j": "Constant",
}  # fmt: skip


@pytest.mark.parametrize("source, name", FOREIGN.items())
def test_what_is_not_of_the_subset_is_named(source, name) -> None:
    with pytest.raises(ProgramError, match=f"no such {name}"):
        run_program(source, {"a": 1, "b": 2, "x": 3})


ENDLESS = {
    "while 1: pass": "10000 steps",
    "while 1:\n  while 1: pass": "10000 steps",
    "for i in range(999999999999999): pass": "10000 steps",
    "for i in range(99999):\n for j in range(99999):\n  a = 1": "10000 steps",
    "while 1: a = a * a + a": "2^63",
    "x = " + "9" * 3000: "2^63",
    "x = " + "9" * LENGTH: "characters",
    "x = " + "-" * 3900 + "1": "nested too deeply",
    "x = " + "(" * 250 + "1" + ")" * 250: "nested parentheses",
    "x = " + "+".join(["1"] * 1900): "nested too deeply",
    "x = 1 +": "cannot be parsed",
    "\0": "cannot be parsed",
    "  x = 1": "cannot be parsed",
    "x = 1 // (a - a)": "divides by zero",
    "x = 1 % (a - a)": "divides by zero",
    "print(z)": "reads 'z' before it is set",
    "z += 1": "reads 'z' before it is set",
    "for i in range(1, 2, 0): pass": "must not be zero",
    "print()": "takes 1 to 1 arguments",
    "for i in range(): pass": "takes 1 to 3 arguments",
}


@pytest.mark.parametrize("source", ENDLESS, ids=range(len(ENDLESS)))
def test_every_program_ends_with_a_reason(source) -> None:
    started = time.process_time()
    with pytest.raises(ProgramError, match=ENDLESS[source].replace("^", r"\^")):
        run_program(source, {"a": 2})
    assert time.process_time() - started < 20  # a program that hangs would never come here


def test_random_text_never_does_anything_but_end() -> None:
    """Pieces of programs in any order: an error of ours, or numbers."""
    draw = random.Random(1)
    pieces = ["a", "b", "1", "23", " = ", " + ", " * ", "if ", "while ", "for i in range(", ")",
              ":", "\n", " ", "print(", "(", "not ", " < ", "-", "x", "__import__", "'os'", ".",
              "[", "]", "lambda ", "0", "**", "//", "%"]  # fmt: skip
    ended = 0
    for _ in range(1500):
        source = "".join(draw.choice(pieces) for _ in range(draw.randint(1, 14)))
        try:
            printed = run_program(source, {"a": 1, "b": 2})
        except ProgramError:
            ended += 1
        else:
            assert all(type(x) is int for x in printed), source
    assert ended > 0
