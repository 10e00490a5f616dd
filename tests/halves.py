"""What the tests of half precision share: bases, scalers, a loss whose input is float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW

HALF = torch.float16
START = 2.0**12
BASES = {
    f"{cls.__name__.lower()}_{name}": lambda p, cls=cls, lr=lr, kw=kw: cls(p, lr=lr, **kw)
    for cls, lr in ((SGD, 0.05), (Adam, 0.01), (AdamW, 0.01))
    for name, kw in (
        ("plain", {"foreach": False}),
        ("foreach", {"foreach": True}),
        ("fused", {"fused": True}),
    )
}
PHASES = ("forget", "remember")


def autocast(dtype: torch.dtype = HALF) -> torch.autocast:
    return torch.autocast("cpu", dtype=dtype)


def scaler_of(scale: float = START, **options) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, **{"growth_interval": 1000, **options})


def loss(
    m: Callable[[Tensor], Tensor], i: int, forget: bool, rows: slice = slice(None), by: float = 1
) -> Tensor:
    """As steps.loss, but the input is float32 as a loader gives it, `by` makes it an outlier."""
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(2 * i + forget))[rows] * by
    return (m(x).float() - (1 if forget else -1)).square().sum() / 6
