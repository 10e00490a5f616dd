"""Train the Stable Diffusion pipeline of digits in styles from scratch."""

from ebu_optim.training import command
from ebu_optim.worlds.styled_digits.train import WorldOptions, train

if __name__ == "__main__":
    command(train, WorldOptions, __doc__)
