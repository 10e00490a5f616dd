"""Make a class-conditional diffusion model forget classes, by EBU or by a baseline.

    python examples/ddpm/unlearn.py --pretrained_model_name_or_path outputs/digits \\
        --prepared_dir outputs/digits_forget_0 --method ebu --output_dir outputs/digits_without_0

The defaults are the paper's: 200 steps, Adam 1e-4 (its appendix also says 1e-5), clipping at 1.0,
uniform noise as the surrogate, replayed pairs, and losses summed over C, H, W.
"""

from ebu_optim.class_conditional.options import Unlearn
from ebu_optim.class_conditional.unlearn import unlearning
from ebu_optim.training import command


def main(config: Unlearn) -> None:
    with unlearning(config) as run:  # the sets, the models, the method's optimizer, a checkpoint
        for step in run.steps():
            micros = run.accelerator.gradient_accumulation_steps
            for micro in range(micros):
                run.losses.at((step - 1) * micros + micro)  # selects the images
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
