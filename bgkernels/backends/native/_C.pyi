"""The compiled module: addresses of memory, strides in elements.

A status other than 0 is an error (``csrc/row_args.h``). The submodule ``cuda``, with the same
primitives for device memory, is there where it was built with CUDA.
"""

MAX_EXTRAS: int
CODE_BLOCK: int

Rows = tuple[int, int, int, int]
"""Logits: address, row stride, columns, dtype; address 0 for no such model."""
Corner = tuple[int, int, int]
"""Rows of a tile, its first row and column."""
Numbers = tuple[int, int]
"""A matrix of one number a row in each of its rows: address and stride."""
Codes = tuple[Numbers, Numbers]
"""Words and centres of a tile's code; zeros for none."""
MicroKernels = tuple[int, int]
"""Addresses of a micro-kernel and of what releases it."""
Operand = tuple[int, int, int]
"""Address, strides of rows and columns."""
Factors = tuple[MicroKernels, int, tuple[int, int, int], Operand, Operand]
"""Of a product ``(m, k) @ (k, n)``: the dtype of both, and m, n, k."""
Result = tuple[int, int, bool, bool]
"""Of a product: address, stride, whether it is bf16, whether to add to it."""
Model = tuple[Factors, int] | None
"""Factors of a model's logits, and the address of a bias in fp32 or 0; None: they are given."""
Where = tuple[int, Model, Model]
"""Threads; student and teacher."""

class Spec:
    def __init__(
        self,
        *,
        columns: int,
        compared: int,
        temperature: float,
        shared_softmax: bool,
        logit_sum: bool,
        rule: int,
        key: int,
        student: tuple[float, float],
        teacher: tuple[float, float],
        extras: list[tuple[int, float, float, bool]],
    ) -> None: ...

def absorb(
    spec: Spec,
    student: Rows,
    teacher: Rows,
    corner: Corner,
    codes: Codes,
    floats: Numbers,
    ints: Numbers,
    labels: int,
    where: Where,
    /,
) -> int: ...
def absorb_pairs(
    spec: Spec,
    student: Rows,
    teacher: Rows,
    corner: Corner,
    codes: Codes,
    floats: Numbers,
    labels: int,
    lse_s: int,
    lse_t: int,
    where: Where,
    /,
) -> int: ...
def finalize(
    spec: Spec,
    rows: int,
    floats: Numbers,
    ints: Numbers,
    labels: int,
    out: Numbers,
    where: Where,
    /,
) -> int: ...
def fold(
    spec: Spec,
    rows: int,
    statistics: Numbers,
    grads: Numbers,
    out: Numbers,
    where: Where,
    /,
) -> int: ...
def vjp(
    spec: Spec,
    student: Rows,
    teacher: Rows,
    corner: Corner,
    codes: Codes,
    out: Rows,
    factors: Numbers,
    labels: int,
    where: Where,
    /,
) -> int: ...
def product(factors: Factors, out: Result, threads: int) -> None: ...
def check_product(kernels: MicroKernels, dtype: int) -> str: ...
def cpu_target() -> str: ...
def cpu_targets() -> list[str]: ...
def set_cpu_target(name: str) -> None: ...
