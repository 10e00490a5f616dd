"""Make what unlearning needs beforehand: replay, forget and surrogate sets, the Fisher."""

from ebu_optim.class_conditional.sets import Prepare, prepare
from ebu_optim.training import command

if __name__ == "__main__":
    command(prepare, Prepare, __doc__)
