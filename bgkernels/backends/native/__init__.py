"""The compiled backend: C++ with SIMD on the CPU, CUDA on NVIDIA GPUs.

On the CPU, the instruction set is chosen at import by what the processor has;
``BGKERNELS_CPU_TARGET`` (``baseline``, ``avx2``, ``avx512``) forces one. Rows are shared out among
``torch.get_num_threads()`` threads, and results do not depend on their number.

The CUDA kernels (:mod:`.native_cuda`) are there if a CUDA compiler was found at build time. No GPU
has run them yet, so that ``backend="auto"`` prefers Triton there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bgkernels.backends.base import Composed, Tile
from bgkernels.backends.native.call import DTYPES, MISSING, Call, Kernels, doubles, is_dense
from bgkernels.backends.native.cpu import Cpu
from bgkernels.backends.native.cuda import Cuda, unusable
from bgkernels.rows.spec import RowSpec
from bgkernels.rows.state import RowState
from bgkernels.rows.vjp import Coefficients


class NativeBackend:
    """See :class:`bgkernels.backends.base.Backend`.

    Logits whose inner stride is not 1 are copied first; rows may have any stride. Normalisers and
    coefficients may be fp64: the kernels read them so, and lose no digit of a large one.
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
        return Cpu() if device.type == "cpu" else Cuda(device)

    def absorb_(self, state: RowState, tile: Tile, labels: Tensor, spec: RowSpec) -> None:
        """Pass 1."""
        floats = _columns("state.floats", state.floats)
        call, labels = Call(tile, spec), labels.contiguous()
        _check(self.kernels(floats.device).absorb(call, floats, state.ints, labels))

    def absorb_pairs_(
        self, sums: Tensor, tile: Tile, lse_s: Tensor, lse_t: Tensor, spec: RowSpec
    ) -> None:
        """Pass 1, second read."""
        call, sums = Call(tile, spec), _columns("sums", sums)
        lse_s, lse_t = doubles(lse_s), doubles(lse_t)
        _check(self.kernels(sums.device).absorb_pairs(call, sums, lse_s, lse_t))

    def vjp(self, out: Tensor, tile: Tile, coefficients: Coefficients, spec: RowSpec) -> None:
        """Pass 2."""
        dense = out if is_dense(out) else out.new_empty(out.shape)
        call, labels = Call(tile, spec), coefficients.labels.contiguous()
        given = (coefficients.row, coefficients.tilts, coefficients.pairs)
        row, tilts, pairs = map(doubles, given)
        _check(self.kernels(out.device).vjp(call, dense, row, tilts, pairs, labels))
        if dense is not out:
            out.copy_(dense)

    def compose(
        self, state: RowState, sums: Tensor, out: Tensor, tile: Tile, labels: Tensor, loss: Composed
    ) -> Tensor | str:
        """All passes in one launch, on a GPU."""
        kernels = self.kernels(out.device)
        if not isinstance(kernels, Cuda):
            return "a CPU takes separate passes"
        if not is_dense(out):
            return "the gradient's inner stride is not 1"
        _columns("state.floats", state.floats)
        call = Call(tile, loss.spec)
        return kernels.compose(call, out, state, sums, labels.contiguous(), loss)


def _columns(name: str, x: Tensor) -> Tensor:
    if x.dtype == torch.float32 and is_dense(x):
        return x
    raise ValueError(
        f"`{name}` must be float32 with an inner stride of 1; got {x.dtype}, strides {x.stride()}"
    )


def _check(status: int) -> None:
    if status:
        raise RuntimeError(
            f"the compiled module refused its arguments, status {status}: please report it"
        )
