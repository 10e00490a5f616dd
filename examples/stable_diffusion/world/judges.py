"""Train the two classifiers that judge digits in styles."""

from ebu_optim.training import exit_on_input_errors
from ebu_optim.worlds.styled_digits.judges import main

if __name__ == "__main__":
    exit_on_input_errors(main)
