"""`ebu evaluate` in several processes."""

from __future__ import annotations

import sys

from ebu_optim.protocols import Evaluate, evaluate
from ebu_optim.training.command_line import parse

from .launch import join, leave

if __name__ == "__main__":
    join()
    evaluate(parse(Evaluate, sys.argv[1:]))
    leave()
