"""Many concepts in the world of digits in styles: ten digits, each in one style.

    python examples/paper/many.py --dry_run                    # what all of it costs
    python examples/paper/many.py --methods ebu_added --counts 10 --seeds 1

They are forgotten together, and one request after the other. The table is
OUTPUT_DIR/styled-digits/many/results.md, with results.json.
"""

from __future__ import annotations

from ebu_optim.experiments.many import Many, many
from ebu_optim.training import command

if __name__ == "__main__":
    command(many, Many, __doc__)
