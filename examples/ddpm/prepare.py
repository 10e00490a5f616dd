"""Make what unlearning needs beforehand: replay, forget and surrogate sets, the Fisher."""

from ebu_optim.class_conditional.sets import main
from ebu_optim.training import exit_on_input_errors

if __name__ == "__main__":
    exit_on_input_errors(main)
