"""The compiled backend: C++ with SIMD on the CPU, CUDA on NVIDIA GPUs.

On the CPU, the instruction set is chosen at import by what the processor has;
``BGKERNELS_CPU_TARGET`` (``baseline``, ``avx2``, ``avx512``) forces one. Rows are shared out among
``torch.get_num_threads()`` threads, and results do not depend on their number.

The CUDA kernels (:mod:`.cuda`) are there if a CUDA compiler was found at build time. No GPU has run
them yet, so that ``backend="auto"`` prefers Triton there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bgkernels.backends.base import Tile
from bgkernels.backends.native.call import (
    DTYPES,
    MISSING,
    Kernels,
    Normalisers,
    dense,
    is_dense,
)
from bgkernels.backends.native.cpu import Cpu
from bgkernels.backends.native.cuda import Cuda, unusable
from bgkernels.rows.spec import RowSpec
from bgkernels.rows.state import RowState

CPU = Cpu()


class NativeBackend:
    """See :class:`bgkernels.backends.base.Backend`.

    Logits whose inner stride is not 1 are copied first; rows may have any stride.
    """

    name = "native"
    scratch_bytes = 0

    def supports(self, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
        """None, or the reason why not."""
        if MISSING is not None:
            return f"the compiled module cannot be imported: {MISSING}"
        if device.type not in ("cpu", "cuda"):
            return f"the compiled module serves CPU and CUDA tensors, got {device}"
        wrong = [d for d in dtypes if d not in DTYPES]
        if wrong:
            return f"logits must be float32, bfloat16 or float16, got {wrong[0]}"
        return None if device.type == "cpu" else unusable(device)

    def kernels(self, device: torch.device) -> Kernels:
        """Those of a device."""
        return CPU if device.type == "cpu" else Cuda(device)

    def absorb_(
        self,
        state: RowState,
        tile: Tile,
        labels: Tensor,
        spec: RowSpec,
        normalisers: Normalisers | None = None,
    ) -> None:
        """Pass 1, of which the second read needs both normalisers."""
        floats = state.floats
        if floats.dtype != torch.float32 or not is_dense(floats):
            raise ValueError(
                f"`state.floats` must be float32 with an inner stride of 1; got {floats.dtype}, "
                f"strides {floats.stride()}"
            )
        kernels, tile, labels = self.kernels(floats.device), dense(tile), labels.contiguous()
        if normalisers is None:
            status = kernels.absorb(state, tile, labels, spec)
        else:
            status = kernels.absorb_pairs(state, tile, labels, spec, normalisers)
        _check(status)

    def finalize(self, state: RowState, labels: Tensor, spec: RowSpec, out: Tensor) -> None:
        """State to statistics."""
        _check(self.kernels(out.device).finalize(state, labels.contiguous(), spec, out))

    def fold(self, statistics: Tensor, grads: Tensor, labels: Tensor, spec: RowSpec) -> Tensor:
        """Derivatives to coefficients of pass 2."""
        out = statistics.new_empty(spec.factor_count, statistics.size(1))
        _check(self.kernels(out.device).fold(statistics, grads, spec, out))
        return out

    def vjp(
        self, out: Tensor, tile: Tile, coefficients: Tensor, labels: Tensor, spec: RowSpec
    ) -> None:
        """Pass 2."""
        gradient = out if is_dense(out) else out.new_empty(out.shape)
        kernels, tile = self.kernels(out.device), dense(tile)
        _check(kernels.vjp(gradient, tile, coefficients, labels.contiguous(), spec))
        if gradient is not out:
            out.copy_(gradient)


def _check(status: int) -> None:
    if status:
        raise RuntimeError(
            f"the compiled module refused its arguments, status {status}: please report it"
        )
