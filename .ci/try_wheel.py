"""An installed wheel imports, has its C extension, and steps with it."""

import torch

import ebu_optim
from ebu_optim import kernels

assert kernels.active() == "cpu (fused)", kernels.active()
w = torch.nn.Parameter(torch.ones(100_000))
opt = ebu_optim.EBUOptimizer(torch.optim.SGD([w], lr=0.1), fused=True)
for _ in range(2):
    opt.step(
        forget=lambda: (-w.sin()).sum().backward(),
        remember=lambda: w.square().sum().backward(),
    )
assert w.isfinite().all()
print(ebu_optim.__version__, torch.__version__, dict(opt.stats))
