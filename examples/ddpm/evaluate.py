"""Measure a result of unlearn.py: what is forgotten, what is kept, how deep, and in what time."""

from ebu_optim.class_conditional.evaluation import Evaluation, evaluate
from ebu_optim.training import command

if __name__ == "__main__":
    command(evaluate, Evaluation, __doc__)
