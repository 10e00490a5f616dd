"""examples/lightning_manual.py, where lightning is installed (no extra brings it)."""

from __future__ import annotations

import importlib.util
import re

import pytest
import torch

from ebu_optim import EBUOptimizer

from .processes import ROOT, python
from .steps import assert_same, params

pytest.importorskip("lightning")
PATH = ROOT / "examples" / "lightning_manual.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("lightning_manual", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def by_hand(example, epochs: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    m = example.Unlearn()
    opt = EBUOptimizer(torch.optim.Adam(m.parameters(), lr=0.01), max_grad_norm=0.5)
    for _ in range(epochs):
        for batch, *_ in iter(example.data()):
            with opt.forget():
                m.loss(batch["forget"], 1.0).backward()
            with opt.remember():
                m.loss(batch["remember"], -1.0).backward()
            opt.step()
    return params(m)


def test_it_is_the_run_by_hand_and_resumes_bit_for_bit(example, tmp_path):
    torch.manual_seed(0)
    m, first = example.Unlearn(), example.trainer(max_epochs=2)
    first.fit(m, example.data())
    assert first.global_step == 8
    assert_same(params(m), by_hand(example, 2))
    first.save_checkpoint(tmp_path / "run.ckpt")
    again = example.Unlearn()
    example.trainer(max_epochs=3).fit(again, example.data(), ckpt_path=tmp_path / "run.ckpt")
    assert_same(params(again), by_hand(example, 3))


def test_automatic_optimization_is_refused(example):
    class Automatic(example.Unlearn):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = True

        def training_step(self, batch, batch_idx):
            return self.loss(batch["forget"], 1.0)

    with pytest.raises(TypeError, match="In Lightning use manual optimization"):
        example.trainer(max_epochs=1).fit(Automatic(), example.data())


def test_two_processes(example):
    done = python(PATH, 2)
    assert done.returncode == 0, done.stderr
    sums = re.findall(r"4 steps, overlap \d+, sum (\S+)", done.stdout)
    assert len(sums) == 2
    assert sums[0] == sums[1]
