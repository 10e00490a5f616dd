"""Make what unlearning needs: the replay, forget and surrogate sets, and the Fisher."""

from ebu_optim.class_conditional.sets import Prepare, prepare
from ebu_optim.training import command

if __name__ == "__main__":
    command(prepare, Prepare, __doc__)
