"""Measure what unlearn.py made: forgotten, kept, deep, and how long it took."""

from ebu_optim.class_conditional.evaluation import main
from ebu_optim.training import exit_on_input_errors

if __name__ == "__main__":
    exit_on_input_errors(main)
