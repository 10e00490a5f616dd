"""Any generative model: a conditional VAE that is made to forget a digit.

    python examples/vae.py --forget 0

Trains a small VAE on scikit-learn's 8x8 digits, makes it forget one digit with `EBUOptimizer` and,
for comparison, with the plain sum of the two losses, and measures what is forgotten, what is kept
and how deep the forgetting goes. It takes about 15 seconds on one CPU core.
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam
from tqdm.auto import tqdm

from ebu_optim import EBUOptimizer
from ebu_optim.baselines import Joint
from ebu_optim.diffusion import surrogate_noise
from ebu_optim.worlds import any_model, digits

LATENT, CONDITION, WIDTH, PIXELS = 8, 16, 256, 64


class VAE(nn.Module):
    """A VAE whose encoder and decoder take the condition.

    Each pixel is Gaussian with its own width, and is sampled with it. The model can therefore
    generate noise, which a mean alone cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(digits.CLASSES), CONDITION)
        self.encoder = mlp(PIXELS + CONDITION, 2 * LATENT)
        self.decoder = mlp(LATENT + CONDITION, 2 * PIXELS)

    def encode(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and width of q(z | x, c), each (n, LATENT)."""
        mean, raw = self.encoder(torch.cat([x.flatten(1), self.embedding(labels)], 1)).chunk(2, 1)
        return mean, F.softplus(raw) + 1e-3

    def decode(self, z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and width of p(x | z, c), each (n, PIXELS)."""
        mean, raw = self.decoder(torch.cat([z, self.embedding(labels)], 1)).chunk(2, 1)
        return mean, F.softplus(raw) + 0.1

    def draw(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        mean, width = self.decode(torch.randn(len(labels), LATENT, generator=generator), labels)
        x = mean + width * torch.randn(mean.shape, generator=generator)
        return x.clamp(-1, 1).view(-1, *digits.SHAPE)


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, WIDTH),
        nn.SiLU(),
        nn.Linear(WIDTH, WIDTH),
        nn.SiLU(),
        nn.Linear(WIDTH, outputs),
    )


def negative_elbo(model: VAE, x: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """An upper bound of -log p(x | c), in nats up to a constant; mean over the batch."""
    mean, width = model.encode(x, labels)
    z = mean + width * torch.randn(mean.shape, generator=generator)
    pixel, sigma = model.decode(z, labels)
    error = (((x.flatten(1) - pixel) / sigma).square() / 2 + sigma.log()).sum(1)
    to_prior = ((mean.square() + width.square() - 1) / 2 - width.log()).sum(1)
    return (error + to_prior).mean()


def train(x: Tensor, y: Tensor, args: argparse.Namespace) -> VAE:
    torch.manual_seed(args.seed)
    g = torch.Generator().manual_seed(args.seed)
    model = VAE()
    optimizer = Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.train_steps)
    for _ in tqdm(range(args.train_steps), f"a VAE of {len(y.unique())} digits"):
        i = torch.randint(len(x), (64,), generator=g)
        optimizer.zero_grad()
        negative_elbo(model, x[i], y[i], g).backward()
        optimizer.step()
        schedule.step()
    return model


def unlearn(model: VAE, rule: str, args: argparse.Namespace) -> EBUOptimizer:
    """For the digit to forget the model learns noise; for the others it learns its own images."""
    base = Adam(model.parameters(), lr=args.learning_rate)
    if rule == "EBU":  # F is online: the mean of the squared remember gradients
        optimizer = EBUOptimizer(base, max_grad_norm=1.0)
    else:
        optimizer = Joint(base, max_grad_norm=1.0)
    g = torch.Generator().manual_seed(args.seed)
    frozen = copy.deepcopy(model)  # sampling is cheap, so no replay set is stored
    n = args.batch_size
    forgotten = torch.full((n,), args.forget)
    for _ in tqdm(range(args.steps), f"forgetting {args.forget}, {rule}"):
        with optimizer.forget():
            noise = surrogate_noise("uniform", (n, *digits.SHAPE), generator=g)
            negative_elbo(model, noise, forgotten, g).backward()
        with optimizer.remember():
            kept = any_model.kept_labels(args.forget, n, g)
            with torch.no_grad():
                replayed = frozen.draw(kept, g)
            negative_elbo(model, replayed, kept, g).backward()
        optimizer.step()
    return optimizer


def main(argv: list[str] | None = None) -> None:
    args = any_model.parse("vae", __doc__, 1500, argv)
    protocol = {
        "forget_loss": "negative ELBO of uniform noise under the forgotten condition",
        "remember_loss": "negative ELBO of the frozen model's images of the kept ones",
        "fisher": "online",
        "attacks_loss": "negative ELBO of real images",
    }
    any_model.compare(args, train, unlearn, negative_elbo, protocol)


if __name__ == "__main__":
    main()
