"""All kernels that `triton.py` launches."""

from ._triton_combination import combine_kernel, reduce_kernel, restore_kernel
from ._triton_radix import digit_kernel, finish_kernel, histogram_kernel, probe_kernel
from ._triton_window import (
    bracket_kernel,
    fold_kernel,
    sample_kernel,
    settle_kernel,
    window_kernel,
)

__all__ = [
    "bracket_kernel",
    "combine_kernel",
    "digit_kernel",
    "finish_kernel",
    "fold_kernel",
    "histogram_kernel",
    "probe_kernel",
    "reduce_kernel",
    "restore_kernel",
    "sample_kernel",
    "settle_kernel",
    "window_kernel",
]
