"""Which paths the launches of some cases took: what a fuzzer did not reach it did not test."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from typing import Any
from unittest import mock

from ebu_optim.kernels import _launch, _launch_plan, _launch_selection, _tables, chunked

from .cases import Case

KINDS = ("float32", "float16", "bfloat16")
CHUNKED = ("window", "digit", "histogram", "probe", "combine", "restore")
PLAIN = ("select", "histogram", "combine", "finite_probe", "restore")
COLUMNS = ("params", "g_f", "g_r", "anchors", "fishers", "out", "held")

PATHS = (
    *(f"{kernel} {d} {b}" for kernel in CHUNKED for d in KINDS for b in ("full", "masked")),
    *(f"sample {d}" for d in KINDS),
    *(f"combine, {c} {d}" for c in COLUMNS for d in KINDS),
    *(f"combine, {c} missing" for c in ("anchors", "fishers", "held")),
    *(f"combine, {c} {how}" for c in ("gamma", "online") for how in ("number", "tensor")),
    "combine, no online",
    "combine, inv_scale",
    "combine, no inv_scale",
    *(f"combine, penalty {p}" for p in ("none", "partial", "full")),
    "combine, routed",
    "combine, g_f added",
    "combine, g_f not added",
    "reduce",
    "selection, one value expanded",
    "combine, one value expanded",
    "window settled, 32 bits",
    "window settled, 16 bits",
    "window settled: zeros",
    "window refused: crowded",
    "window refuted: too low",
    "window refuted: too high",
    "digit, 32-bit counts",
    "digit, 64-bit counts",
    "digit, several chunks a program",
    "digit, nothing left",
    "digit, some pools left",
    "several dtypes in one selection",
    "layout copied",
    "no chunk at all",
    *(f"plain {name}" for name in PLAIN),
)


class Spied:
    """The kernels, run as ever, and what each launch says of its path."""

    def __init__(self, kernels: Any, taken: Counter[str]) -> None:
        self.kernels, self.taken = kernels, taken

    def __getattr__(self, name: str) -> Any:
        kernel, note = getattr(self.kernels, name), getattr(self, f"_{name}", None)

        class Launcher:
            def __getitem__(self, grid: tuple[int, ...]) -> Any:
                def launch(*args: Any, **constants: Any) -> None:
                    kernel[grid](*args, **constants)
                    if note:
                        note(grid, args, constants)

                return launch

        return Launcher()

    def _selection(self, name: str, count: int, args: Any, kind: int) -> None:
        mine = args[0][:, args[2] : args[2] + count]
        for full, stride in zip(mine[4].tolist(), mine[3].tolist()):
            self.taken[f"{name} {KINDS[kind]} {'full' if full else 'masked'}"] += 1
            self.taken["selection, one value expanded"] += stride == 0

    def _sample_kernel(self, grid: Any, args: Any, constants: Any) -> None:
        self.taken[f"sample {KINDS[constants['KIND']]}"] += 1

    def _window_kernel(self, grid: Any, args: Any, constants: Any) -> None:
        self._selection("window", grid[0], args, constants["KIND"])

    def _histogram_kernel(self, grid: Any, args: Any, constants: Any) -> None:
        self._selection("histogram", grid[0], args, constants["KIND"])

    def _probe_kernel(self, grid: Any, args: Any, constants: Any) -> None:
        self._selection("probe", grid[0], args, constants["KIND"])

    def _digit_kernel(self, grid: Any, args: Any, constants: Any) -> None:
        *_, count, _pools, n_pools, hist, done, settled = args
        if int(settled) == n_pools:
            self.taken["digit, nothing left"] += 1
            return
        self._selection("digit", count, args, constants["KIND"])
        self.taken["digit, some pools left"] += bool(done.any())
        self.taken[f"digit, {hist.itemsize * 8}-bit counts"] += 1
        self.taken["digit, several chunks a program"] += count > grid[0]

    def _settle_kernel(self, grid: Any, args: Any, constants: Any) -> None:
        pools, _, members, bracket, counters, _, _, _, done, _ = args
        for w, pool in enumerate(members.tolist()):
            _, k, _, shift, *_ = pools[:, pool].tolist()
            above, inside, _ = counters[3 * w : 3 * w + 3].tolist()
            if bracket[2 * w + 1] < 0:
                path = "refused: crowded"
            elif done[pool] and k > above + inside:
                path = "settled: zeros"
            elif done[pool]:
                path = f"settled, {16 if shift else 32} bits"
            else:
                path = "refuted: too low" if above >= k else "refuted: too high"
            self.taken[f"window {path}"] += 1

    def _combination(self, name: str, grid: Any, args: Any, kinds: int) -> None:
        for bits in args[0][10, args[2] : args[2] + grid[0]].tolist():
            branch = "full" if bits & 128 else "masked"
            self.taken[f"{name} {KINDS[kinds % 4]} {branch}"] += 1
            there = sum((kinds // 4**j % 4 < 3) << j for j in range(7))
            if name == "combine":  # what is held is never expanded
                self.taken["combine, one value expanded"] += bits & there != there

    def _combine_kernel(self, grid: Any, args: Any, constants: Any) -> None:
        self._combination("combine", grid, args, constants["KINDS"])
        on_f, _on_r, _on_m, on_only_r, _blend, _gamma, online, inv_scale = args[4:12]
        found = [
            f"{c} {(*KINDS, 'missing')[constants['KINDS'] // 4**j % 4]}"
            for j, c in enumerate(COLUMNS)
        ]
        found.append("gamma tensor" if constants["GAMMA_AT"] else "gamma number")
        at = "online tensor" if constants["ONLINE_AT"] else "online number"
        found.append("no online" if online is None else at)
        found.append("no inv_scale" if inv_scale is None else "inv_scale")
        found.append(f"penalty {constants['PENALTY']}")
        found.append("g_f added" if on_f else "g_f not added")
        found += ["routed"] * bool(on_only_r)
        self.taken.update(f"combine, {path}" for path in found)

    def _restore_kernel(self, grid: Any, args: Any, constants: Any) -> None:
        self._combination("restore", grid, args, constants["KINDS"])

    def _reduce_kernel(self, grid: Any, args: Any, constants: Any) -> None:
        self.taken["reduce"] += 1


@contextmanager
def recorded(case: Case, taken: Counter[str]) -> Any:
    """The constants of a case, and its paths counted."""
    spied, tile = Spied(_launch.kernels(), taken), min(1024, case.chunk // 2)
    plan, read = _launch_plan._plan, _launch_plan.read_plan

    def planned(*args: Any) -> Any:
        found = plan(*args)
        taken["several dtypes in one selection"] += len({kinds for kinds, *_ in found.all}) > 1
        return found._replace(wide=case.wide or found.wide)

    def read_plan(pools: Any, device: Any) -> Any:
        found = read(pools, device)
        given = {g.data_ptr() for grads, _ in pools for g in grads if g.numel()}
        taken["layout copied"] += {g.data_ptr() for grads, _ in found[1] for g in grads} != given
        return found

    def counted(name: str) -> Any:
        plain = getattr(chunked, name)

        def run(*args: Any) -> Any:
            asked = args[0].params if name == "combine" else args[0]
            taken[f"plain {name}" if asked else "no chunk at all"] += 1
            return plain(*args)

        return run

    with (
        mock.patch.object(_launch, "kernels", return_value=spied),
        mock.patch.multiple(_tables, CHUNK=case.chunk),
        mock.patch.multiple(_launch, TILE=tile),
        mock.patch.multiple(
            _launch_plan,
            WINDOW_MIN=case.window,
            WINDOW_MIN_16=case.window,
            SAMPLE_MIN=case.sample,
            WIDTH=case.width,
            _plan=planned,
        ),
        mock.patch.multiple(
            _launch_selection,
            RADIX_TILE=2 * tile,
            RADIX_PROGRAMS=case.programs,
            read_plan=read_plan,
        ),
        mock.patch.multiple(chunked, **{name: counted(name) for name in PLAIN}),
    ):
        yield
