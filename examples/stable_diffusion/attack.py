"""Attack a model that was made to forget: is the concept gone, or only its word?"""

from ebu_optim.attacks.options import AttackOptions
from ebu_optim.attacks.run import attack
from ebu_optim.training import command

if __name__ == "__main__":
    command(attack, AttackOptions, __doc__)
