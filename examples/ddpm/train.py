"""Train the class-conditional diffusion model that later forgets.

    accelerate launch examples/ddpm/train.py --dataset_name uoft-cs/cifar10 --random_flip \\
        --use_ema --max_train_steps 800000 --output_dir outputs/cifar10
    python examples/ddpm/train.py --digits --model small --use_ema --output_dir outputs/digits

The recipe of the DDPM code base: Adam 2e-4, clipping at 1.0, batch 128, conditions dropped to the
null class with probability 0.1, antithetic timesteps, squared error summed over C, H, W.
"""

from ebu_optim.class_conditional.options import Train
from ebu_optim.class_conditional.train import train
from ebu_optim.training import command

if __name__ == "__main__":
    command(train, Train, __doc__)
