"""Attack a model that was made to forget: is the concept gone, or its word unhooked?"""

from ebu_optim.attacks.run import main
from ebu_optim.training import exit_on_input_errors

if __name__ == "__main__":
    exit_on_input_errors(main, "the same command")
