"""The compiled module: addresses of memory, strides in elements.

A status other than 0 is an error (``csrc/row_args.h``). The submodule ``cuda``, with the same
primitives for device memory, is there where it was built with CUDA.
"""

MAX_TILTS: int

class Spec:
    def __init__(
        self,
        *,
        compared: int,
        temperature: float,
        shared_softmax: bool,
        logit_sum: bool,
        rule: int,
        key: int,
        tilts: list[tuple[float, float, bool]],
        omegas: list[float],
        total_variation: bool,
    ) -> None: ...

class Logits:
    def __init__(
        self,
        data: int,
        row_stride: int,
        columns: int,
        dtype: int,
        scale: float = 1.0,
        cap: float = 0.0,
    ) -> None: ...

class Tile:
    def __init__(
        self,
        student: Logits,
        teacher: Logits | None,
        rows: int,
        first_row: int,
        first_column: int,
    ) -> None: ...

# Addresses: of floats and ints, a stride each; of sums, and their stride; of two normalisers; of
# row, tilt and pair coefficients.
Columns = tuple[int, int, int, int]
Sums = tuple[int, int]
Normalisers = tuple[int, int]
Factors = tuple[int, int, int]

def absorb(spec: Spec, tile: Tile, state: Columns, labels: int, threads: int) -> int: ...
def absorb_pairs(spec: Spec, tile: Tile, sums: Sums, lse: Normalisers, threads: int) -> int: ...
def vjp(
    spec: Spec, tile: Tile, out: Logits, factors: Factors, labels: int, threads: int
) -> int: ...
# Addresses: of a micro-kernel and of what releases it; of an operand, strides of its rows and
# columns; of the result, its stride, whether it is bf16, whether to add to it.
MicroKernels = tuple[int, int]
Operand = tuple[int, int, int]
Result = tuple[int, int, bool, bool]

def product(
    kernels: MicroKernels,
    dtype: int,
    sizes: tuple[int, int, int],
    a: Operand,
    b: Operand,
    out: Result,
    threads: int,
) -> None: ...
def check_product(kernels: MicroKernels, dtype: int) -> str: ...
def cpu_target() -> str: ...
def cpu_targets() -> list[str]: ...
def set_cpu_target(name: str) -> None: ...
