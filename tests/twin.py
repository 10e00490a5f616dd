"""What the tests of EBUOptimizer share: exact gradients, and the oracle as its twin over steps."""

from __future__ import annotations

import numpy as np
import torch

from . import oracle
from .inputs import numpy

EPS = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def backward(params, grads):
    """Leave exactly `grads` on the parameters; None makes no gradient."""
    parts = [(p * g).sum() for p, g in zip(params, grads, strict=True) if g is not None]
    sum(parts).backward()


def drive(opt, params, g_f, g_r):
    opt.step(forget=lambda: backward(params, g_f), remember=lambda: backward(params, g_r))
    return [p.grad for p in params]


def make(*shapes, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=g).to(dtype)) for s in shapes]


def like(params, seed):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=g).to(p.dtype) for p in params]


class Twin:
    """The oracle over several steps. fisher: "online", None or arrays."""

    def __init__(self, params, fisher="online", anchor=None, max_grad_norm=None, **options):
        self.online, self.count, self.clip = fisher == "online", 0, max_grad_norm
        self.fisher = [np.zeros(p.shape) for p in params] if self.online else fisher
        self.anchor, self.options = numpy(params if anchor is None else anchor), options

    def step(self, params, g_f, g_r):
        """G, regions and thresholds, as if every array had a gradient."""
        theta = numpy(params)
        g_f, g_r = (
            [np.zeros(p.shape) if g is None else g.double().numpy() for p, g in zip(params, grads)]
            for grads in (g_f, g_r)
        )
        G, masks, taus = oracle.step(theta, g_f, g_r, self.anchor, self.fisher, **self.options)
        if self.online:
            self.count += 1
            self.fisher = [F + (r**2 - F) / self.count for F, r in zip(self.fisher, g_r)]
        if self.clip is not None:
            norm = np.sqrt(sum((g**2).sum() for g in G))
            G = [g * min(1.0, self.clip / norm) if norm else g for g in G]
        return G, masks, taus


def assert_near(got, want, scale=1.0):
    """To the rounding of each dtype, relative to the largest number that went in."""
    for g, w in zip(got, want, strict=True):
        error = abs(g.detach().double().numpy() - w)
        bound = EPS[g.dtype] * (scale + abs(w))
        assert (error <= bound).all(), (g.dtype, error.max(), g, w)
