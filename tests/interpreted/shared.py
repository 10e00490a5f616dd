"""What several files of this folder use."""

from __future__ import annotations

import functools

import torch
from hypothesis import Phase, settings

from ebu_optim.kernels import _launch_plan, _launch_selection
from ebu_optim.kernels import triton as fused

from .. import inputs

HALVES = (torch.float16, torch.bfloat16)
TAKEN = (torch.float32, *HALVES)
# no shrinking: a call takes a large part of a second here
slow = settings(deadline=None, max_examples=12, phases=(Phase.explicit, Phase.generate))
combine = functools.partial(inputs.combine, kernels=fused)


def settled(pools):
    """The keys, and which pools their window settled."""
    plan, _alive = _launch_plan.read_plan(pools, pools[0][0][0].device)
    keys, _, done = _launch_selection._select(plan)
    return keys, done.tolist()


def clusters():
    """Ten groups of 120 magnitudes, octaves apart, in no order: 1 to 1.004 times a power of 2."""
    x = 2.0 ** torch.arange(-5, 5).repeat_interleave(120) * torch.linspace(1, 1.003, 1200)
    return x[torch.randperm(1200, generator=torch.Generator().manual_seed(0))]


def same(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
