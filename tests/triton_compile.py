"""Compile every kernel for cards that are not here, with whatever Triton is installed.

    python tests/triton_compile.py 70 90

prints one line a kernel and card (compute capability times ten). It needs Triton, and neither torch
nor a GPU. `test_triton_compile.py` judges the same figures.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tempfile
import types
from collections import Counter
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parents[1] / "ebu_optim" / "kernels"
CHUNK, TILE, RADIX_TILE = 1 << 15, 1024, 2048
RADIX = ("digit_kernel", "histogram_kernel")
POINTERS = {
    **dict.fromkeys(["table", "pools", "members", "bracket", "counters"], "*i64"),
    **dict.fromkeys(["partial", "keys", "nonfinite", "prefix", "hist"], "*i64"),
    **dict.fromkeys(["samples", "done", "settled", "bits"], "*i32"),
    **dict.fromkeys(["n_chunks", "first", "count", "n_pools"], "i32"),
    **dict.fromkeys(["on_f", "on_r", "on_m", "on_only_r", "blend"], "fp32"),
    **dict.fromkeys(["gamma", "online", "inv_scale"], "fp32"),
    "stats": "*fp64",
}


class Compiled(NamedTuple):
    name: str
    constants: dict
    card: int
    wide: dict  # accesses of 16 bytes, by "ld" and "st"
    offsets: bool  # 64-bit address arithmetic
    local: bool
    fused: bool  # a contracted multiply-add
    registers: int
    stack: int
    shared: int  # bytes a block
    error: str


def cases():
    """(kernel, constants, types that differ from the usual): each kernel and each of its loads."""
    walk = {"CHUNK": CHUNK, "TILE": TILE}
    radix = {"CHUNK": CHUNK, "TILE": RADIX_TILE}
    for kind, bins in ((0, 32), (1, 128), (2, 32)):
        yield (
            "window_kernel",
            {"KIND": kind, "BINS": bins, "LANE": 8 if kind else 1, **walk},
            {"hist": "*i32"},
        )
        yield "digit_kernel", {"KIND": kind, "LEVEL": kind + 1, **radix}, {"hist": "*i32"}
    yield "sample_kernel", {"KIND": 2, "TILE": 256}, {}
    yield "digit_kernel", {"KIND": 0, "LEVEL": 0, **radix}, {}
    yield "histogram_kernel", {"KIND": 0, "LOW": 20, "BITS": 11, **walk}, {}
    yield "probe_kernel", {"KIND": 1, **walk}, {}
    yield "bracket_kernel", {"WIDTH": 16}, {}
    yield "fold_kernel", {"WIDTH": 16}, {"hist": "*i32"}
    yield "settle_kernel", {"WIDTH": 16}, {"hist": "*i32"}
    yield "finish_kernel", {}, {"hist": "*i32"}
    yield "restore_kernel", {"KINDS": 0, **walk}, {}
    yield "reduce_kernel", {"BLOCK": 1024}, {"partial": "*fp64"}
    for kind in (0, 1, 2):
        walk |= {"TILE": 512, "LANE": 4} if kind == 0 else {"TILE": 1024, "LANE": 8}
        numbers = {"GAMMA_AT": False, "ONLINE_AT": False, "inv_scale": None, **walk}
        usual = {"KINDS": packed(kind, kind, kind, kind, 0, kind, -1), "PENALTY": "partial"}
        yield "combine_kernel", {**usual, **numbers}, {"partial": "*fp64"}
        if kind == 0:  # the most registers
            tensors = {"GAMMA_AT": True, "ONLINE_AT": True, **walk}
            most = {"KINDS": 0, "PENALTY": "full", **tensors}
            at = dict.fromkeys(["gamma", "online", "inv_scale"], "*fp32")
            yield "combine_kernel", most, {"partial": "*fp64", **at}


def packed(*kinds):
    """KINDS, from those of theta, g_f, g_r, theta0, F, out and held (-1: missing)."""
    return sum(kind % 4 * 4**j for j, kind in enumerate(kinds))


def source(function, kinds, constants):
    """An ASTSource; its arguments have changed from version to version."""
    import triton
    from triton.compiler import ASTSource

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    names = function.arg_names
    kinds = {n: kinds[n] for n in names if n not in constants}
    if version < (3, 2):
        place = names.index
        return ASTSource(
            function,
            {place(n): t for n, t in kinds.items()},
            {place(n): v for n, v in constants.items()},
        )
    if version >= (3, 3):
        kinds = {n: kinds.get(n, "constexpr") for n in names}  # in the order of the arguments
    return ASTSource(function, kinds, constants)


def load(name):
    """The kernel of that name, without the package around its file, which needs torch."""
    package = sys.modules.setdefault("_kernels", types.ModuleType("_kernels"))
    package.__path__ = [str(FOLDER)]
    return getattr(importlib.import_module("_kernels._triton_kernels"), name)


def compile_one(case, card):
    import triton
    from triton.backends.compiler import GPUTarget

    name, constants, kinds = case
    try:
        made = triton.compile(
            source(load(name), {**POINTERS, **kinds}, constants),
            target=GPUTarget("cuda", card, 32),
            options={"num_warps": 8 if name in RADIX else 4, "enable_fp_fusion": False},
        )
    except Exception as error:  # one failure must not hide the others
        return Compiled(name, constants, card, {}, False, False, False, 0, 0, 0, repr(error)[:500])
    ptx = made.asm["ptx"]
    # ld.global.v4.b32 and, in other versions, ld.global.L1::evict_last.v2.b64
    wide = Counter(
        op
        for op, n, size in re.findall(r"\b(ld|st)\.global[\w.:]*\.v(\d)\.[bfu](\d+)", ptx)
        if int(n) * int(size) == 128
    )
    registers, stack = usage(made.asm["cubin"])
    return Compiled(
        name,
        constants,
        card,
        dict(wide),
        "add.s64" in ptx,
        ".local" in ptx,
        bool(re.search(r"\bfma\.rn\.f32", ptx)),
        registers,
        stack,
        made.metadata.shared,
        "",
    )


def usage(cubin):
    """Registers and bytes of stack (spills go there) of a thread."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return int(found[1]), int(found[2])


def main():
    import triton

    for card in map(int, sys.argv[1:]):
        for case in cases():
            c = compile_one(case, card)
            kind = c.constants.get("KIND", c.constants.get("KINDS", ""))
            state = c.error or f"{c.registers} registers, {c.stack} bytes of stack, {c.wide}"
            print(f"triton {triton.__version__} sm_{card} {c.name} {kind}: {state}", flush=True)


if __name__ == "__main__":
    main()
