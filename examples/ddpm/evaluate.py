"""Measure what unlearn.py made: forgotten, kept, deep, and how long it took."""

from ebu_optim.class_conditional.evaluation import Evaluation, evaluate
from ebu_optim.training import command

if __name__ == "__main__":
    command(evaluate, Evaluation, __doc__)
