"""Backward multiplies gradients of the forward pass by a number that only the device knows."""

import triton.language as tl

from bgkernels.backends.triton.math import kernel


@kernel(("x_ptr",))
def scale_kernel(x_ptr, factor_ptr, count, blocks, BLOCK: tl.constexpr):
    """Multiply ``x_ptr (count,)`` by ``factor_ptr ()`` in place; touch nothing where it is 1."""
    factor = tl.load(factor_ptr)
    if factor == 1:
        return
    begin = tl.program_id(0).to(tl.int64) * blocks * BLOCK
    for i in range(blocks):
        places = begin + i * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + places, mask=places < count)
        tl.store(x_ptr + places, (x * factor).to(x.dtype), mask=places < count)
