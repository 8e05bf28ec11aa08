"""The native backend is compiled: C++ with SIMD on the CPU, CUDA on NVIDIA GPUs.

On the CPU, the instruction set is chosen at import by what the processor has;
``BGKERNELS_CPU_TARGET`` (``baseline``, ``avx2``, ``avx512``) forces one. Rows are distributed over
``torch.get_num_threads()`` threads, and results do not depend on their number.

The CUDA kernels (:mod:`.cuda`) are there if a CUDA compiler was found at build time. No GPU has run
them yet, so that ``backend="auto"`` prefers Triton there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bgkernels.backends.base import Backend, Normalisers, Tile, scale_
from bgkernels.backends.native import products
from bgkernels.backends.native.call import (
    CODE_BLOCK,
    DTYPES,
    MISSING,
    Kernels,
    code_of,
    compiled,
    corner_of,
    dense,
    is_dense,
    numbers_of,
    rows_of,
)
from bgkernels.backends.native.cuda import Cuda, unusable
from bgkernels.rows.spec import RowSpec
from bgkernels.rows.state import RowState

CPU = Kernels()


class NativeBackend(Backend):
    """This backend runs compiled loops over rows, on a CPU or an NVIDIA GPU.

    Logits whose inner stride is not 1 are copied first; rows may have any stride.
    """

    name = "native"
    scratch_bytes = 0

    def supports(self, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
        if MISSING is not None:
            return f"the compiled module cannot be imported: {MISSING}"
        if device.type not in ("cpu", "cuda"):
            return f"the compiled module serves CPU and CUDA tensors, got {device}"
        wrong = [d for d in dtypes if d not in DTYPES]
        if wrong:
            return f"logits must be float32, bfloat16 or float16, got {wrong[0]}"
        return None if device.type == "cpu" else unusable(device)

    def code_block(self, device: torch.device) -> int:
        return CODE_BLOCK

    def multiplies(self, dtype: torch.dtype, device: torch.device) -> bool:
        half_on_cpu = device.type == "cpu" and dtype in products.HALVES
        return half_on_cpu and products.chosen(dtype) == "brgemm"

    def kernels(self, device: torch.device) -> Kernels:
        """Return the compiled functions for tensors on this device."""
        return CPU if device.type == "cpu" else Cuda(device)

    def absorb_(
        self,
        state: RowState,
        tile: Tile,
        labels: Tensor,
        spec: RowSpec,
        normalisers: Normalisers | None = None,
    ) -> None:
        floats, ints = state.floats, state.ints
        if floats.dtype != torch.float32 or not is_dense(floats):
            raise ValueError(
                f"`state.floats` must be float32 with an inner stride of 1; got {floats.dtype}, "
                f"strides {floats.stride()}"
            )
        kernels, tile, labels = self.kernels(floats.device), dense(tile), labels.contiguous()
        logits = rows_of(tile.student), rows_of(tile.teacher), corner_of(tile)
        args = compiled(spec), *logits, code_of(tile), numbers_of(floats)
        factors = tile.factors and products.multiplied(*tile.factors)
        if normalisers is None:
            places = numbers_of(ints), labels.data_ptr()
            kernels.run(
                "absorb", *args, *places, factors=factors, columns_of=tile.student,
                written=(floats, ints),
            )  # fmt: skip
        elif tile.teacher is not None:
            vectors = (x.data_ptr() for x in (labels, *normalisers))
            kernels.run(
                "absorb_pairs", *args, *vectors, factors=factors, columns_of=tile.teacher,
                written=(floats,),
            )  # fmt: skip

    def finalize(self, state: RowState, labels: Tensor, spec: RowSpec, out: Tensor) -> None:
        kernels, labels = self.kernels(out.device), labels.contiguous()
        matrices = numbers_of(state.floats), numbers_of(state.ints)
        args = compiled(spec), out.size(1), *matrices, labels.data_ptr(), numbers_of(out)
        kernels.run("finalize", *args)

    def fold(self, statistics: Tensor, grads: Tensor, labels: Tensor, spec: RowSpec) -> Tensor:
        out = statistics.new_empty(spec.factor_count, statistics.size(1))
        matrices = (numbers_of(x) for x in (statistics, grads, out))
        self.kernels(out.device).run("fold", compiled(spec), out.size(1), *matrices)
        return out

    def vjp(
        self, out: Tensor, tile: Tile, coefficients: Tensor, labels: Tensor, spec: RowSpec
    ) -> None:
        gradient = out if is_dense(out) else out.new_empty(out.shape)
        kernels, tile, labels = self.kernels(out.device), dense(tile), labels.contiguous()
        logits = rows_of(tile.student), rows_of(tile.teacher), corner_of(tile)
        places = rows_of(gradient), numbers_of(coefficients), labels.data_ptr()
        args = compiled(spec), *logits, code_of(tile), *places
        factors = tile.factors and products.multiplied(*tile.factors)
        kernels.run("vjp", *args, factors=factors, columns_of=gradient)
        if gradient is not out:
            out.copy_(gradient)

    def scale_(self, x: Tensor, factor: Tensor) -> None:
        if not self.kernels(x.device).scale_(x, factor.to(x.device)):
            scale_(x, factor)
