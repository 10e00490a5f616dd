"""UnlearnCanvas in the world of digits in styles: UA, IRA and CRA over five styles and ten digits.

    python examples/paper/unlearncanvas.py --dry_run                 # the cost of the whole table
    python examples/paper/unlearncanvas.py --methods ebu_added --targets seven red --seeds 1

Each target is unlearned separately, with the same strength for all of them. The page is
OUTPUT_DIR/styled-digits/unlearncanvas/index.html, with compared.json and compared.csv.
"""

from __future__ import annotations

from ebu_optim.experiments.canvas import Canvas, canvas
from ebu_optim.training import command

if __name__ == "__main__":
    command(canvas, Canvas, __doc__)
