"""Train the two classifiers that judge digits in styles."""

from ebu_optim.training import command
from ebu_optim.worlds.styled_digits.judges import JudgesOptions, train_judges

if __name__ == "__main__":
    command(train_judges, JudgesOptions, __doc__)
