"""The compiled kernels of the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from bgkernels.backends.native.call import MISSING, Call, logits, strided
from bgkernels.rows.spec import Cap

if MISSING is None:
    from bgkernels.backends.native import _C


class Cpu:
    """The kernels of the CPU: a status each, as ``csrc/row_args.h`` names them."""

    def absorb(self, call: Call, floats: Tensor, ints: Tensor, labels: Tensor) -> int:
        """Pass 1."""
        columns = (*strided(floats), *strided(ints))
        threads = torch.get_num_threads()
        return _C.absorb(call.spec, call.tile, columns, labels.data_ptr(), threads)

    def absorb_pairs(self, call: Call, sums: Tensor, lse_s: Tensor, lse_t: Tensor) -> int:
        """Pass 1, second read."""
        lse = (lse_s.data_ptr(), lse_t.data_ptr())
        threads = torch.get_num_threads()
        return _C.absorb_pairs(call.spec, call.tile, strided(sums), lse, threads)

    def vjp(self, call: Call, out: Tensor, *given: Tensor) -> int:
        """Pass 2; ``given`` are row, tilt and pair coefficients and labels."""
        row, tilts, pairs, labels = (x.data_ptr() for x in given)
        made = logits(out, Cap())
        threads = torch.get_num_threads()
        return _C.vjp(call.spec, call.tile, made, (row, tilts, pairs), labels, threads)
