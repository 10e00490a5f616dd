"""Any generative model: a conditional GAN that is made to forget a digit.

    python examples/gan.py --forget 0

Trains a small GAN on scikit-learn's 8x8 digits, makes its generator forget one digit with
`EBUOptimizer` and, for comparison, with the plain sum of the two losses, and measures what is
forgotten, what is kept and how deep the forgetting goes. It takes about 30 seconds on one CPU core.
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim import Adam
from tqdm.auto import tqdm

from ebu_optim import DiagonalFisher, EBUOptimizer
from ebu_optim.baselines import Joint
from ebu_optim.diffusion import surrogate_noise
from ebu_optim.worlds import any_model, digits

LATENT, CONDITION, WIDTH, PIXELS = 32, 16, 256, 64


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(digits.CLASSES), CONDITION)
        self.body = nn.Sequential(
            nn.Linear(LATENT + CONDITION, WIDTH),
            nn.LeakyReLU(0.2),
            nn.Linear(WIDTH, WIDTH),
            nn.LeakyReLU(0.2),
            nn.Linear(WIDTH, PIXELS),
            nn.Tanh(),
        )

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        x = self.body(torch.cat([z, self.embedding(labels)], 1))
        return x.view(-1, *digits.SHAPE)

    def draw(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        return self(torch.randn(len(labels), LATENT, generator=generator), labels)


class Discriminator(nn.Module):
    """A projection discriminator (Miyato & Koyama 2018), which only the training needs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            spectral_norm(nn.Linear(PIXELS, WIDTH)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Linear(WIDTH, WIDTH)),
            nn.LeakyReLU(0.2),
        )
        self.head = spectral_norm(nn.Linear(WIDTH, 1))
        self.embedding = spectral_norm(nn.Embedding(len(digits.CLASSES), WIDTH))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        h = self.body(x.flatten(1))
        return self.head(h)[:, 0] + (h * self.embedding(labels)).sum(1)


def train(x: Tensor, y: Tensor, args: argparse.Namespace) -> Generator:
    """Train with the hinge loss; the model is the EMA of the generator."""
    torch.manual_seed(args.seed)
    g = torch.Generator().manual_seed(args.seed)
    model, judge = Generator(), Discriminator()
    average = copy.deepcopy(model)
    step_model = Adam(model.parameters(), lr=5e-4, betas=(0.0, 0.9))
    step_judge = Adam(judge.parameters(), lr=1e-3, betas=(0.0, 0.9))
    for _ in tqdm(range(args.train_steps), f"a GAN of {len(y.unique())} digits"):
        i = torch.randint(len(x), (64,), generator=g)
        fake = model.draw(y[i], g)
        real_loss = F.relu(1 - judge(x[i], y[i])).mean()
        fake_loss = F.relu(1 + judge(fake.detach(), y[i])).mean()
        step_judge.zero_grad()
        (real_loss + fake_loss).backward()
        step_judge.step()
        step_model.zero_grad()
        (-judge(fake, y[i]).mean()).backward()
        step_model.step()
        with torch.no_grad():
            for a, p in zip(average.parameters(), model.parameters()):
                a.lerp_(p, 0.005)
    return average


def energy_distance(
    model: Generator, x: Tensor, labels: Tensor, generator: torch.Generator
) -> Tensor:
    """The energy distance, up to a constant, between generated and given images of one condition.

    It is 2 E|a - b| - E|a - a'| for generated a and given b, and smallest for equal distributions.
    A GAN has no likelihood, and the discriminator of a generator is rarely available. This loss
    needs neither.
    """
    a, b = model.draw(labels, generator).flatten(1), x.flatten(1)
    n = len(a)
    return 2 * torch.cdist(a, b).mean() - torch.cdist(a, a).sum() / (n * (n - 1))


def fisher(model: Generator, args: argparse.Namespace) -> DiagonalFisher:
    """F for x ~ N(G(z, c), I), the likelihood whose negative logarithm is the distillation loss.

    A GAN has no likelihood of its own. An online F would start at zero, as the remember loss has no
    gradient at theta0. For a random direction e in pixel space the gradient is J^T e. Its mean
    square is the diagonal of J^T J, which says how far the kept images move when a weight moves.
    """
    g = torch.Generator().manual_seed(args.seed)
    batches = []
    for _ in range(16):
        z, e = (torch.randn(64, d, generator=g) for d in (LATENT, PIXELS))
        batches.append({"z": z, "labels": any_model.kept_labels(args.forget, 64, g), "e": e})

    def along(model: Generator, batch: dict[str, Tensor]) -> Tensor:
        return (batch["e"] * model(batch["z"], batch["labels"]).flatten(1)).sum(1)

    return DiagonalFisher.estimate(model, along, batches, progress=False)


def unlearn(model: Generator, rule: str, args: argparse.Namespace) -> EBUOptimizer:
    """For the digit to forget the generator learns to give noise; for the others it learns to give
    its earlier image from the same z."""
    base = Adam(model.parameters(), lr=args.learning_rate)
    if rule == "EBU":
        held = fisher(model, args).for_model(model)
        # unscaled and with gamma 1, the penalty is the diagonal curvature of the remember loss
        options = {"fisher": held, "fisher_scale": "raw", "gamma": 1.0}
        optimizer = EBUOptimizer(base, max_grad_norm=1.0, **options)
    else:
        optimizer = Joint(base, max_grad_norm=1.0)
    g = torch.Generator().manual_seed(args.seed)
    frozen = copy.deepcopy(model)
    n = args.batch_size
    forgotten = torch.full((n,), args.forget)

    def forget() -> None:
        noise = surrogate_noise("uniform", (n, *digits.SHAPE), generator=g)
        energy_distance(model, noise, forgotten, g).backward()

    def remember() -> None:
        z, kept = torch.randn(n, LATENT, generator=g), any_model.kept_labels(args.forget, n, g)
        with torch.no_grad():
            wanted = frozen(z, kept)
        error = model(z, kept) - wanted
        (error.square().flatten(1).sum(1).mean() / 2).backward()

    for _ in tqdm(range(args.steps), f"forgetting {args.forget}, {rule}"):
        optimizer.step(forget=forget, remember=remember)
    return optimizer


def main(argv: list[str] | None = None) -> None:
    args = any_model.parse("gan", __doc__, 2500, argv)
    protocol = {
        "forget_loss": "energy distance of generated images to uniform noise",
        "remember_loss": "half the squared difference to the frozen generator at the same z",
        "fisher": "diagonal of J^T J of the kept outputs at theta0, 1024 samples",
        "attacks_loss": "energy distance of generated images to real ones",
    }
    any_model.compare(args, train, unlearn, energy_distance, protocol)


if __name__ == "__main__":
    main()
