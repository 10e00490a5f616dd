"""Draw what a Stable Diffusion pipeline makes of prompts, from fixed noise, and measure it."""

from ebu_optim.text_to_image.evaluation import main
from ebu_optim.training import exit_on_input_errors

if __name__ == "__main__":
    exit_on_input_errors(main, "the same command")
