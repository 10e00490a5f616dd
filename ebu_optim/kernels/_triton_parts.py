"""Functions that all Triton kernels share: compilation, loads and stores. `_tables.py` makes the
tables.

Every kernel processes chunks of many tensors at once. A table holds the address, the length and
the pool of each chunk, so the number of launches does not depend on the number of tensors.
Addresses are 64-bit integers made on the host; offsets inside a chunk fit 32 bits.

A chunk is read in tiles. A full chunk with dense columns on 16-byte boundaries is read without
masks, so its loads and stores are 16 bytes wide. Any other chunk is masked. With TRITON_DEBUG=1,
every launch checks these boundaries, and that no integer overflows; without it, these checks are
not compiled.

KIND is the type of floats: 0 float32, 1 float16, 2 bfloat16. bfloat16 is converted by integer
operations, because the oldest cards have no instructions for it.

Keys are magnitude bits in float32, int32, as in `contract`. All counts are integers, and all float
sums are made in a fixed order, so nothing depends on the order in which blocks run.
"""

from __future__ import annotations

import triton
import triton.language as tl

# One binary for each set of constants. Otherwise Triton would compile more binaries for numbers
# that are 1 or multiples of 16 and for pointers on 16-byte boundaries. The tables say where
# alignment can be used. (Functions that are not launched need none of this.)
kernel = triton.jit(
    do_not_specialize=[
        "table",
        "n_chunks",
        "first",
        "count",
        "pools",
        "n_pools",
        "members",
        "samples",
        "bracket",
        "counters",
        "hist",
        "partial",
        "keys",
        "done",
        "settled",
        "nonfinite",
        "prefix",
        "bits",
        "gamma",
        "online",
        "inv_scale",
        "stats",
    ]
)

INF = tl.constexpr(0x7F800000)


# -- loads and stores -----------------------------------------------------------------------------


@triton.jit
def load_float(address, offs, mask, KIND: tl.constexpr, IS_FULL: tl.constexpr):
    """Load float32 values from `address`, whose elements have the type KIND."""
    if KIND == 0:
        p = address.to(tl.pointer_type(tl.float32))
    elif KIND == 1:
        p = address.to(tl.pointer_type(tl.float16))
    else:
        p = address.to(tl.pointer_type(tl.int16))
    if IS_FULL:
        tl.device_assert(address % 16 == 0, "the table promises 16-byte boundaries")
        x = tl.load(tl.multiple_of(p, 16) + offs)
    else:
        x = tl.load(p + offs, mask=mask, other=0)
    if KIND == 2:
        x = (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def round_to(x, KIND: tl.constexpr):
    """Round x to what is stored: float32, float16, or bfloat16 bits (nearest even) as int16."""
    if KIND == 0:
        y = x
    elif KIND == 1:
        y = x.to(tl.float16)
    else:
        # every NaN becomes the same one, to which an addition cannot overflow
        bits = tl.where(x == x, x.to(tl.int32, bitcast=True), 0x7FC00000)
        y = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)
    return y


@triton.jit
def stored_value(y, KIND: tl.constexpr):
    """Return the float32 value of the result of `round_to`."""
    if KIND == 2:
        x = (y.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        x = y.to(tl.float32)
    return x


@triton.jit
def store(address, offs, mask, y, KIND: tl.constexpr, IS_FULL: tl.constexpr):
    if KIND == 0:
        p = address.to(tl.pointer_type(tl.float32))
    elif KIND == 1:
        p = address.to(tl.pointer_type(tl.float16))
    else:
        p = address.to(tl.pointer_type(tl.int16))
    if IS_FULL:
        tl.device_assert(address % 16 == 0, "the table promises 16-byte boundaries")
        tl.store(tl.multiple_of(p, 16) + offs, y)
    else:
        tl.store(p + offs, y, mask=mask)


@triton.jit
def magnitude(x):
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def by_thread(x, LANE: tl.constexpr):
    """Sum LANE neighbours, which are in one thread; so sums over tiles need few registers."""
    if LANE == 1:
        y = x
    else:
        y = tl.sum(tl.reshape(x, (x.shape[0] // LANE, LANE)), 1)
    return y
