"""The contract of the kernels: what every implementation takes, and the keys that they compare.

Magnitudes are compared as integer *keys*: the bits of abs(x) in the working dtype (float32, or
float64 if one of the tensors is float64; the conversion is exact). Keys have the order of abs(x)
and rank NaN above Inf, so that "propagate" does propagate. Flush-to-zero does not change them,
except for float32 denormals together with float64 tensors, whose conversion flushes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

INT = {torch.float32: torch.int32, torch.float64: torch.int64}
MAGNITUDE = {torch.float32: 0x7FFFFFFF, torch.float64: 0x7FFFFFFFFFFFFFFF}
INF = {torch.float32: 0x7F800000, torch.float64: 0x7FF0000000000000}

#: The sums that `combine` makes, in this order, as one float64 vector.
STATS = (
    "forget_selected",
    "remember_selected",
    "overlap",
    "overlap_opposed",
    "dot",
    "forget_sq",
    "remember_sq",
    "update_sq",
    "moved_forget_only_sq",
    "moved_remember_only_sq",
    "moved_overlap_sq",
    "moved_unrelated_sq",
    "fisher_sum",
    "update_nonfinite",
)


@cache
def has_float64(device: torch.device) -> bool:
    """Whether a device can add up `STATS`: Apple's MPS and some Intel GPUs have no float64."""
    if device.type in ("cpu", "cuda"):
        return True
    try:
        torch.zeros((), dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return False
    return True


# -- keys ---------------------------------------------------------------------------------------


def working_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """float64 if any tensor is float64, else float32: it holds every value of `tensors` exactly."""
    wide = torch.float64 in set(map(attrgetter("dtype"), tensors))
    return torch.float64 if wide else torch.float32


def keys(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the magnitude keys of `x` in the working dtype: int32 or int64, same shape."""
    return x.to(dtype).view(INT[dtype]).bitwise_and(MAGNITUDE[dtype])


def key_to_value(key: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the magnitude of a 0-d int64 key, as a 0-d tensor of `dtype`."""
    return key.to(INT[dtype]).view(dtype)


def key_bits(dtype: torch.dtype) -> int:
    """Return the number of bits in a key."""
    return 31 if dtype == torch.float32 else 63


def key_of_inf(dtype: torch.dtype) -> int:
    """Return the key of Inf: keys of NaN are greater, keys of numbers are smaller."""
    return INF[dtype]


def key_of_nothing(dtype: torch.dtype) -> int:
    """Return a threshold that no number reaches."""
    return MAGNITUDE[dtype]


# -- what `combine` takes -----------------------------------------------------------------------


class Column(list[Any]):
    """Tensors whose memory stays in place as long as this list lives.

    Args:
        tensors: the tensors, None where one is missing.
        of: the column and its rows from which these tensors were picked.
        sizes: the numbers of elements, if they are known.

    Attributes:
        notes: what each implementation has found out about the tensors, under its name.
    """

    def __init__(
        self,
        tensors: Iterable[Any] = (),
        of: tuple[Column, Sequence[int]] | None = None,
        sizes: list[int] | None = None,
    ) -> None:
        super().__init__(tensors)
        self.of, self._sizes, self.notes = of, sizes, {}  # type: ignore[var-annotated]

    def __reduce__(self) -> Any:
        return Column, (list(self),)  # a copy has other memory

    @property
    def sizes(self) -> list[int]:
        """The numbers of elements; 0 for a missing tensor."""
        if self._sizes is None:
            self._sizes = [0 if t is None else t.numel() for t in self]
        return self._sizes

    def picked(self, rows: Sequence[int]) -> Column:
        """Return only these rows, in this order."""
        sizes = None if self._sizes is None else [self._sizes[i] for i in rows]
        return Column([self[i] for i in rows], (self, rows), sizes)


class Columns(NamedTuple):
    """What a combination reads and writes: every column has one entry for each parameter.

    Attributes:
        params, g_f, g_r: theta and the two gradients, with equal shapes tensor by tensor.
        anchors, fishers: theta0 and F, or None for all parameters (then there is no penalty). Each
            has any floating dtype and is on the parameter's device or the CPU.
        out: receives G; may be g_r[i] or g_f[i] itself.
        held: if not None, receives theta on the unrelated scalars and NaN elsewhere
            (`unrelated="freeze"`); may be g_f[i] itself if out[i] is not.
        pool_f, pool_r: for each tensor, the indices of tau_f and of tau_r in the thresholds.
    """

    params: Sequence[Tensor]
    g_f: Sequence[Tensor]
    g_r: Sequence[Tensor]
    anchors: Sequence[Tensor | None]
    fishers: Sequence[Tensor | None]
    out: Sequence[Tensor]
    held: Sequence[Tensor | None]
    pool_f: Sequence[int]
    pool_r: Sequence[int]

    def rows(self, indices: Iterable[int]) -> Columns:
        """Return the columns of only these parameters."""
        indices = list(indices)
        if indices == list(range(len(self.params))):
            return self
        picked: Any = [
            column.picked(indices) if isinstance(column, Column) else [column[i] for i in indices]
            for column in self
        ]
        return Columns(*picked)

    @property
    def tensors(self) -> tuple[Sequence[Tensor | None], ...]:
        """The seven columns that hold tensors, in this order: params to held."""
        return self[:7]


class Weights(NamedTuple):
    """The weights of a combination:

    G = on_f g_f + on_r g_r + on_m M_f g_f + only_r R g_r + blend O (g_r - g_f) + p.

    O is the overlap, R holds the scalars selected only by M_r, and p is the penalty that `penalty`
    names: "partial" (on R), "full" (on every scalar) or "none".
    """

    on_f: float
    on_r: float
    on_m: float = 0.0
    only_r: float = 0.0
    blend: float = 0.0
    penalty: str = "none"

    @classmethod
    def reading(
        cls, *, alpha: float, penalty: str, update: str, terms: tuple[bool, bool, bool]
    ) -> Weights:
        """Return the weights for a reading of eqs. 11 to 13.

        The blend is b = g_f + (1 - alpha) (g_r - g_f) (eq. 11), so every reading is a sum of the
        same products with other weights.

        Args:
            alpha: weight of g_f on the overlap.
            penalty: as for the class.
            update: "added", "replaced" or "routed".
            terms: which of g_f, g_r + p and m are summed (not for "routed").
        """
        if update == "routed":
            return cls(0.0, 0.0, 1.0, 1.0, 1.0 * (1 - alpha), penalty)
        on_f, on_r, on_m = (float(on) for on in terms)
        blended = on_m + (on_f if update == "replaced" else 0.0)
        return cls(on_f, on_r, on_m, 0.0, blended * (1 - alpha), penalty if terms[1] else "none")


class Update(NamedTuple):
    """How gradients become G: the options of a combination.

    Attributes:
        weights: the weights of the sum G.
        gamma: penalty strength times the scale of F; a float or a 0-d tensor on the device.
        online: if not None, F += online * (g_r^2 - F) in place, after F was used. With
            online = 1 / (n + 1) after n updates, F is the mean of the squares. A number; for the
            Triton kernels it may be a 0-d tensor.
        inv_scale: if not None, a 0-d float32 tensor that both gradients are multiplied by. Only the
            comparison of keys uses the gradients without this factor.
        dtype: working dtype of the selection and the arithmetic.
        counted: if False, an implementation may leave out all `STATS` except update_sq,
            fisher_sum and update_nonfinite.
    """

    weights: Weights
    gamma: float | Tensor
    online: Any
    inv_scale: Tensor | None
    dtype: torch.dtype
    counted: bool = True
