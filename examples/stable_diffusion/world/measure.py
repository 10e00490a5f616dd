"""Measure whether a pipeline generates the requested digits in the requested styles."""

from ebu_optim.training import command
from ebu_optim.worlds.styled_digits.measure import Measure, measure

if __name__ == "__main__":
    command(measure, Measure, __doc__)
