"""Generate images of prompts with Stable Diffusion, from fixed noise, and measure them."""

from ebu_optim.text_to_image.evaluation import evaluate
from ebu_optim.text_to_image.evaluation_options import Evaluation
from ebu_optim.training import command

if __name__ == "__main__":
    command(evaluate, Evaluation, __doc__)
