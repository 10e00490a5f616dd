"""Unlearn with Lightning: manual optimization, one phase for each loss.

    python examples/lightning_manual.py [DEVICES]     # 1, or the number of processes

It needs `pip install lightning` (tested with 2.6). The network is a toy; copy the module. Automatic
optimization has one closure for one loss, for which EBUOptimizer raises an error.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import lightning
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader

from ebu_optim import EBUOptimizer


class Unlearn(lightning.LightningModule):
    """A module for batches {"forget": (n, 4), "remember": (n, 4)}."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))

    def configure_optimizers(self) -> EBUOptimizer:
        # gradient_clip_val of the Trainer works only with automatic optimization
        return EBUOptimizer(torch.optim.Adam(self.parameters(), lr=0.01), max_grad_norm=0.5)

    def loss(self, x: torch.Tensor, wanted: float) -> torch.Tensor:
        return (self.net(x) - wanted).square().mean()

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        ebu = optimizer.optimizer  # the handle: Lightning's wrapper counts the steps
        with ebu.forget():
            self.manual_backward(self.loss(batch["forget"], 1.0))
        with ebu.remember():
            self.manual_backward(self.loss(batch["remember"], -1.0))
        optimizer.step()
        optimizer.zero_grad()
        if self.global_step % self.trainer.log_every_n_steps == 0:
            self.log("overlap", float(ebu.stats["overlap"]), prog_bar=True)


def data() -> CombinedLoader:
    x = torch.randn(2, 32, 4, generator=torch.Generator().manual_seed(0))
    loaders = {
        name: DataLoader(part, batch_size=8) for name, part in zip(("forget", "remember"), x)
    }
    return CombinedLoader(loaders, "min_size")


def trainer(devices: int = 1, **options: Any) -> lightning.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    return lightning.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
        log_every_n_steps=2,
        **quiet,
        **options,
    )


def main(devices: int) -> None:
    lightning.seed_everything(0)
    module, fit = Unlearn(), trainer(devices, max_epochs=2)
    fit.fit(module, data())
    stats = module.optimizers().optimizer.stats
    # one write per line, so that the lines of two processes do not mix
    weights = sum(p.double().sum().item() for p in module.parameters())
    sys.stdout.write(f"{fit.global_step} steps, overlap {stats['overlap']}, sum {weights:.17g}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "devices", nargs="?", type=int, default=1, help="Number of processes. Default: 1."
    )
    main(parser.parse_args().devices)
