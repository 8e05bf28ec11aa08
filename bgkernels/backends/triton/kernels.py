"""The host imports the kernels from here, and with them Triton."""

from bgkernels.backends.triton.absorb import absorb_kernel, merge_kernel
from bgkernels.backends.triton.extras import variant
from bgkernels.backends.triton.math import exp
from bgkernels.backends.triton.reread import add_kernel, reread_kernel
from bgkernels.backends.triton.scale import scale_kernel
from bgkernels.backends.triton.statistics import finalize_kernel, fold_kernel
from bgkernels.backends.triton.vjp import vjp_kernel

__all__ = [
    "absorb_kernel",
    "add_kernel",
    "exp",
    "finalize_kernel",
    "fold_kernel",
    "merge_kernel",
    "reread_kernel",
    "scale_kernel",
    "variant",
    "vjp_kernel",
]
