"""Every kernel compiles for every card that the README names, with wide accesses and no spill.

Compiling is not running: no GPU takes part. Triton keeps what it compiled in a folder of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds for Linux")

from . import triton_compile

CARDS = (70, 75, 80, 90, 100)
# One thread's share of 16 bytes: kernels that only read, and kernels that write a gradient too.
READS = ("window_kernel", "digit_kernel", "histogram_kernel", "probe_kernel")
WRITES = ("combine_kernel", "restore_kernel")


@pytest.fixture(scope="module")
def compiled():
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    cards = [c for c in CARDS if c < 100 or version >= (3, 3)]  # Blackwell came with 3.3
    folder = Path(tempfile.gettempdir()) / f"ebu_optim_triton_{os.getuid()}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder))
        patch.setenv("TRITON_INTERPRET", "0")
        workers = min(2, os.cpu_count() or 1)
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            jobs = [
                pool.submit(triton_compile.compile_one, case, card)
                for card in cards
                for case in triton_compile.cases()
            ]
            done = [job.result() for job in jobs]
    assert {c.card for c in done} == set(cards)
    return done


def test_every_kernel_compiles_for_every_card(compiled):
    assert not [c for c in compiled if c.error]
    kernels = {
        line.split()[1].split("(")[0]
        for file in triton_compile.FOLDER.glob("_triton_*.py")
        for line in file.read_text().splitlines()
        if line.startswith("def ") and "_kernel(" in line
    }
    assert len(kernels) >= 12
    assert {c.name for c in compiled} == kernels


def test_no_kernel_spills(compiled):
    assert not [(c.name, c.constants, c.card) for c in compiled if c.stack or c.local]
    assert max(c.registers for c in compiled) <= 255
    assert min(c.registers for c in compiled) > 0


def test_a_block_fits_what_every_card_gives_it(compiled):
    """Without asking for more: 48 KiB of shared memory, and 65,536 registers for its threads."""
    assert max(c.shared for c in compiled) <= 48 << 10
    threads = dict.fromkeys(triton_compile.RADIX, 256)
    assert max(c.registers * threads.get(c.name, 128) for c in compiled) <= 1 << 16


def test_full_chunks_are_read_and_written_16_bytes_at_a_time(compiled):
    for c in compiled:
        reads = {"combine_kernel": 5, "restore_kernel": 2}.get(c.name, int(c.name in READS))
        writes = {"combine_kernel": 2, "restore_kernel": 1}.get(c.name, 0)
        assert c.wide.get("ld", 0) >= reads, c
        assert c.wide.get("st", 0) >= writes, c


def test_addresses_have_64_bits_and_products_are_not_contracted(compiled):
    for c in compiled:
        assert c.offsets, c
        if c.name == "combine_kernel":
            assert not c.fused, c
