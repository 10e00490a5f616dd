"""Cases for `test_fuzz.py`: parameters of any layout and dtype, options, constants of launches."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from ebu_optim.kernels.contract import Update, Weights

from .. import inputs
from .shared import TAKEN

GUARD = 64  # elements round every tensor that nothing may touch
EDGES = (65535, 65536, 65537)
#: Of all columns of a row, or of one that differs from the others.
LAYOUTS = ("contiguous", "transposed", "channels_last", "offset", "strided")
ODD = (
    "",
    "",
    "g_f expanded",
    "g_r expanded",
    "g_f strided",
    "g_r transposed",
    "anchors transposed",
    "fishers strided",
    "anchors expanded",
    "held transposed",
)


class Row(NamedTuple):
    """One parameter. `odd` names a column and its layout; a missing gradient is one 0 expanded."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str = "contiguous"
    odd: str = ""
    missing: str = ""  # "g_f" or "g_r"


class Case(NamedTuple):
    rows: tuple[Row, ...]
    seed: int = 0
    kinds: tuple[str, str] = ("normal", "normal")  # of g_f and g_r, see `inputs.fill`
    pools: str = "model"  # or "tensor", or "parity": two of each
    deltas: tuple[float | None, float | None] = (0.5, 0.5)  # None: nothing is selected
    anchor: Any = "own"  # dtype; None: missing; "own": the parameter's
    fisher: Any = torch.float32
    out: str = "new"  # or "g_f", "g_r"
    held: str = "new"  # or "g_f", "none"
    alpha: float = 0.6
    gamma: float = 0.7
    penalty: str = "partial"
    update: str = "added"
    terms: tuple[bool, bool, bool] = (True, True, True)
    online: float | None = 0.3
    inv_scale: float | None = None
    numbers: tuple[float, ...] = ()  # the weights of the sum, in place of a reading's
    counted: bool = True
    tensors: bool = False  # gamma and online are tensors
    chunk: int = 128
    programs: int = 3
    window: int = 1 << 40  # elements from which a pool has one
    sample: int = 1500
    width: int = 2  # bins of a window
    wide: bool = False
    digit: tuple[int, int] = (20, 11)  # shift and bits of the histogram


def fill(kind, shape, dtype, rng):
    """As `inputs.fill`; "clusters" are octaves apart and narrow, so that a window holds a rank."""
    if kind == "clusters":
        x = 2.0 ** rng.integers(-5, 5, shape) * (1 + 0.003 * rng.random(shape))
        return torch.tensor(x * rng.choice((-1, 1), shape), dtype=dtype)
    return inputs.fill(kind, shape, dtype, rng)


def rows(dtypes=TAKEN):
    shapes = st.one_of(
        st.sampled_from(inputs.SHAPES),
        st.integers(1, 150).map(lambda n: (n,)),
        st.sampled_from(((16, 8), (2, 8, 4, 4), (127,), (128,), (129,), (256,))),
    )
    return st.builds(
        Row,
        shapes,
        st.sampled_from(dtypes),
        st.sampled_from(("contiguous", *LAYOUTS)),
        st.sampled_from(ODD),
        st.sampled_from(("", "", "", "", "g_f", "g_r")),
    )


#: Of rows: some, many tiny ones, or a large one on the edge of chunks.
parameters = st.integers(0, 29).flatmap(
    lambda which: (
        st.builds(lambda row, n: (row._replace(shape=(n,)),), rows(), st.sampled_from(EDGES))
        if which == 29
        else st.lists(rows().map(lambda r: r._replace(shape=(2,))), min_size=10, max_size=20)
        if which == 28
        else st.lists(rows(), min_size=which > 0, max_size=4)
        if which < 27
        else st.lists(rows((*TAKEN, torch.float64)), min_size=2, max_size=4)
    )
)
cases = st.builds(
    Case,
    parameters.map(tuple),
    st.integers(0, 2**32 - 1),
    st.tuples(*[st.sampled_from((*inputs.FINITE, *inputs.KINDS, "clusters", "clusters"))] * 2),
    st.sampled_from(("model", "model", "tensor", "parity")),
    st.tuples(*[st.sampled_from((1e-9, 0.05, 0.5, 0.5, 0.8, 0.8, 1.0, None))] * 2),
    st.sampled_from(("own", *TAKEN, torch.float64, None)),
    st.sampled_from((torch.float32, *TAKEN, torch.float64, None)),
    st.sampled_from(("new", "g_r", "g_f")),
    st.sampled_from(("new", "g_f", "none")),
    st.sampled_from((0.0, 0.3, 0.6, 1.0)),
    st.sampled_from((0.0, 0.7, 30.0)),
    st.sampled_from(("partial", "full", "none")),
    st.sampled_from(("added", "replaced", "routed")),
    st.tuples(*[st.booleans()] * 3),
    st.sampled_from((None, 0.3, 0.75, 1.0)),
    st.sampled_from((None, None, 0.25, 2.0**-16)),
    st.one_of(st.just(()), st.just(()), st.tuples(*[st.sampled_from((0.0, 1.0, -0.5, 2.5))] * 5)),
    st.sampled_from((True, True, False)),
    st.booleans(),
    st.sampled_from((128, 64, 128, 256)),
    st.sampled_from((3, 1, 2048)),
    st.sampled_from((1 << 40, 1, 200)),
    st.sampled_from((30, 300, 1500)),
    st.sampled_from((1, 2, 2, 4)),
    st.booleans(),
    st.integers(5, 12).flatmap(lambda bits: st.tuples(st.integers(0, 31 - bits), st.just(bits))),
).map(
    lambda case: (
        case._replace(chunk=1 << 15)  # the real one
        if any(math.prod(row.shape) >= min(EDGES) for row in case.rows)
        else case
    )
)


def listed() -> list[Case]:
    """A case for each path that chance would take seldom, so that no path depends on chance."""
    found = []
    for i, dtype in enumerate(TAKEN):
        plain = (Row((8, 40), dtype), Row((7, 9), dtype, "offset", "g_f expanded"))
        others = {
            "penalty": ("partial", "full", "none")[i],
            "update": ("added", "replaced", "routed")[i],
            "out": ("new", "g_r", "g_f")[i],
            "held": ("new", "g_f", "none")[i],
            "tensors": i == 1,
            "online": (None, 0.3, 0.75)[i],
        }
        both = (*plain, Row((5, 3), dtype, "contiguous", "g_r strided"))
        found += [
            # windows that are settled, crowded (float32 alone), and refuted for a sample too small
            Case(
                both, i, ("clusters", "signed zero"), window=1, fisher=dtype, anchor=dtype, **others
            ),
            Case(plain, i, ("wide", "equal"), "parity", (0.05, 0.8), window=300, inv_scale=0.25),
            Case(
                plain, i, ("normal", "wide"), "tensor", fisher=TAKEN[i - 1], programs=1, wide=True
            ),
            Case(plain, i, ("wide", "wide"), sample=30, window=1, terms=(False, True, True)),
            Case((Row((EDGES[i],), dtype),), 1, ("normal", "nan"), chunk=1 << 15, programs=2048),
        ]
    found += [
        Case((Row((9, 4), torch.float64), Row((5,), torch.float32)), digit=(0, 5)),
        Case(((Row((4, 3), torch.float32, "strided")),), fisher=None, anchor=None, online=None),
        Case((Row((400,), torch.float32),), 1, ("clusters", "clusters"), window=1),
        Case((Row((70,), torch.float32),), deltas=(None, 0.5), numbers=(0.5, 2.0, -1.0, 0.0, 0.5)),
        Case((Row((9,), torch.float32),), fisher=None, anchor=None, online=None),
        Case(tuple(Row((2,), TAKEN[i % 3]) for i in range(16)), fisher=torch.float64),
        Case((Row((0,), torch.float32), Row((), torch.float16)), anchor=None),
        Case((Row((0,), torch.bfloat16),), fisher=None),
    ]
    return found


class Placed:
    """Tensors in memory of their own, a guard round each, and what that memory held at first."""

    def __init__(self) -> None:
        self.held: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, values: Tensor, layout: str) -> Tensor:
        if layout == "expanded" and values.numel():
            values, shape = values.reshape(-1)[:1], values.shape
        else:
            shape = None
        like = inputs.lay_out(values, layout)
        dense = layout == "strided" or not like.numel()
        strides = like.stride()
        room = 1 + sum((n - 1) * s for n, s in zip(like.shape, strides)) if like.numel() else 0
        at = GUARD + (3 if layout == "offset" else 0)
        memory = torch.full((at + room + GUARD,), math.nan, dtype=values.dtype)
        assert memory.data_ptr() % 16 == 0 or dense
        view = memory.as_strided(like.shape, strides, at).copy_(values)
        self.held.append((memory, memory.clone(), view))
        return view if shape is None else view.view(()).expand(shape)

    def untouched(self, written: list[Tensor]) -> None:
        """But for the elements of `written`, no memory has changed."""
        places = {t.data_ptr() for t in written if t.numel()}
        for memory, before, view in self.held:
            if view.data_ptr() in places:
                before.as_strided(view.shape, view.stride(), view.storage_offset()).copy_(view)
            assert bits(memory).equal(bits(before))


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.itemsize])


def build(case: Case, place: Placed) -> dict[str, list[Any]]:
    """The columns of a case, by the names of `Columns`."""
    rng = np.random.default_rng(case.seed)
    columns: dict[str, list[Any]] = {
        name: [] for name in ("params", "g_f", "g_r", "anchors", "fishers", "out", "held")
    }
    held = case.held if case.held != case.out else "new"
    for row in case.rows:
        name, _, odd = row.odd.partition(" ")

        def made(column, kind, dtype=row.dtype, row=row, rng=rng, name=name, odd=odd):
            layout = odd if name == column else row.layout
            x = fill(kind, row.shape, dtype, rng)
            if column == row.missing:
                x, layout = torch.zeros(row.shape, dtype=dtype), "expanded"
            if column in ("out", "held", "fishers") or column in (case.out, held):  # written
                layout = "contiguous" if layout == "expanded" else layout
            return place(x.abs() if column == "fishers" else x, layout)

        kinds = {"params": "normal", "g_f": case.kinds[0], "g_r": case.kinds[1]}
        x: dict[str, Any] = {column: made(column, kind) for column, kind in kinds.items()}
        own = row.dtype if case.anchor == "own" else case.anchor
        x["anchors"] = None if own is None else made("anchors", "normal", own)
        x["fishers"] = None if case.fisher is None else made("fishers", "normal", case.fisher)
        x["out"] = made("out", "normal") if case.out == "new" else x[case.out]
        x["held"] = {"new": None, "none": None}.get(held, x["g_f"])
        if held == "new":
            x["held"] = made("held", "normal")
        for column, t in x.items():
            columns[column].append(t)
    return columns


def ranked(case: Case, g_f: list[Tensor], g_r: list[Tensor]) -> tuple[list[Any], list[Any]]:
    """The pools that have elements, and of every parameter its key of g_f and of g_r: behind those
    of the pools (or of none, which count as one) stands the key of nothing."""
    pools: list[Any] = []
    where: list[Any] = []
    label = {"model": lambda i: 0, "tensor": lambda i: i, "parity": lambda i: i % 2}[case.pools]
    for grads, delta in zip((g_f, g_r), case.deltas):
        found: dict[int, list[Tensor]] = {}
        for i, g in enumerate(grads):
            found.setdefault(label(i), []).append(g)
        place: dict[int, int] = {}
        for name, members in found.items():
            n = inputs.total(members)
            if n and delta is not None:
                place[name] = len(pools)
                pools.append((members, inputs.rank(n, delta)))
        # a key of no pool that has elements is read for none
        where.append([place.get(label(i), -1 if delta is None else 0) for i in range(len(grads))])
    nothing = max(1, len(pools))
    return pools, [[nothing if i < 0 else i for i in side] for side in where]


def update(case: Case, dtype: torch.dtype, tensors: bool) -> Update:
    terms = (True,) * 3 if case.update == "routed" or not any(case.terms) else case.terms
    weights = Weights.reading(
        alpha=case.alpha, penalty=case.penalty, update=case.update, terms=terms
    )
    if case.numbers:
        weights = Weights(*case.numbers, case.penalty)
    gamma: Any = case.gamma
    online: Any = case.online
    if tensors:
        gamma = torch.tensor(gamma)
        online = None if online is None else torch.tensor(online, dtype=torch.float64)
    inv_scale = None if case.inv_scale is None else torch.tensor(case.inv_scale)
    return Update(weights, gamma, online, inv_scale, dtype, case.counted)
