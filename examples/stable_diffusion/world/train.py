"""Train the Stable Diffusion pipeline of digits in styles from nothing."""

from ebu_optim.training import exit_on_input_errors
from ebu_optim.worlds.styled_digits.train import main

if __name__ == "__main__":
    exit_on_input_errors(main)
