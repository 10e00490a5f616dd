"""All kernels that `_launch_*.py` launch."""

from ._triton_combination import combine_kernel, reduce_kernel, restore_kernel  # noqa: F401
from ._triton_radix import (  # noqa: F401
    digit_kernel,
    finish_kernel,
    histogram_kernel,
    probe_kernel,
)
from ._triton_window import (  # noqa: F401
    bracket_kernel,
    fold_kernel,
    sample_kernel,
    settle_kernel,
    window_kernel,
)
