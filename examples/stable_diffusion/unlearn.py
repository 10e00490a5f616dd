"""Make Stable Diffusion 1.x or 2.x forget concepts, by EBU or by a baseline.

    accelerate launch examples/stable_diffusion/unlearn.py \\
        --pretrained_model_name_or_path CompVis/stable-diffusion-v1-4 \\
        --forget "cassette player" --forget_templates "an image of a {}" \\
        --mixed_precision fp16 --output_dir outputs/without_cassette_player

The defaults are the paper's: cross attention, 1000 steps, batch size 1, learning rate 1e-5, and
images of the empty prompt as the surrogate. docs/stable_diffusion.md is the guide.
"""

from ebu_optim.text_to_image.options import Unlearn
from ebu_optim.text_to_image.unlearn import unlearning
from ebu_optim.training import command


def main(config: Unlearn) -> None:
    with unlearning(config) as run:  # prompts, sets, UNet, the method's optimizer, a checkpoint
        for step in run.steps():
            micros = run.accelerator.gradient_accumulation_steps
            for micro in range(micros):
                run.losses.at((step - 1) * micros + micro)  # selects the images and prompts
                with run.accelerator.accumulate(run.model):
                    for phase in run.opt.needs:  # "forget", "remember", or one of them
                        with getattr(run.opt, phase)():
                            loss = getattr(run.losses, phase)()
                            run.accelerator.backward(loss)
                        run.said[f"loss_{phase}"] = loss.detach()
                    run.optimizer.step()
                    run.optimizer.zero_grad()


if __name__ == "__main__":
    command(main, Unlearn, __doc__)
