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

def absorb(
    spec: Spec,
    tile: Tile,
    floats: int,
    floats_stride: int,
    ints: int,
    ints_stride: int,
    labels: int,
    threads: int,
) -> int: ...
def absorb_pairs(
    spec: Spec,
    tile: Tile,
    sums: int,
    sums_stride: int,
    lse_s: int,
    lse_t: int,
    threads: int,
) -> int: ...
def vjp(
    spec: Spec,
    tile: Tile,
    out: Logits,
    row: int,
    tilts: int,
    pairs: int,
    labels: int,
    threads: int,
) -> int: ...
def cpu_target() -> str: ...
def cpu_targets() -> list[str]: ...
def set_cpu_target(name: str) -> None: ...
