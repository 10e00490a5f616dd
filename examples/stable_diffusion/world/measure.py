"""Measure what a pipeline of digits in styles draws."""

from ebu_optim.training import exit_on_input_errors
from ebu_optim.worlds.styled_digits.measure import main

if __name__ == "__main__":
    exit_on_input_errors(main, "the same command")
